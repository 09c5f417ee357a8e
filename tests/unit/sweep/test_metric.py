"""Protects how a sweep reads a metric from a file that a run is writing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from theworld_train.sweep.metric import MetricReader, final_value


def line(step: int, value: float, metric: str = "eval/loss") -> str:
    return json.dumps({"step": step, metric: value}) + "\n"


@pytest.fixture
def reader(tmp_path: Path) -> MetricReader:
    return MetricReader(tmp_path / "metrics.jsonl", "eval/loss")


def test_values_are_read_once_and_whole(reader: MetricReader):
    assert reader.new() == []
    torn = line(3, 0.25)
    reader.path.write_text(line(1, 2.0) + line(1, 9.0, "train/loss") + "no json\n" + line(2, 1.0) + torn[:9])
    assert reader.new() == [(1, 2.0), (2, 1.0)]
    assert reader.new() == []
    with reader.path.open("a") as file:
        file.write(torn[9:])
    assert reader.new() == [(3, 0.25)]
    assert final_value(reader) == (0.25, None)


def test_a_file_that_is_written_anew_is_read_from_its_start(reader: MetricReader):
    reader.path.write_text(line(1, 2.0) + line(2, 1.0))
    reader.new()
    other = reader.path.with_suffix(".new")
    other.write_text(line(1, 2.0) + line(2, 1.5) + line(3, 1.2))
    other.replace(reader.path)
    assert reader.new()[-1] == (3, 1.2)


def test_a_run_without_its_metric_has_no_value(reader: MetricReader):
    reader.path.write_text(line(1, 2.0, "eval/los"))
    assert final_value(reader) == (None, "the run wrote no eval/loss; did you mean 'eval/los'?")
    reader.path.write_text('{"step": 4, "eval/loss": NaN}\n')
    assert final_value(MetricReader(reader.path, "eval/loss")) == (None, "eval/loss is nan at step 4")
