"""A launcher of trials that trains nothing: it writes the metrics of its config's point, step by step, and can crash.

Usage: `python scripted_trial.py -m theworld_train train CONFIG`. It saves after every step, as a run with a checkpoint
at each step does, and goes on from there; on SIGTERM it ends after a step with exit code 75. What it does depends on
`schedule.warmup_steps`, its script.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

STEPS = 5
#: Seconds of a step.
STEP_S = float(os.environ.get("SCRIPTED_STEP_S", "0.03"))
#: Seconds that it takes to save and end after SIGTERM.
SAVE_S = float(os.environ.get("SCRIPTED_SAVE_S", "0"))
#: Values of `schedule.warmup_steps`, and what they make of a trial.
WELL, CRASHES, OUT_OF_MEMORY, SLOW, SILENT, STOPPED, UNFINISHED = range(7)


def value_at(step: int, rate: float, seed: int) -> float:
    """Returns the held-out loss after a step: smallest at a rate of 0.3, and a little larger with a larger seed."""
    return 1 + (rate - 0.3) ** 2 + seed / 100 + 1 / step


def main() -> None:
    config = yaml.safe_load(Path(sys.argv[-1]).read_text())
    directory = Path(config["output_dir"])
    directory.mkdir(parents=True, exist_ok=True)
    script, stops = config["schedule"]["warmup_steps"], []
    with (directory / "alone.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (directory / "run-twice").touch()
            raise
        if script == CRASHES:
            raise RuntimeError("the point is bad")
        if script == OUT_OF_MEMORY:
            print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
            raise SystemExit(1)
        if script == STOPPED and not (directory / "stopped").exists():
            (directory / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
        path = directory / "metrics.jsonl"
        done = len(path.read_text().splitlines()) if path.exists() else 0
        for step in range(done + 1, STEPS + 1):
            time.sleep(STEP_S * (30 if script == SLOW else 1))
            value = value_at(step, config["optimizer"]["lr"], config["seed"])
            row = {"step": step, "train/loss" if script == SILENT else "eval/loss": value}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if stops:
                time.sleep(SAVE_S)
                raise SystemExit(75)
        if script == UNFINISHED:
            return
        (directory / "result.json").write_text(json.dumps({"cuda_visible": os.environ.get("CUDA_VISIBLE_DEVICES")}))


if __name__ == "__main__":
    main()
