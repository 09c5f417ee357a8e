"""What ranks exchange: textbook volumes, and what binds their time."""

import pytest

from theworld_train.accounting.collectives import STRATEGIES, Cluster, Exchanged, check_strategies, collectives
from theworld_train.config.errors import ConfigError

BILLION = 10**9
PARAMETERS = Exchanged(trainable=BILLION, frozen=3 * BILLION, units=10)


def sent(strategy, ranks=8, steps=1, parameters=PARAMETERS):
    return sum(exchange.bytes_sent(ranks) for exchange in collectives(strategy, parameters, steps))


def test_zero_1_and_2_move_what_ddp_moves():
    # Rajbhandari et al. 2020, section 7: an all-reduce is a reduce-scatter and an all-gather.
    assert sent("ddp") == sent("zero1") == sent("zero2") == 2 * 4 * BILLION * 7 / 8


def test_zero_3_gathers_all_weights_twice_and_splits_gradients():
    assert sent("zero3") == sent("fsdp2") == (2 * 2 * 4 * BILLION + 4 * BILLION) * 7 / 8
    # With everything trainable and one dtype, the textbook's factor of one and a half.
    whole = Exchanged(BILLION, 0, 10, trainable_bytes=4)
    assert sent("zero3", parameters=whole) == 1.5 * sent("ddp", parameters=whole)


@pytest.mark.parametrize(
    ("strategy", "gradients", "weights"),
    [("ddp", 1, 0), ("zero1", 1, 0), ("zero2", 4, 0), ("zero3", 4, 4), ("fsdp2", 4, 4)],
)
def test_accumulation_repeats_what_cannot_wait(strategy, gradients, weights):
    one, four = collectives(strategy, PARAMETERS), collectives(strategy, PARAMETERS, 4)
    for before, after in zip(one, four, strict=True):
        is_weights = before.operation == "all_gather" and strategy in ("zero3", "fsdp2")
        updated = before.operation == "all_gather" and not is_weights
        expected = weights if is_weights else 1 if updated else gradients
        assert (after.payload, after.calls) == (expected * before.payload, expected * before.calls)


def test_zero_3_gathers_what_trains_as_it_is_stored():
    stored = Exchanged(BILLION, 3 * BILLION, 10, trainable_bytes=4)
    assert sent("zero3", parameters=stored) - sent("zero3") == 2 * 2 * BILLION * 7 / 8


def test_only_ddp_and_fsdp2_exchange_beside_the_computation():
    beside = {name: {exchange.overlaps for exchange in collectives(name, PARAMETERS)} for name in STRATEGIES}
    assert beside == {"ddp": {True}, "zero1": {False}, "zero2": {False}, "zero3": {False}, "fsdp2": {True}}


def test_a_single_rank_exchanges_nothing():
    cluster = Cluster(1, 8, link=1e9, network=1e9, latency=1.0)
    assert all(cluster.seconds(exchange) == 0 for name in STRATEGIES for exchange in collectives(name, PARAMETERS))


def test_the_slower_of_link_and_network_binds_across_nodes():
    (reduce,) = collectives("ddp", PARAMETERS)
    inside = Cluster(8, 8, link=400e9, network=50e9)
    across = Cluster(16, 8, link=400e9, network=50e9)
    assert inside.seconds(reduce) == pytest.approx(8 * BILLION * 7 / 8 / 400e9)
    assert across.seconds(reduce) == pytest.approx(8 * BILLION * 15 / 16 / 50e9)
    fast_network = Cluster(16, 8, link=32e9, network=400e9)
    assert fast_network.bandwidth == 32e9


def test_latency_grows_with_calls_and_ranks():
    few, many = (collectives("fsdp2", Exchanged(0, 0, units))[0] for units in (10, 20))
    cluster = Cluster(8, 8, link=1e9, network=1e9, latency=1e-5)
    assert cluster.seconds(few) == pytest.approx(20 * 3e-5)
    assert cluster.seconds(many) == pytest.approx(40 * 3e-5)


def test_unknown_strategies_are_all_named_with_the_nearest():
    assert check_strategies(["fsdp2", "ddp"]) == ("fsdp2", "ddp")
    with pytest.raises(ConfigError) as error:
        check_strategies(["fsdp", "ddp", "zero4"], "command line", "--strategy")
    assert [problem.value for problem in error.value.problems] == ["fsdp", "zero4"]
    assert "fsdp2" in str(error.value)
