"""The loop over optimizer steps: what surrounds it."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from theworld_train.assemble.model import ledger_of
from theworld_train.assemble.record import new_launch
from theworld_train.assemble.run import train
from theworld_train.config.schema import RunConfig
from theworld_train.train.runtime import Runtime
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


def test_complete_run_that_is_extended_is_complete_no_more_until_it_ends_again(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    def trained(steps: int, **sections: Any) -> None:
        training = {"max_steps": steps, "global_batch_size": 4, "micro_batch_size": 4}
        train(run_config(training=training, **sections), Console(file=io.StringIO()))

    result = tmp_path / "run/result.json"
    trained(2)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(2, resume="latest")
        assert result.is_file(), "no step was left to be taken"
        with pytest.raises(KeyboardInterrupt):
            trained(3, resume="latest", allow_changed=["training.max_steps"])
        assert not result.exists()
    trained(3, resume="latest", allow_changed=["training.max_steps"])
    assert result.is_file()


def test_config_of_a_run_is_written_whole_or_not_at_all(
    run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("as it was")
    write = Path.write_text

    def torn(path: Path, text: str, *arguments: Any, **options: Any) -> int:
        if "config.yaml" in path.name:
            write(path, text[: len(text) // 2])
            raise KeyboardInterrupt
        return write(path, text, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(KeyboardInterrupt):
        train(run_config(), Console(file=io.StringIO()))
    assert (tmp_path / "run/config.yaml").read_text() == "as it was"


@pytest.mark.parametrize("is_main", [True, False])
def test_main_rank_alone_asks_git(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, *, is_main: bool
):
    asked = []
    monkeypatch.setattr("theworld_train.assemble.record.git_state", asked.append)
    monkeypatch.setattr(Runtime, "is_main", property(lambda _: is_main))
    config = run_config()
    with Runtime(config) as runtime:
        new_launch(config, ledger_of(config), runtime, 0)
    assert len(asked) == is_main
