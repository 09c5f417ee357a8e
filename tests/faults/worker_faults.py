"""Runs configs one after the other in one process group, breaks them as told, and writes what became of each.

A case is `NAME.yaml` and, beside it, `NAME.json` with the faults of each rank.

Usage: [torchrun ...] worker_faults.py REPORT_DIRECTORY CONFIG...
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from theworld_train.train.stopping import end_with_parent


class Faults:
    """What breaks on this rank in the run that is under way, and what its steps have taken."""

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.begin({})

    def begin(self, faults: dict[str, Any]) -> None:
        self.faults = faults
        self.step = self.taken = 0
        self.ids: dict[int, list[str]] = {}

    def here(self, name: str) -> bool:
        fault = self.faults.get(name, {})
        return fault.get("rank", self.rank) % self.world_size == self.rank and self.step in fault.get("steps", [])

    def signal(self) -> None:
        for name in self.faults["signal"]["signals"]:
            os.kill(os.getpid(), getattr(signal, name))

    def install(self) -> None:
        """Puts the faults into the trainer's way; steps count from 1."""
        from theworld_train.train.checkpoint import CheckpointWriter
        from theworld_train.train.stage import StageModule
        from theworld_train.train.trainer import Trainer

        step, forward, write = Trainer.step, StageModule.forward, CheckpointWriter.write

        def faulty_step(trainer: Trainer, window: Any) -> Any:
            self.step = window.step + 1
            if self.here("signal"):
                self.signal()
            result = step(trainer, window)
            self.taken = self.step
            self.ids[self.step] = [name for batch in window.micro_batches for name in batch.sample_ids]
            return result

        def faulty_forward(stage: StageModule, *args: Any) -> Any:
            output = forward(stage, *args)
            factor = float(self.faults["loss"]["factor"]) if self.here("loss") else 1.0
            return output._replace(loss_sum=output.loss_sum * factor)

        def faulty_write(writer: CheckpointWriter, done: int, *args: Any) -> Path:
            if done in self.faults.get("signal", {}).get("saves", []):
                self.signal()
            while done in self.faults.get("overtaken", []) and self.taken <= done:
                time.sleep(0.001)
            return write(writer, done, *args)

        Trainer.step = faulty_step  # type: ignore[method-assign]
        StageModule.forward = faulty_forward  # type: ignore[method-assign]
        CheckpointWriter.write = faulty_write  # type: ignore[method-assign]


def main() -> None:
    end_with_parent(signal.SIGKILL)  # the launcher, in whatever way it ends
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from rich.console import Console

    from theworld_train.assemble.run import train
    from theworld_train.config import load_run_config
    from theworld_train.train.runtime import Runtime

    faults = Faults()
    faults.install()
    close = Runtime.close
    Runtime.close = Runtime.abort = lambda runtime: None  # type: ignore[method-assign]
    report: dict[str, Any] = {}
    for path in map(Path, sys.argv[2:]):
        faults.begin(json.loads(path.with_suffix(".json").read_text()))
        ended = ["", ""]
        config = load_run_config(path)
        try:
            train(config, Console(file=io.StringIO()))
        except Exception as error:
            ended = [type(error).__name__, str(error)]
        report[path.stem] = {"ended": ended, "ids": faults.ids}
    (Path(sys.argv[1]) / f"rank-{faults.rank}.json").write_text(json.dumps(report))
    close(Runtime(config))


if __name__ == "__main__":
    main()
