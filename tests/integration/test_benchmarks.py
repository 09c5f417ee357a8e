"""The benchmark of a GPU runs where there is none, on a tiny model: what it measures, and what it refuses."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark, which writes its record elsewhere and compiles nothing."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu")
    monkeypatch.setattr(importlib.import_module("measuring"), "RESULTS", tmp_path)
    monkeypatch.setattr(module, "WAYS", {way: keys for way, keys in module.WAYS.items() if "compiled" not in way})
    return module


def test_a_tiny_step_is_measured_in_every_way(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gpu.main(["--size", "tiny", "--repeats", "1", "--parts", "batch"])
    (path,) = tmp_path.glob("gpu-*.json")
    record = json.loads(path.read_text())["parts"]
    ways = [(row["way"], row["checkpointing"]) for row in record["targets"]["rows"]]
    assert ways == [(way, mode) for way in ("lean kernels", "all of the last layers") for mode in ("none", "full")]
    losses = [row["loss"] for row in record["targets"]["rows"]]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-3)
    assert all(row["step"] > row["without_encoders"] > 0 for row in record["targets"]["rows"])
    assert [row["batch"] for row in record["batch"]["rows"]] == [1, 2, 4]
    assert "| lean kernels | none |" in capsys.readouterr().out


def test_full_size_wants_a_gpu(gpu: ModuleType, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA GPU; --size tiny takes the same way on this machine" in capsys.readouterr().err
