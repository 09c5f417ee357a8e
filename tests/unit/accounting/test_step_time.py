"""Time of a step: what binds it, what communication adds, and calibration."""

from dataclasses import replace

import pytest

from theworld_train.accounting.collectives import Exchanged, collectives
from theworld_train.accounting.flops import Operation, StepWork
from theworld_train.accounting.gpus import Efficiencies, Range, efficiencies, gpu_spec
from theworld_train.accounting.step_time import calibrate, run_time, step_time
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError

H100 = gpu_spec("h100")
IDEAL = Efficiencies(
    **dict.fromkeys(("matmul", "convolution", "sdpa", "structured", "eager", "memory", "links"), Range(1, 1, 1)),
    overlap=Range(0, 0.5, 1),
    launch_us=Range(0, 0, 0),
    latency_us=Range(0, 0, 0),
)


def work(flops=0.0, moved=0.0, kind="matmul", precision="bf16", kernels=1):
    operation = Operation(Component.LANGUAGE_MODEL, "mlp", kind, "forward", precision, flops, moved, kernels)
    return StepWork((operation,), flops, 1000)


def test_an_operation_is_bound_by_arithmetic_or_by_memory():
    assert step_time(work(flops=989.4e12, moved=1), H100, IDEAL).seconds == Range(1, 1, 1)
    assert step_time(work(flops=1, moved=3350e9), H100, IDEAL).seconds == Range(1, 1, 1)
    assert step_time(work(flops=67e12, precision="fp32"), H100, IDEAL).seconds.expected == pytest.approx(1)


def test_each_kind_has_its_efficiency():
    shares = replace(IDEAL, sdpa=Range(0.1, 0.2, 0.5))
    assert step_time(work(989.4e12, kind="sdpa"), H100, shares).seconds == pytest.approx((10, 5, 2))
    assert step_time(work(989.4e12), H100, shares).seconds.expected == 1
    memory = replace(IDEAL, memory=Range(0.5, 0.5, 0.5))
    assert step_time(work(moved=3350e9, kind="elementwise"), H100, memory).seconds.expected == 2


def test_perfect_arithmetic_has_an_mfu_of_one():
    result = step_time(work(flops=989.4e12), H100, IDEAL, ranks=4)
    assert result.mfu == pytest.approx((1, 1, 1))
    assert result.tokens_per_second.expected == 4000


def test_a_step_cannot_be_faster_than_its_launches():
    slow_host = replace(IDEAL, launch_us=Range(10, 10, 10))
    result = step_time(work(flops=1, kernels=100_000), H100, slow_host)
    assert result.seconds.expected == result.launching == pytest.approx(1)


def test_communication_shows_where_it_hides_behind_nothing():
    parameters = Exchanged(trainable=10**9, frozen=0, units=1)
    compute = work(flops=989.4e12)
    (reduce,) = collectives("ddp", parameters)
    alone = reduce.bytes_sent(8) / 450e9
    ddp = step_time(compute, H100, IDEAL, ranks=8, exchanges=(reduce,))
    assert ddp.communication == pytest.approx(alone)
    assert ddp.seconds == pytest.approx((1 + alone, 1 + alone / 2, 1))
    zero1 = step_time(compute, H100, IDEAL, ranks=8, exchanges=collectives("zero1", parameters))
    assert zero1.seconds.best == pytest.approx(1 + alone), "what DeepSpeed exchanges is waited for"
    # Nothing to compute: nothing to hide behind.
    assert step_time(work(), H100, IDEAL, ranks=8, exchanges=(reduce,)).seconds.best == pytest.approx(alone)


def test_a_slow_network_binds_across_nodes():
    exchanges = collectives("ddp", Exchanged(10**9, 0, 1))
    usual = step_time(work(), H100, IDEAL, ranks=16, exchanges=exchanges)
    slow = step_time(work(), H100, IDEAL, ranks=16, exchanges=exchanges, network_gb_per_s=H100.network_gb_per_s / 4)
    assert slow.communication == pytest.approx(4 * usual.communication)
    small_nodes = step_time(work(), H100, IDEAL, ranks=8, exchanges=exchanges, gpus_per_node=4)
    assert small_nodes.communication > step_time(work(), H100, IDEAL, ranks=8, exchanges=exchanges).communication


def test_worst_is_slowest():
    result = step_time(
        work(1e15, 1e9), H100, efficiencies(H100), ranks=8, exchanges=collectives("fsdp2", Exchanged(9, 9, 9))
    )
    assert result.seconds.worst > result.seconds.expected > result.seconds.best
    assert result.mfu.worst < result.mfu.expected < result.mfu.best
    assert sum(result.computation.values()) == pytest.approx(sum(result.phases.values()))


def test_a_run_is_its_steps_on_all_gpus():
    result = run_time(step_time(work(flops=989.4e12), H100, IDEAL), steps=3600, ranks=8)
    assert result.seconds.expected == 3600
    assert result.gpu_hours.expected == 8


@pytest.mark.parametrize("ranks", [1, 8])
def test_calibration_predicts_what_was_measured(ranks):
    exchanges = collectives("fsdp2", Exchanged(10**9, 10**9, 30))
    before = efficiencies(H100)

    def predict(shares, flops=1e14):
        return step_time(work(flops, 1e11), H100, shares, ranks=ranks, exchanges=exchanges)

    measured = [1.0] * 5 + [1.1] * 30 + [1.3] * 5 + [60.0]  # one has waited for something else
    after = calibrate(before, predict(before), measured)
    assert predict(after).seconds == pytest.approx((1.3, 1.1, 1.0))
    assert predict(after, 2e14).seconds.expected > 1.1, "other work is still told apart"
    again = calibrate(after, predict(after), measured)
    for name, values in again.to_json().items():
        assert values == pytest.approx(after.to_json()[name]), name


def test_equal_measurements_leave_a_little_uncertainty():
    before = efficiencies(H100)
    predicted = step_time(work(1e14), H100, before)
    after = step_time(work(1e14), H100, calibrate(before, predicted, [1.0] * 3))
    assert after.seconds == pytest.approx((1.03, 1.0, 0.97))


@pytest.mark.parametrize("measured", [[], [0.0], [-1.0], [float("nan")], [float("inf")]])
def test_calibration_refuses_times_that_cannot_be(measured):
    with pytest.raises(ConfigError, match="step times in seconds, all above zero"):
        calibrate(IDEAL, step_time(work(1e14), H100, IDEAL), measured)


def test_calibration_refuses_what_is_faster_than_the_gpu():
    predicted = step_time(work(flops=989.4e12), H100, efficiencies(H100))
    with pytest.raises(ConfigError, match="200% of the GPU's peak"):
        calibrate(efficiencies(H100), predicted, [0.5])
