"""Protects the study: its points do not depend on who draws them, and it belongs to one directory."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.helpers.sweeps import write_sweep
from theworld_train.config import ConfigError, load_sweep_config
from theworld_train.sweep.launching import State
from theworld_train.sweep.opening import begin
from theworld_train.sweep.study import Claim, Study, open_storage

RANGES = {"optimizer.lr": {"min": 1e-4, "max": 1.0, "log": True}, "seed": {"min": 0, "max": 9}}
Open = Callable[..., Study]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the study of a sweep in a folder, as one more process would."""
    monkeypatch.chdir(tmp_path)

    def opened(folder: str = "one", **settings: Any) -> Study:
        path = write_sweep(tmp_path / folder, **settings)
        found = begin(load_sweep_config(path), str(path))
        return Study(found.sweep, found.directory, found.axes, found.wanted, found.run)

    return opened


#: Whoever drops a claim gives its trial back.
HELD: list[Claim] = []


def claim(study: Study) -> Claim:
    found = study.claim()
    assert isinstance(found, Claim)
    HELD.append(found)
    return found


def points(study: Study) -> list[dict[str, object]]:
    return [study.values_of(trial.params) for trial in study.trials()]


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_points_do_not_depend_on_who_draws_them(opened: Open, search: str):
    settings = {"space": RANGES, "search": search, "trials": 4, "seed": 3, "startup_trials": 2}
    alone = opened("alone", **settings)
    for _ in range(4):
        claim(alone)
    assert alone.claim() is None
    several = [opened("several", **settings) for _ in range(2)]
    taken = [claim(several[number % 2]).trial.number for number in range(4)]
    assert taken == list(range(4))
    assert points(several[0]) == points(alone)
    assert len({str(point) for point in points(alone)}) == 4
    other = opened("other", **settings | {"seed": 4})
    claim(other)
    assert points(other)[0] != points(alone)[0]


@pytest.mark.parametrize("search", ["random", "grid"])
def test_a_trial_whose_process_died_while_it_was_asked_for_is_drawn_as_it_would_have_been(opened: Open, search: str):
    space = RANGES if search == "random" else {"seed": {"values": [1, 2, 3]}}
    settings = {"space": space, "search": search, "trials": 3}
    whole, torn = opened("whole", **settings), opened("torn", **settings)
    claim(whole)
    torn._study._storage.create_new_trial(torn._study._study_id)  # killed here: neither a point nor a directory
    found = claim(torn)
    assert not found.is_new
    assert points(torn) == points(whole)
    claim(torn)
    claim(whole)
    assert points(torn) == points(whole)


def test_a_trial_is_taken_by_one(opened: Open):
    settings = {"space": RANGES, "search": "random", "trials": 2}
    one, other = opened(**settings), opened(**settings)
    first, second = claim(one), claim(other)
    assert {first.trial.number, second.trial.number} == {0, 1}
    assert one.claim() is None
    assert one.state_of(one.trials()[1]) == "running"
    second.lock.release()
    assert one.state_of(one.trials()[1]) == "interrupted"
    assert one.claim(left={1}) is None
    assert claim(one).trial.number == 1


def test_tpe_keeps_away_from_what_runs_out_of_memory(opened: Open):
    def bad_ones(state: State) -> int:
        """Says how often TPE goes beyond 50, where trials end in a state; the best one is just below."""
        study = opened(state, space={"seed": {"min": 0, "max": 99}}, search="tpe", trials=16, startup_trials=5)
        values = []
        for _ in range(16):
            found = claim(study)
            values.append(int(found.trial.params["seed"]))
            study.finish(found.trial, state if values[-1] >= 50 else "complete", {}, (49 - values[-1]) ** 2)
            found.lock.release()
        assert [study.state_of(trial) == state for trial in study.trials()] == [value >= 50 for value in values]
        return sum(value >= 50 for value in values[5:])

    assert 0 < bad_ones("out_of_memory") < bad_ones("failed")


def test_what_matters_is_found(opened: Open):
    study = opened(space=RANGES, search="random", trials=8)
    for number in range(8):
        if number in (3, 4):
            assert bool(study.importance()) is (number == 4)
        found = claim(study)
        study.finish(found.trial, "complete", {}, study.values_of(found.trial.params)["seed"])  # type: ignore[arg-type]
        found.lock.release()
    shares = study.importance()
    assert shares["seed"] > 0.7
    assert sum(shares.values()) == pytest.approx(1)


# -- the storage ------------------------------------------------------------------------------------------------------


def test_a_storage_by_url_belongs_to_one_directory(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    settings = {"space": RANGES, "search": "random", "trials": 3}
    claim(opened("one", storage=url, **settings))
    assert len(opened("one", storage=url, **settings).trials()) == 1
    with pytest.raises(ConfigError, match="holds a sweep of this name already"):
        opened("two", storage=url, **settings)
    monkeypatch.setenv("STUDY_URL", url)
    assert opened("two", storage="env:STUDY_URL", name="other", **settings).trials() == []
    assert url not in (tmp_path / "two" / "sweep" / "sweep.yaml").read_text()
    optuna.create_study(storage=url, study_name="third", direction="maximize")
    with pytest.raises(ConfigError, match="holds a sweep of this name already, which maximizes"):
        opened("three", storage=url, name="third", **settings)
    names = sqlite3.connect(tmp_path / "shared.db").execute("select study_name from studies").fetchall()
    assert names == [("scripted",), ("other",), ("third",)]


def test_a_journal_serves_several_processes(opened: Open):
    settings = {"space": RANGES, "search": "random", "trials": 2, "storage": "journal"}
    one, other = opened(**settings), opened(**settings)
    assert {claim(one).trial.number, claim(other).trial.number} == {0, 1}
    assert (one.directory / "study.journal").is_file()


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("sqllite", "expected sqlite, journal, env:NAME or a URL such as postgresql://host/database"),
        ("env:NO_SUCH_NAME", "the environment has no NO_SUCH_NAME"),
        ("postgresql+pg8000://me:hunter2@localhost:1/x", "needs the package pg8000"),
        ("nosuch://me:hunter2@localhost:1/x", "nosuch"),
        ("nosuch://localhost:1/x?user=me&password=hunter2", "nosuch"),
        ("http://[?password=hunter2", "storage"),
        ("sqlite:////no/such/folder/x.db", "cannot be reached: unable to open database file"),
        ("http://me:hunter2@[", "storage"),
    ],
)
def test_storages_that_cannot_be_opened(tmp_path: Path, storage: str, said: str):
    with pytest.raises(ConfigError) as error:
        open_storage(storage, tmp_path)
    assert said in str(error.value)
    assert "hunter2" not in str(error.value)


def test_optuna_numbers_trials_as_they_are_asked_for():
    """A canary: the grid takes its points by number, and a trial drawn again keeps what it has drawn."""
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"x": [1, 2, 3]}, seed=0))
    first = study.ask({"x": optuna.distributions.CategoricalDistribution([1, 2, 3])})
    assert first.number == 0
    again = optuna.trial.Trial(study, first._trial_id)
    assert again.suggest_categorical("x", [1, 2, 3]) == first.params["x"]
