"""Starts runs one after the other, each with ranks of its own that may be killed, and writes how they ended.

The ranks are forked from a process that has imported everything, so that a run takes about a second. What each has done
is in the run's directory: `oracle-R.jsonl` holds a line for each step, and `log-R.txt` what it has printed.

Usage: worker_forks.py LAUNCHES REPORT, where LAUNCHES is a JSON list of `Launched` without what has become of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from theworld_train.train.stopping import end_with_parent

#: Seconds after which a run that has not ended counts as never doing so.
PATIENCE_S = 120


class Oracle:
    """Breaks a rank as told, and writes the loss, the samples and a digest of the weights after each step."""

    def __init__(self, path: Path, rank: int, world_size: int, fault: dict[str, Any]) -> None:
        self.path, self.rank = path, rank
        self.fault = fault if fault and fault["rank"] % world_size == rank else {}
        self.step = self.calls = 0

    def install(self) -> None:
        from theworld_train.train.checkpoint import CheckpointWriter
        from theworld_train.train.stage import StageModule
        from theworld_train.train.trainer import Trainer

        step, forward, write = Trainer.step, StageModule.forward, CheckpointWriter.write

        def watched_step(trainer: Trainer, window: Any) -> Any:
            self.step, self.calls = window.step + 1, 0
            result = step(trainer, window)
            held = (trainer._engine.held(parameter) for parameter in trainer._stage.parameters())
            digest = hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in held)).hexdigest()
            ids = [name for batch in window.micro_batches for name in batch.sample_ids]
            row = {"step": self.step, "loss_hex": result.loss.hex(), "loss": result.loss, "ids": ids, "digest": digest}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if self.fault.get("how") == "crash" and self.step == self.fault["step"]:
                raise RuntimeError("the step has crashed")
            return result

        def watched_forward(stage: StageModule, *arguments: Any) -> Any:
            self.calls += stage.training
            if self.fault.get("how", "").startswith("SIG") and self.fault["step"] == self.step and self.calls == 2:
                self.break_down()
            return forward(stage, *arguments)

        def slow_write(writer: CheckpointWriter, done: int, *args: Any) -> Path:
            time.sleep(self.fault["seconds"] if self.fault.get("how") == "slow save" else 0)
            return write(writer, done, *args)

        Trainer.step = watched_step  # type: ignore[method-assign]
        StageModule.forward = watched_forward  # type: ignore[method-assign]
        CheckpointWriter.write = slow_write  # type: ignore[method-assign]

    def break_down(self) -> None:
        """Breaks in the second micro-batch of the step."""
        heartbeat = self.path.with_name("heartbeat") / f"rank-{self.rank}.json"
        here = {"step": self.step, "phase": "training"}
        while not (heartbeat.is_file() and here.items() <= json.loads(heartbeat.read_text()).items()):
            time.sleep(0.01)  # it comes from a thread
        os.kill(os.getpid(), getattr(signal, self.fault["how"]))


def be_rank(launched: dict[str, Any], rank: int, port: int) -> NoReturn:
    """Runs one rank by the command line, and ends as that does."""
    end_with_parent(signal.SIGKILL)
    processes, directory = launched["processes"], Path(launched["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    log = os.open(directory / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (rank, rank, processes, processes, "127.0.0.1", port)
        os.environ |= dict(zip(names, map(str, values), strict=True))
    from theworld_train.cli.app import main as command_line

    Oracle(directory / f"oracle-{rank}.jsonl", rank, processes, launched["fault"]).install()
    sys.argv = ["theworld-train", "train", launched["config"]]
    command_line()
    raise AssertionError("the command line returns by an exit code")


def launch(launched: dict[str, Any]) -> dict[str, Any]:
    """Forks the ranks of a run and returns their exit codes, and the seconds from the first end to the last."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {}
    for rank in range(launched["processes"]):
        ranks[os.fork()] = rank
        if 0 in ranks:
            be_rank(launched, rank, port)
    codes: dict[int, int] = {}
    started, ends = time.monotonic(), []
    stopped = launched["fault"].get("how") == "SIGSTOP"
    while len(codes) < len(ranks):
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            codes[ranks[process]] = os.waitstatus_to_exitcode(status)
            ends.append(time.monotonic())
        elif time.monotonic() - started > PATIENCE_S or (stopped and len(codes) == len(ranks) - 1):
            for process in ranks.keys() - {own for own, rank in ranks.items() if rank in codes}:
                os.kill(process, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return {"codes": [codes[rank] for rank in sorted(codes)], "spread_s": ends[-1] - ends[0]}


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import theworld_train.assemble.run  # noqa: F401 (what the forked ranks need)

    launches, report = Path(sys.argv[1]), Path(sys.argv[2])
    ended = [item | launch(item) for item in json.loads(launches.read_text())]
    report.write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
