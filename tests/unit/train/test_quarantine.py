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
    quarantine = Quarantine(path)
    quarantine.take([], 1)
    assert not path.exists()
    quarantine.take([Dropped("a", "damaged"), Dropped("b", "too long")], 2)
    quarantine.take([Dropped("a", "damaged")], 3)
    expected = [{"id": "a", "reason": "damaged", "step": 2}, {"id": "b", "reason": "too long", "step": 2}]
    assert rows(path) == expected
    Quarantine(path).take([Dropped("b", "too long")], 9)
    assert rows(path) == expected, "not again when the run is resumed"
    quarantine.check()


def test_what_a_killed_run_has_half_written_stands_alone(tmp_path: Path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"id": "a", "reason": "damaged", "step": 1}\n{"id": "cut o')
    Quarantine(path).take([Dropped("a", "damaged"), Dropped("b", "damaged")], 2)
    lines = path.read_text().splitlines()
    assert lines[1] == '{"id": "cut o'
    assert json.loads(lines[2]) == {"id": "b", "reason": "damaged", "step": 2}
    Quarantine(path).take([Dropped("b", "damaged")], 3)
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("writes", [False, True])
def test_a_launch_ends_above_its_budget_on_every_rank_alike(writes: bool, tmp_path: Path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).take([Dropped("old", "damaged"), Dropped("older", "damaged")], 1)
    quarantine = Quarantine(path if writes else None, 1)
    quarantine.take([Dropped("a", "damaged"), Dropped("a", "damaged")], 2)
    assert not quarantine.is_full, "what was met before the run was mended and resumed does not count"
    quarantine.take([Dropped("b", "damaged")], 3)
    assert quarantine.is_full
    with pytest.raises(ConfigError, match="2 different samples could not be used") as caught:
        quarantine.check()
    assert caught.value.problems[0].key == "data.max_bad_samples"
    assert "allow_changed" in (caught.value.problems[0].hint or "")


def test_what_the_config_asks_to_drop_is_no_trouble(tmp_path: Path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 0)
    quarantine.take([Dropped("long", "does not fit", asked_for=True)], 1)
    quarantine.check()
    assert not path.exists()


def test_nothing_is_kept_without_a_file():
    quarantine = Quarantine()
    quarantine.take([Dropped("a", "damaged")], 1)
    quarantine.check()
