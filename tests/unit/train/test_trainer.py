"""The loop over optimizer steps: what surrounds it."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable

import pytest
from rich.console import Console

from theworld_train.assemble.run import train
from theworld_train.config.schema import RunConfig
from theworld_train.train.trainer import StepResult, Trainer


def test_no_step_waits_for_a_search_for_cycles_among_what_was_loaded(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
):
    step, frozen = Trainer.step, []

    def watched(trainer: Trainer, window: object) -> StepResult:
        frozen.append(gc.get_freeze_count())
        return step(trainer, window)

    monkeypatch.setattr(Trainer, "step", watched)
    train(run_config(), Console(file=io.StringIO()))
    assert len(frozen) == 2
    assert min(frozen) > 100_000, "modules and functions of the libraries alone are more"
    assert gc.get_freeze_count() == 0, "what a run leaves behind may be collected"
