"""Gates end a run where they say, remember what they have seen, and never act on what they do not read."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from theworld_train.assemble.run import train
from theworld_train.checkpoint_files import checkpoints
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig, TrainingSection
from theworld_train.train.gates import Gates
from theworld_train.train.metrics import read_metrics
from theworld_train.train.stopping import StoppedError
from theworld_train.train.trainer import StepResult, Trainer


def gates(state: dict[str, Any] | None = None, **sections: Any) -> Gates:
    return Gates(TrainingSection.model_validate({"max_steps": 100, **sections}), state)


def plateau(**values: Any) -> dict[str, Any]:
    return {"plateau": {"metric": "eval/loss", "mode": "min", "patience": 2, **values}}


def ended_after(judge: Gates, values: list[float], metric: str = "eval/loss") -> int | None:
    """Returns the number of values after which a run ends by its gates; None if it does not."""
    for number, value in enumerate(values, start=1):
        judge.observe({metric: value}, 10 * number)
        if judge.ending is not None:
            return number
    return None


# -- scripted metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "settings", "number"),
    [
        ([3.0, 2.0, 1.0, 0.9, 0.8], {}, None),
        ([3.0, 2.0, 2.0, 2.0, 0.0], {}, 4),
        ([3.0, 2.0, 2.5, 1.9, 2.5, 1.8], {}, None),
        ([3.0, 2.9, 2.8, 2.7], {"min_delta": 0.5}, 3),
        ([3.0, 2.8, 2.5, 2.4, 2.0], {"min_delta": 0.25}, None),
        ([0.1, 0.2, 0.3, 0.2, 0.3], {"mode": "max"}, 5),
        ([0.1, 0.2, 0.3, 0.2, 0.4], {"mode": "max"}, None),
        ([2.0, math.nan, math.nan], {}, 3),
        ([math.nan, 2.0, 2.0, 1.0], {}, None),
        ([2.0, 2.0], {"patience": 1}, 2),
    ],
)
def test_plateau_fires_after_its_patience_without_improvement(
    values: list[float], settings: dict[str, Any], number: int | None
):
    judge = gates(advance_when=plateau(**settings))
    assert ended_after(judge, values) == number
    if number is not None:
        assert judge.ending.by == "advance_when.plateau"


def test_plateau_says_what_it_waited_for():
    judge = gates(advance_when=plateau(min_delta=0.1))
    ended_after(judge, [3.0, 2.0, 1.95, 1.95])
    assert judge.ending.reason == (
        "eval/loss has not improved on 2 of step 20 by more than 0.1 in 2 measurements, to step 40"
    )


@pytest.mark.parametrize(
    ("threshold", "values", "number"),
    [
        ({"at_least": 0.9}, [0.5, 0.9, 0.1], 2),
        ({"at_most": 0.9}, [1.5, 0.95, 0.9], 3),
        ({"at_least": 0.9}, [0.5, math.nan, 0.89], None),
    ],
)
@pytest.mark.parametrize("section", ["advance_when", "stop_when"])
def test_threshold_fires_when_it_is_reached(
    section: str, threshold: dict[str, float], values: list[float], number: int | None
):
    judge = gates(**{section: {"threshold": {"metric": "eval/loss", **threshold}}})
    assert ended_after(judge, values) == number
    if number is not None:
        assert judge.ending.by == f"{section}.threshold"


@pytest.mark.parametrize(
    ("budget", "steps"), [({"steps": 3}, 3), ({"tokens": 250}, 3), ({"supervised_tokens": 21}, 3), ({"steps": 9}, None)]
)
def test_budget_is_counted_over_steps(budget: dict[str, int], steps: int | None):
    judge, ended = gates(advance_when=budget), None
    for step in range(1, 6):
        judge.count(step, tokens=100, supervised=10)
        if judge.ending is not None and ended is None:
            ended = step
    assert ended == steps
    if steps:
        assert judge.ending.by == f"advance_when.{next(iter(budget))}"


def test_good_enough_comes_before_anything_else_that_holds():
    both = {"threshold": {"metric": "eval/loss", "at_most": 1.0}}
    judge = gates(advance_when={**both, "steps": 1}, stop_when=both)
    judge.count(1, tokens=1, supervised=1)
    assert judge.ending.by == "advance_when.steps"
    judge.observe({"eval/loss": 0.5}, 1)
    assert judge.ending.by == "stop_when.threshold"


def test_without_gates_nothing_ends_a_run():
    judge = gates()
    judge.count(1, tokens=10**9, supervised=10**9)
    assert ended_after(judge, [1.0] * 50) is None
    assert judge.metrics == ()


def test_metric_that_no_evaluation_measures_is_refused_with_the_nearest():
    judge = gates(stop_when={"threshold": {"metric": "eval/predicted/digits", "at_least": 1.0}})
    with pytest.raises(ConfigError, match="did you mean 'eval/predicted/digit'"):
        judge.refuse_unknown({"eval/loss": 1.0, "eval/predicted/digit": 1.0})


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(6))
def test_memory_of_a_checkpoint_goes_on_exactly(cut: int):
    values = [3.0, 2.0, 2.5, 1.9, 2.5, 2.6]
    judge = gates(advance_when=plateau(min_delta=0.05))
    assert ended_after(judge, values[:cut]) is None
    resumed = gates(json.loads(json.dumps(judge.state())), advance_when=plateau(min_delta=0.05))
    assert resumed.state() == judge.state()
    rest = ended_after(resumed, values[cut:])
    assert rest == 6 - cut


def test_memory_of_another_plateau_is_not_taken_over():
    judge = gates(advance_when=plateau())
    ended_after(judge, [1.0, 2.0])
    changed = gates(judge.state(), advance_when=plateau(min_delta=0.5))
    assert ended_after(changed, [5.0, 5.0]) is None, "5.0 is the first that it has seen"
    patient = gates(judge.state(), advance_when=plateau(patience=3))
    assert ended_after(patient, [2.0, 2.0]) == 2, "it has waited once already, and the best is still 1.0"


def test_gate_that_has_held_holds_until_it_is_another():
    judge = gates(advance_when=plateau())
    assert ended_after(judge, [1.0, 2.0, 2.0]) == 3
    assert gates(judge.state(), advance_when=plateau()).ending == judge.ending
    assert gates(judge.state(), advance_when=plateau(patience=3)).ending is None
    assert gates(judge.state()).ending is None


# -- real runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(run_config: Callable[..., RunConfig]) -> Callable[..., dict[str, Any]]:
    """Trains the tiny model for eight steps at most and returns `result.json`."""

    def go(every: int = 2, saved: int | None = None, resume: str | None = None, **gate: Any) -> dict[str, Any]:
        config = run_config(
            training={"max_steps": 8, "global_batch_size": 4, "micro_batch_size": 4, **gate},
            evaluation={"every_steps": every, "max_samples": 4},
            checkpoint={"every_steps": saved},
            resume=resume,
        )
        train(config, Console(file=io.StringIO()))
        result: dict[str, Any] = json.loads((Path(config.output_dir) / "result.json").read_text())
        return result

    return go


NEVER_BETTER = {"metric": "eval/loss", "mode": "min", "patience": 2, "min_delta": 1e6}


def test_plateau_ends_a_run_with_a_sealed_checkpoint_and_a_result(run: Callable[..., Any], tmp_path: Path):
    result = run(advance_when={"plateau": NEVER_BETTER})
    assert (result["steps"], result["ended_by"]) == (6, "advance_when.plateau")
    assert "2 measurements, to step 6" in result["reason"]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-6"] == [result["checkpoint"]]
    rows = read_metrics(tmp_path / "run/metrics.jsonl", "train")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert result["tokens"] == sum(row["train/tokens"] for row in rows)
    assert result["supervised_tokens"] == sum(row["train/supervised_tokens"] for row in rows)


def test_gate_that_never_fires_changes_nothing(run: Callable[..., Any], tmp_path: Path):
    result = run(advance_when={"plateau": {**NEVER_BETTER, "patience": 50}})
    assert (result["steps"], result["ended_by"], result["reason"]) == (8, "max_steps", "all 8 steps are done")
    rates = [row["lr/world_projector"] for row in read_metrics(tmp_path / "run/metrics.jsonl", "train")]
    assert len(set(rates)) == 8, "the schedule went to its end"


def test_budget_of_tokens_ends_a_run_which_is_measured_there(run: Callable[..., Any], tmp_path: Path):
    result = run(every=4, advance_when={"tokens": 1})
    assert (result["steps"], result["ended_by"]) == (1, "advance_when.tokens")
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl", "eval")] == [1]


def test_good_enough_at_the_end_is_said_too(run: Callable[..., Any]):
    result = run(every=8, stop_when={"threshold": {"metric": "eval/loss", "at_most": 1e6}})
    assert (result["steps"], result["ended_by"]) == (8, "stop_when.threshold")


@pytest.mark.parametrize(
    ("stop_at", "saved"),
    [(3, None), (6, None), (5, 2), (6, 3)],
    ids=["stopped", "stopped-after-an-evaluation", "saved-with-evaluations", "saved-between-them"],
)
def test_run_that_was_broken_off_ends_at_the_same_step(
    run: Callable[..., Any], stop_at: int, saved: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped by a signal, which saves, or killed, so that it goes on from a checkpoint that has missed evaluations."""
    step = Trainer.step

    def broken(trainer: Trainer, window: Any) -> StepResult:
        if window.step == stop_at:
            raise StoppedError(stop_at) if saved is None else KeyboardInterrupt
        return step(trainer, window)

    gate = {"advance_when": {"plateau": {**NEVER_BETTER, "patience": 3}}}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", broken)
        with pytest.raises((StoppedError, KeyboardInterrupt)):
            run(saved=saved, **gate)
    result = run(saved=saved, resume="latest", **gate)
    assert (result["steps"], result["ended_by"]) == (8, "advance_when.plateau")
    measured = [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl", "eval")]
    assert measured == [2, 4, 6, 8], "each once"


@pytest.mark.parametrize(
    ("gate", "measured"), [({"advance_when": {"plateau": NEVER_BETTER}}, [2, 4, 6]), ({}, [2, 4, 6, 8])]
)
def test_run_killed_between_its_last_evaluation_and_its_result_ends_where_it_did(
    run: Callable[..., Any], tmp_path: Path, gate: dict[str, Any], measured: list[int]
):
    first = run(**gate)
    (tmp_path / "run/result.json").unlink()
    assert run(resume="latest", **gate) == first
    rows = read_metrics(tmp_path / "run/metrics.jsonl", "eval")
    assert [row["step"] for row in rows] == measured, "each once"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[[int], None]]:
    """Sends SIGTERM to the run in the midst of the evaluation of a step; what it does not note ends it there."""
    evaluate = Trainer._evaluate

    def tell(step: int) -> None:
        def with_signal(trainer: Trainer, done: int) -> None:
            if done == step:
                os.kill(os.getpid(), signal.SIGTERM)
            evaluate(trainer, done)

        monkeypatch.setattr(Trainer, "_evaluate", with_signal)

    def end(*_: object) -> None:
        raise AssertionError("the signal has ended the run at once")

    before = signal.signal(signal.SIGTERM, end)
    yield tell
    signal.signal(signal.SIGTERM, before)


def test_signal_during_the_last_evaluation_of_a_run_that_a_gate_has_ended_is_too_late(
    run: Callable[..., Any], told: Callable[[int], None]
):
    told(1)
    result = run(every=4, advance_when={"tokens": 1})
    assert (result["steps"], result["ended_by"]) == (1, "advance_when.tokens")
    assert result["eval"] is not None


def test_signal_during_the_evaluation_that_a_resumed_run_begins_with_stops_it_after_it(
    run: Callable[..., Any], told: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gate = {"advance_when": {"plateau": {**NEVER_BETTER, "patience": 9}}}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(saved=2, **gate)
    told(2)
    with pytest.raises(StoppedError, match="after step 2"):
        run(saved=2, resume="latest", **gate)
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl", "eval")] == [2]


def test_kind_that_no_held_out_sample_has_is_refused_before_the_model_loads(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("theworld_train.assemble.run.prepare", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match="no held-out sample is of the kind 'digits'; did you mean 'digit'"):
        run(stop_when={"threshold": {"metric": "eval/predicted/digits", "at_least": 0.5}})
