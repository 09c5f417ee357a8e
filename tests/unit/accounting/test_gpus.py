"""GPUs: what every entry must hold, and names that are understood."""

import pytest

from theworld_train.accounting.gpus import Efficiencies, Range, efficiencies, gpu_spec, gpu_specs
from theworld_train.config.errors import ConfigError

GIB = 2**30


@pytest.mark.parametrize("spec", gpu_specs(), ids=lambda spec: spec.name)
def test_every_gpu_is_plausible_and_has_a_source(spec):
    # Marketed gigabytes are sometimes 10^9 and sometimes 2^30 bytes; a slipped digit is neither.
    assert 0.95 < spec.usable_gib * GIB / (spec.memory_gb * 1e9) < 1.075
    assert 1.9 < spec.tflops.get("fp8", 2 * spec.tflops["bf16"]) / spec.tflops["bf16"] < 2.1
    assert 1.5 < spec.tflops["bf16"] / spec.tflops["fp32"] < 40
    # A ridge point, FLOPs for each byte of memory traffic, outside of this range is a unit mixed up.
    assert 50 < spec.peak_flops("bf16") / (spec.memory_gb_per_s * 1e9) < 500
    assert spec.source


def test_names_are_unique_and_ordered_by_memory():
    names = [name for spec in gpu_specs() for name in (spec.name, *spec.aliases)]
    assert len(names) == len(set(names))
    memory = [spec.memory_gb for spec in gpu_specs()]
    assert memory == sorted(memory)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("h100", "h100-80gb"), ("H100 SXM", "h100-80gb"), ("a100_40gb", "a100-40gb"), ("4090", "rtx-4090"), ("l4", "l4")],
)
def test_aliases_case_and_spaces_are_understood(written, meant):
    assert gpu_spec(written).name == meant


def test_an_unknown_gpu_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"command line: --gpu: no GPU of this name.*'h10-80gb'.*h100-80gb"):
        gpu_spec("h10-80gb", "command line", "--gpu")
    with pytest.raises(ConfigError, match=r"known: l4, .*b200"):
        gpu_spec("zzz")


@pytest.mark.parametrize("spec", gpu_specs(), ids=lambda spec: spec.name)
def test_efficiencies_are_shares_in_order(spec):
    values = efficiencies(spec)
    for name in ("matmul", "convolution", "sdpa", "structured", "eager", "memory", "links", "overlap"):
        share = getattr(values, name)
        assert 0 < share.worst <= share.expected <= share.best <= 1, name
    for name in ("launch_us", "latency_us"):
        cost = getattr(values, name)
        assert cost.worst >= cost.expected >= cost.best > 0, name


def test_efficiencies_survive_json():
    values = efficiencies(gpu_spec("h100"))
    assert Efficiencies.from_json(values.to_json()) == values
    assert values.matmul != efficiencies(gpu_spec("a100")).matmul, "a generation's own values must be taken"


def test_a_range_scales():
    assert Range(1, 2, 3).times(2) == Range(2, 4, 6)
