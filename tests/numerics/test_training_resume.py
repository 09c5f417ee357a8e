"""Ten steps straight are five steps, an end, and five more steps: bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.checkpoint_files import file_sha256, verify_checkpoint
from theworld_train.config.schema import RunConfig
from theworld_train.train.trainer import Trainer

Shipped = Callable[..., RunConfig]
#: Four steps are an epoch, so the run is stopped and resumed in the second one, whose order differs from the first's.
SETTINGS: dict[str, Any] = {
    "training__max_steps": 10,
    "training__micro_batch_size": 2,
    "data__train__samples": 16,
    "evaluation__every_steps": 4,
}
ADAPTER: dict[str, Any] = {
    "trainable": {"world_projector": {"lr": 1e-3}, "language_model": {"lr": 1e-2, "adapter": "lora", "dropout": 0.1}}
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "projection": ("projection", {}),
    "vision": ("vision", {"training__gradient_checkpointing": "full"}),
    "language-bf16": ("language", {"precision": "bf16"}),
    "full": ("full", {"deterministic": True}),
    "adapter": ("language", ADAPTER),
    "adapter-8bit-bf16": ("language", ADAPTER | {"optimizer__name": "adamw_8bit", "precision": "bf16"}),
}


class KilledError(Exception):
    """Stands for whatever ends a run between two steps."""


@pytest.fixture(autouse=True)
def _kernels_as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends the next run after so many steps, as soon as the last one is in the metrics."""

    def arm(step: int) -> None:
        report = Trainer._report

        def report_and_die(trainer: Trainer, done: int, *args: Any) -> None:
            report(trainer, done, *args)
            if done == step:
                monkeypatch.setattr(Trainer, "_report", report)
                raise KilledError

        monkeypatch.setattr(Trainer, "_report", report_and_die)

    return arm


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def state(checkpoint: Path) -> dict[str, Any]:
    """Returns what a checkpoint holds: hashes of all weights and optimizer tensors, step and random states."""
    verify_checkpoint(checkpoint)
    weights = {path.name: file_sha256(path) for path in checkpoint.glob("*.safetensors")}
    return weights | json.loads((checkpoint / "state.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_straight_equals_stopped_and_resumed(
    case: str, shipped: Shipped, finish: Callable[..., Any], kill_after: Callable[[int], None], tmp_path: Path
):
    stage, extra = CASES[case]
    straight = finish(shipped(stage, tmp_path / "straight", **SETTINGS, **extra))
    stopped = shipped(stage, tmp_path / "resumed", checkpoint__every_steps=5, **SETTINGS, **extra)
    kill_after(7)
    with pytest.raises(KilledError):
        finish(stopped)
    assert sorted(path.name for path in (tmp_path / "resumed").glob("step-*")) == ["step-5"]
    torch.manual_seed(12345)  # the new process's random state, until the old one is restored
    resumed = finish(stopped.model_copy(update={"resume": "latest"}))
    assert [row["step"] for row in resumed.train] == list(range(1, 11)), "steps 6 and 7 are there once"
    assert [row["loss_hex"] for row in resumed.train] == [row["loss_hex"] for row in straight.train]
    assert timeless(resumed.train) == timeless(straight.train)
    assert timeless(resumed.eval) == timeless(straight.eval)
    assert [row["step"] for row in resumed.eval] == [4, 8, 10]
    expected, actual = state(straight.checkpoint), state(resumed.checkpoint)
    assert "optimizer.safetensors" in expected
    assert expected == actual
    for (name, first), second in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_dropout_goes_on_where_it_was(
    shipped: Shipped,
    write_small: Callable[..., TinyCheckpoint],
    finish: Callable[..., Any],
    kill_after: Callable[[int], None],
    tmp_path: Path,
):
    model = write_small(attention_dropout=0.2)
    settings = SETTINGS | {"model__base": model.gemma, "model__world__encoder": model.cosmos}
    settings |= {"model__attention": "sdpa"}  # attention in blocks has no dropout
    straight = finish(shipped("language", tmp_path / "straight", **settings))
    again = finish(shipped("language", tmp_path / "seed", seed=1, **settings))
    assert again.train[0]["loss_hex"] != straight.train[0]["loss_hex"]
    stopped = shipped("language", tmp_path / "resumed", checkpoint__every_steps=5, **settings)
    kill_after(6)
    with pytest.raises(KilledError):
        finish(stopped)
    torch.manual_seed(12345)
    resumed = finish(stopped.model_copy(update={"resume": "latest"}))
    assert timeless(resumed.train) == timeless(straight.train)
    assert state(resumed.checkpoint) == state(straight.checkpoint)


def test_two_runs_of_one_config_are_equal(shipped: Shipped, finish: Callable[..., Any], tmp_path: Path):
    first, second = (finish(shipped("full", tmp_path / name)) for name in ("first", "second"))
    assert timeless(first.train) == timeless(second.train)
    assert state(first.checkpoint) == state(second.checkpoint)


def test_measuring_does_not_change_what_is_trained(shipped: Shipped, finish: Callable[..., Any], tmp_path: Path):
    settings = {"training__max_steps": 4}
    often = finish(shipped("vision", tmp_path / "often", evaluation__every_steps=1, **settings))
    never = finish(shipped("vision", tmp_path / "never", data__eval=None, **settings))
    assert len(often.eval) == 4
    assert not never.eval
    assert timeless(often.train) == timeless(never.train)
    assert state(often.checkpoint) == state(never.checkpoint)
