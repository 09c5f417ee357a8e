"""Unusable samples are written down once, counted over resumptions, and end a run that meets too many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from theworld_train.config.errors import ConfigError
from theworld_train.data import Dropped
from theworld_train.train.quarantine import Quarantine


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_sample_is_written_once(tmp_path: Path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, None, writes=True)
    quarantine.take([], 1)
    assert not path.exists()
    quarantine.take([Dropped("a", "damaged"), Dropped("b", "too long")], 2)
    quarantine.take([Dropped("a", "damaged")], 3)
    assert rows(path) == [
        {"id": "a", "reason": "damaged", "step": 2},
        {"id": "b", "reason": "too long", "step": 2},
    ]
    quarantine.check()


def test_a_run_ends_above_its_budget_also_when_it_is_resumed(tmp_path: Path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 1, writes=True).take([Dropped("a", "damaged")], 1)
    with path.open("a") as file:
        file.write('{"id": "cut o')
    for writes in (False, True):  # the same on every rank
        resumed = Quarantine(path, 1, writes=writes)
        assert not resumed.is_full
        resumed.take([Dropped("a", "damaged")], 2)
        assert not resumed.is_full
        resumed.take([Dropped("b", "damaged")], 3)
        assert resumed.is_full
        if writes:
            assert [line for line in path.read_text().splitlines() if '"b"' in line and line.startswith('{"id"')]
        with pytest.raises(ConfigError, match="2 different samples could not be used") as caught:
            resumed.check()
        assert caught.value.problems[0].key == "data.max_bad_samples"
        assert str(path) in (caught.value.problems[0].hint or "")


def test_nothing_is_kept_without_a_file():
    quarantine = Quarantine()
    quarantine.take([Dropped("a", "damaged")], 1)
    quarantine.check()
