"""Ranks that are killed or stopped in the middle of a step: the others end, and what goes on is the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import ROOT, settings
from tests.helpers.tiny import TinyCheckpoint
from theworld_train.checkpoint_files import checkpoints, verify_checkpoint
from theworld_train.config import dump_config, parse_run_config
from theworld_train.train.watchdog import STUCK

WORKER = Path(__file__).with_name("worker_forks.py")
#: Seconds within which a rank ends that loses another one; on an idle machine it takes 1.5.
LIMIT_S = 20
#: Of a run whose rank is stopped.
TIMEOUT_S = 2
#: Must never be found in what a run leaves behind.
SECRETS = {"WANDB_API_KEY": "canary-0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_canarycanarycanary"}
#: Step and rank of each kill; a checkpoint is written after every second step.
CYCLES = ((2, 0), (3, 1), (6, 1), (7, 0), (9, 1))
STEPS = 10
#: Ends a run after 7 of its steps, as no loss is better than the first one by so much.
PLATEAU = {"metric": "train/loss", "mode": "min", "patience": 6, "min_delta": 1e6}
#: Of a run that goes on with another number of ranks, and where it does so.
LONG, MIDDLE = 50, 25

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="ends its ranks with itself by way of the kernel"),
]


@dataclass(frozen=True)
class Launched:
    """A run in processes of its own, and what has become of it.

    Attributes:
        name: Of the launch.
        directory: Of the run, which several launches may continue.
        processes: Ranks.
        config: Its file.
        fault: What breaks on a `rank`, and `how`: by a signal in the second micro-batch of a `step`, by a `crash` after
            it, or by a `slow save` that takes some `seconds`.
        codes: Exit code of each rank.
        spread_s: Seconds from the first rank's end to the last one's.
    """

    name: str
    directory: str
    processes: int
    config: str
    fault: dict[str, Any]
    codes: list[int] = field(default_factory=list)
    spread_s: float = 0.0


class Launches:
    """Runs that are to be launched, and then the runs that were."""

    def __init__(self, tiny: TinyCheckpoint, root: Path) -> None:
        self.tiny, self.root = tiny, root
        self._planned: list[Launched] = []
        self.ended: dict[str, Launched] = {}

    def add(self, name: str, run: str, processes: int, fault: dict[str, Any] | None = None, **sections: Any) -> None:
        values = settings(self.tiny, self.root / run, STEPS) | {"checkpoint": {"every_steps": 2, "keep_last": 9}}
        values["data"]["train"] |= {"frames": 1, "canvas": 32}
        values["training"] |= {"micro_batch_size": 1} | sections.pop("training", {})
        path = self.root / f"{name}.yaml"
        path.write_text(dump_config(parse_run_config(values | {"name": run, "resume": "latest"} | sections)))
        self._planned.append(Launched(name, str(self.root / run), processes, str(path), fault or {}))

    def launch(self) -> None:
        plan, report = self.root / "launches.json", self.root / "report.json"
        plan.write_text(json.dumps([asdict(item) for item in self._planned]))
        environment = os.environ | SECRETS | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, str(WORKER), str(plan), str(report)]
        subprocess.run(command, env=environment, check=True, timeout=550)
        self.ended = {item["name"]: Launched(**item) for item in json.loads(report.read_text())}

    def rows(self, run: str, rank: int = 0) -> list[dict[str, Any]]:
        """What a rank has done, step by step; steps that were taken again are there again."""
        lines = (self.root / run / f"oracle-{rank}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def log(self, run: str, rank: int = 0) -> str:
        return (self.root / run / f"log-{rank}.txt").read_text()


@pytest.fixture(scope="module")
def launches(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """All of them, one after the other."""
    launches = Launches(tiny, tmp_path_factory.mktemp("deaths"))
    for ranks in (1, 2):
        launches.add(f"straight-{ranks}", f"straight-{ranks}", ranks)
        for cycle, (step, rank) in enumerate(CYCLES):
            fault = {"how": "SIGKILL", "step": step, "rank": rank % ranks}
            launches.add(f"killed-{ranks}-{cycle}", f"killed-{ranks}", ranks, fault)
        launches.add(f"killed-{ranks}-end", f"killed-{ranks}", ranks)
    stop = {"how": "SIGSTOP", "step": 3, "rank": 1}
    launches.add("stopped", "stopped", 2, stop, runtime={"timeout_s": TIMEOUT_S})
    launches.add("stopped-end", "stopped", 2)
    gated = {"training": {"advance_when": {"plateau": PLATEAU}}}
    launches.add("gated", "gated", 2, {"how": "SIGKILL", "step": 6, "rank": 1}, **gated)
    launches.add("gated-end", "gated", 2, **gated)
    slow = {"how": "slow save", "rank": 0, "seconds": 3}
    launches.add("slow", "slow", 2, slow, runtime={"timeout_s": 1}, checkpoint={})
    tracking = {"trackers": ["wandb", "tensorboard"]}
    launches.add("crashed", "crashed", 1, {"how": "crash", "rank": 0, "step": 3}, tracking=tracking)
    launches.launch()
    return launches


@pytest.fixture(scope="module")
def slow_launches(launches: Launches) -> Launches:
    """Those that take long, beside the others."""
    more = Launches(launches.tiny, launches.root)
    for ranks in (1, 2):
        background = {"checkpoint": {"every_steps": 2, "keep_last": 9, "background": True}}
        for cycle, (step, rank) in enumerate(CYCLES[::4]):
            fault = {"how": "SIGKILL", "step": step, "rank": rank % ranks}
            more.add(f"behind-{ranks}-{cycle}", f"behind-{ranks}", ranks, fault, **background)
        more.add(f"behind-{ranks}-end", f"behind-{ranks}", ranks, **background)
        more.add(f"long-{ranks}", f"long-{ranks}", ranks, training={"max_steps": LONG})
        fault = {"how": "SIGKILL", "step": MIDDLE + 1, "rank": 0}
        every = {"every_steps": MIDDLE}
        run = f"from-{ranks}-to-{3 - ranks}"
        more.add(f"{run}-begun", run, ranks, fault, training={"max_steps": LONG}, checkpoint=every)
        more.add(f"{run}-ended", run, 3 - ranks, training={"max_steps": LONG}, checkpoint=every)
    more.launch()
    more.ended |= launches.ended
    return more


@pytest.mark.parametrize("ranks", [1, 2])
def test_undisturbed_run_ends_well(launches: Launches, ranks: int):
    assert launches.ended[f"straight-{ranks}"].codes == [0] * ranks
    assert [row["step"] for row in launches.rows(f"straight-{ranks}")] == list(range(1, STEPS + 1))


def test_all_ranks_end_soon_after_one_is_killed(launches: Launches):
    for cycle, (_, rank) in enumerate(CYCLES):
        ended = launches.ended[f"killed-2-{cycle}"]
        assert ended.codes[rank] == -9
        assert ended.codes[1 - rank] == 1
        assert ended.spread_s < LIMIT_S


@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_leave_no_trace_in_the_curve(launches: Launches, ranks: int):
    assert_no_trace(launches, "killed", ranks)


def test_gate_ends_all_ranks_where_it_would_have_without_a_kill(launches: Launches):
    assert launches.ended["gated-end"].codes == [0, 0]
    result = json.loads((launches.root / "gated/result.json").read_text())
    assert (result["steps"], result["ended_by"]) == (7, "advance_when.plateau")
    for rank in range(2):
        rows = launches.rows("gated", rank)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 5, 6, 7], "step 5 was taken again"
        assert all(row == launches.rows("straight-2", rank)[row["step"] - 1] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_leave_no_trace_either_where_saves_are_written_meanwhile(slow_launches: Launches, ranks: int):
    assert_no_trace(slow_launches, "behind", ranks)


def assert_no_trace(launches: Launches, run: str, ranks: int) -> None:
    """Whatever step was taken again came to the same loss, samples and weights, on every rank."""
    assert launches.ended[f"{run}-{ranks}-end"].codes == [0] * ranks
    for rank in range(ranks):
        straight = {row["step"]: row for row in launches.rows(f"straight-{ranks}", rank)}
        killed = launches.rows(f"{run}-{ranks}", rank)
        assert {row["step"] for row in killed} == straight.keys()
        assert len(killed) > STEPS, "some steps were taken again"
        assert all(row == straight[row["step"]] for row in killed)
    first, second = (checkpoints(launches.root / f"{name}-{ranks}") for name in ("straight", run))
    assert [path.name for path in first] == [path.name for path in second]
    verify_checkpoint(second[-1])


def test_stopped_rank_is_noticed_and_described(launches: Launches):
    ended = launches.ended["stopped"]
    assert ended.codes == [STUCK, -9], "the stopped one ends when the launcher kills it"
    report = (launches.root / "stopped" / "stuck-step-3.txt").read_text()
    assert f"a rank has not moved within runtime.timeout_s ({TIMEOUT_S} s)" in report
    assert report in launches.log("stopped")
    own, other = (launches.rows("straight-2", rank)[2]["ids"] for rank in (0, 1))
    first, second = report.splitlines()[1:3]
    assert first.startswith("rank 0: training, step 3, last moved at ")
    assert first.endswith(f"samples {', '.join(own)}")
    assert f"samples {', '.join(other)} -- says nothing any more" in second
    assert "== stacks of rank 0" in report
    assert "in backward" in report, "where the main thread waits for the other rank"
    assert "== stacks of rank 1" not in report


def test_stopped_run_goes_on_as_if_it_had_not_been(launches: Launches):
    assert launches.ended["stopped-end"].codes == [0, 0]
    straight = {row["step"]: row for row in launches.rows("straight-2")}
    assert all(row == straight[row["step"]] for row in launches.rows("stopped"))


def test_save_that_takes_long_is_no_alarm(launches: Launches):
    assert launches.ended["slow"].codes == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_run_goes_on_with_another_number_of_ranks(slow_launches: Launches, ranks: int):
    run = f"from-{ranks}-to-{3 - ranks}"
    assert slow_launches.ended[f"{run}-ended"].codes == [0] * (3 - ranks)
    straight = global_rows(slow_launches, f"long-{ranks}", ranks)
    changed = global_rows(slow_launches, run, 2)
    assert list(straight) == list(changed) == list(range(1, LONG + 1))
    for step, (ids, loss) in straight.items():
        assert changed[step][0] == ids
        assert changed[step][1] == pytest.approx(loss, rel=1e-6)


def global_rows(launches: Launches, run: str, ranks: int) -> dict[int, tuple[list[str], float]]:
    """The samples of all ranks and the loss of each step, as it was taken last."""
    every = [{row["step"]: row for row in launches.rows(run, rank)} for rank in range(ranks)]
    return {
        step: (sorted(name for rows in every if step in rows for name in rows[step]["ids"]), row["loss"])
        for step, row in sorted(every[0].items())
    }


def test_secrets_are_in_nothing_that_broken_runs_leave(launches: Launches):
    assert launches.ended["crashed"].codes == [1]
    assert "the step has crashed" in launches.log("crashed")
    left = [path for path in launches.root.rglob("*") if path.is_file()]
    names = {path.name for path in left}
    assert {"metrics.jsonl", "config.yaml", "manifest.json", "rank-0.json", "stuck-step-3.txt", "log-0.txt"} <= names
    assert any(path.suffix == ".wandb" for path in left)
    assert any(path.name.startswith("events.out.tfevents") for path in left)
    for path in left:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path
