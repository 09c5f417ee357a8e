"""Directories as runs, pipelines and sweeps leave them, written by hand: what a report reads, without training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from theworld_train.accounting.ledger import LedgerRow, ParameterLedger
from theworld_train.config.sources import MovingDigitsSource

DATA = MovingDigitsSource(source="moving_digits", split="eval", samples=8).model_dump(mode="json")
KINDS = ("direction", "digit")


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# -- a run ------------------------------------------------------------------------------------------------------------


def config(name: str, directory: Path, **training: Any) -> dict[str, Any]:
    return {
        "name": name,
        "output_dir": str(directory),
        "precision": "bf16",
        "init_from": None,
        "model": {"base": "tiny/gemma"},
        "trainable": {"vision_tower": {"lr": 1e-3}, "world_projector": {"lr": 5e-4}},
        "data": {"train": {**DATA, "split": "train"}, "eval": DATA},
        "training": {"max_steps": 40, "global_batch_size": 16, "micro_batch_size": 8, "gradient_clip_norm": 1.0}
        | training,
    }


def step_row(step: int, shift: float = 0.0) -> dict[str, Any]:
    """Returns what a run writes of an optimizer step."""
    loss = 0.4 + shift + 3.6 * math.exp(-step / 9) + 0.06 * math.sin(step * 2.1)
    return {
        "event": "train",
        "step": step,
        "train/loss": loss,
        "train/grad_norm": 0.6 + 2.4 / step,
        "train/grad_norm/vision_tower": 0.4 + 1.6 / step,
        "train/grad_norm/world_projector": 0.2 + 1.2 / step,
        "train/weight_norm/vision_tower": 21.0 + step / 50,
        "train/weight_norm/world_projector": 3.0 + step / 20,
        "train/supervised_tokens": 64,
        "train/tokens": 1500,
        "time/tokens_per_s": 1500 / 0.3,
        "train/padding_share": 0.25,
        "train/trimmed": int(step == 4),
        "train/skipped": 0.0,
        "time/step_s": 0.3 + 0.02 * math.sin(step),
        "time/data_wait_s": 0.004,
        "data/share/clips": 0.7,
        "data/share/images": 0.3,
        "lr/vision_tower": 1e-3 * min(1.0, step / 8),
        "lr/world_projector": 5e-4 * min(1.0, step / 8),
        "loss_hex": loss.hex(),
        "dropped": ["damaged-3"] if step == 7 else [],
    }


def eval_row(step: int) -> dict[str, Any]:
    part = step / 50
    shares = {"": part, "/direction": part + 0.1, "/digit": part - 0.1}
    return {
        "event": "eval",
        "step": step,
        "eval/loss": 2.2 - part,
        **{f"eval/loss{kind}": 2.2 - value for kind, value in shares.items()},
        **{f"eval/predicted{kind}": value for kind, value in shares.items()},
        **{f"eval/correct{kind}": value * 0.9 for kind, value in shares.items()},
        **{f"eval/exact{kind}": value * 0.8 for kind, value in shares.items()},
        "eval/dropped": 0,
    }


def metrics(steps: int = 40, shift: float = 0.0) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`, with two launches, a skipped step and one that stands out."""
    rows: list[dict[str, Any]] = [{"event": "start", "step": 0, "ranks": 2, "device": "NVIDIA H100 80GB HBM3"}]
    for step in range(1, steps + 1):
        row = step_row(step, shift)
        if step == 12:
            row |= {"train/loss": math.nan, "train/grad_norm": math.inf, "train/skipped": 1.0}
        if step == 25:
            row |= {"train/loss": 6.5, "suspects": ["clip-17", "clip-18"]}
        rows.append(row)
        if step % 10 == 0:
            rows.append(eval_row(step))
        if step == 20:
            rows.append({"event": "start", "step": 20, "ranks": 2, "device": "NVIDIA H100 80GB HBM3"})
    return rows


RESOURCES = {
    "event": "resources",
    "step": 40,
    "ranks": 2,
    "device": "NVIDIA H100 80GB HBM3",
    "positions": 2000,
    "supervised": 64,
    "memory/peak_bytes": 21 * 2**30,
    "memory/planned_bytes": 20 * 2**30,
    "memory/measured_over_planned": 1.05,
    "time/step_s": 0.3,
    "time/data_wait_share": 0.013,
    "time/planned_step_s/best": 0.2,
    "time/planned_step_s/expected": 0.28,
    "time/planned_step_s/worst": 0.4,
    "time/measured_over_planned": 1.07,
}


def ledger_row(component: str, total: int, lr: float | None) -> LedgerRow:
    trainable = 0 if lr is None else total
    return LedgerRow(
        component,
        total,
        trainable,
        parts={"all": total},
        dtypes={"bfloat16" if lr is None else "float32": total},
        ties=(),
        lr=lr,
        weight_decay=None if lr is None else 0.01,
        decayed=trainable,
        weight_bytes=2 * total,
        master_bytes=4 * trainable,
        gradient_bytes=4 * trainable,
        optimizer_bytes=8 * trainable,
    )


LEDGER = ParameterLedger(
    (
        ledger_row("vision_tower", 417_000_000, 1e-3),
        ledger_row("language_model", 3_883_000_000, None),
        ledger_row("world_projector", 43_520, 5e-4),
    ),
    total=4_300_043_520,
).to_dict()


def share(right: int, of: int) -> dict[str, Any]:
    value = right / of
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "right": right, "count": of}


def measured(right: int, of: int, loss: float) -> dict[str, Any]:
    return {
        "samples": of,
        "loss": {"value": loss, "low": loss - 0.05, "high": loss + 0.05, "count": 4 * of},
        "predicted": share(right, of),
        "exact": share(right - 1, of),
        "normalized": share(right, of),
        "correct": share(right, of),
    }


def answer(index: int, said: str | None = "right") -> dict[str, Any]:
    """Returns the record of an answer; sample `index` of DATA has that id."""
    kind = KINDS[index % 2]
    return {
        "index": index,
        "id": f"moving-digits-eval-{index}",
        "kind": kind,
        "question": "In which direction does the digit move?" if kind == "direction" else "Which digit is it?",
        "expected": "right" if kind == "direction" else "7",
        "answer": said,
        "correct": said == "right" and kind == "direction",
        "loss": 0.31,
        "tokens": 2,
        "media": [{"type": "video", "message": 0, "part": 0}],
    }


def evaluation(name: str, directory: Path) -> dict[str, Any]:
    def result(description: str, right: int, loss: float, said: str) -> dict[str, Any]:
        kinds = {kind: measured(right // 2, 50, loss) for kind in KINDS}
        answers = [answer(index, said) for index in range(8)]
        total = measured(right, 100, loss)
        return {"description": description, "dropped": 0, "total": total, "kinds": kinds, "answers": answers}

    return {
        "format": 1,
        "run": name,
        "checkpoint": {"path": str(directory / "step-40"), "step": 40, "manifest_sha256": "0" * 64},
        "data": DATA,
        "max_new_tokens": 8,
        "confidence": 0.95,
        "metrics": {"direction": {"metric": "exact"}, "digit": {"metric": "numeric", "tolerance": 0.0}},
        "ablations": {
            "as_trained": result("as trained", 88, 0.41, "right"),
            "world_masked": result("world tokens masked", 42, 1.7, "left"),
        },
    }


def record(name: str, directory: Path) -> dict[str, Any]:
    launch = {
        "step": 0,
        "started": "2026-11-21T21:03:38Z",
        "git": {"commit": "b0cc46d6a3" * 4, "branch": "main", "dirty": True},
        "versions": {"python": "3.12.3", "torch": "2.10.0", "transformers": "5.5.0"},
        "hardware": {"device": "cuda", "ranks": 2, "nodes": 1, "cpus": 32, "memory_bytes": 2**38, "cuda": "13.0"},
    }
    resumed = {**launch, "step": 20, "started": "2026-11-21T22:10:02Z"}
    return {
        "format": 1,
        "id": "3f9a0c1e",
        "name": name,
        "config": config(name, directory),
        "ledger": LEDGER,
        "plan": None,
        "trackers": {},
        "launches": [launch, resumed],
    }


def write_run(directory: Path, name: str = "projection", shift: float = 0.0, **training: Any) -> Path:
    """Writes the directory of a complete run that was resumed once."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config(name, directory, **training)))
    write_lines(directory / "metrics.jsonl", [*metrics(shift=shift), RESOURCES])
    write_json(directory / "run.json", record(name, directory))
    write_json(directory / "evaluation.json", evaluation(name, directory))
    write_lines(directory / "quarantine.jsonl", [{"id": "damaged-3", "reason": "no image", "step": 7}])
    write_json(directory / "step-40" / "manifest.json", {})
    write_json(directory / "step-40" / "ledger.json", LEDGER)
    result = {"steps": 40, "trainable": 417_043_520, "first_loss": 3.6, "last_loss": 0.46}
    gate = {"ended_by": "advance_when.plateau", "reason": "eval/loss has not fallen by 0.01 for 3 measurements"}
    write_json(directory / "result.json", result | gate)
    return directory


# -- a pipeline -------------------------------------------------------------------------------------------------------


def journal(stages: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a journal: the first stage was killed once, and after the second the others were skipped."""
    rows: list[dict[str, Any]] = []

    def time() -> str:
        return f"2026-11-21T21:{len(rows):02d}:38+00:00"

    def note(stage: str, state: str, attempt: int, reason: str | None = None, exit_code: int | None = None) -> None:
        event = {"event": "stage", "stage": stage, "state": state, "attempt": attempt}
        rows.append({"time": time(), **event, "reason": reason, "exit_code": exit_code})

    begin = {"event": "run", "format": 1, "pipeline": "progressive", "stages": list(stages), "host": "node1", "pid": 7}
    rows.append({"time": time(), **begin})
    note(stages[0], "running", 1)
    note(stages[0], "failed", 1, "signal 9", 137)
    note(stages[0], "running", 2)
    note(stages[0], "complete", 2, "plateau", 0)
    note(stages[1], "running", 1)
    note(stages[1], "complete", 1, None, 0)
    for name in stages[2:]:
        note(name, "skipped", 0, "stop_when: eval/correct is at least 0.8")
    return rows


def write_pipeline(directory: Path) -> Path:
    """Writes the directory of a pipeline of which two stages have run and two were skipped."""
    stages = ("projection", "vision", "language", "full")
    write_lines(directory / "journal.jsonl", journal(stages))
    write_run(directory / "projection", "projection", 0.5)
    write_run(directory / "vision", "vision")
    states = ("complete", "complete", "skipped", "skipped")
    rows = [{"name": name, "state": state} for name, state in zip(stages, states, strict=True)]
    write_json(directory / "summary.json", {"pipeline": "progressive", "stages": rows})
    return directory


# -- a sweep ----------------------------------------------------------------------------------------------------------

LR, WARMUP, PROJECTION = "trainable.world_projector.lr", "schedule.warmup_steps", "model.world.projection"


def trial(number: int, state: str = "complete") -> dict[str, Any]:
    lr = 10 ** (-4 + 2 * ((number * 0.618) % 1))
    projection = ("linear", "mlp")[number % 2]
    value = 0.4 + 0.3 * abs(math.log10(lr) + 2.8) + (0.1 if projection == "linear" else 0.0)
    told = {"does_not_fit": "31.2 GiB planned, 24 GiB there", "failed": "exit code 1", "pruned": "above the median"}
    return {
        "number": number,
        "state": state,
        "reason": told.get(state),
        "value": value if state == "complete" else None,
        "values": {LR: lr, WARMUP: (number * 7) % 20, PROJECTION: projection},
        "intermediate": [[step, value + 8 / step] for step in (10, 20, 30)] if state in ("complete", "pruned") else [],
        "directory": f"trials/{number:04d}",
        "exit_code": {"complete": 0, "failed": 1}.get(state),
        "log_tail": ["Traceback (most recent call last):", "ValueError: <no>"] if state == "failed" else [],
        "launches": int(state != "does_not_fit"),
        "started": "2026-11-21T21:03:38.000+00:00",
        "ended": "2026-11-21T21:04:38.000+00:00",
        "seconds": None if state == "does_not_fit" else 60.0 + number,
    }


def sweep() -> dict[str, Any]:
    states = {3: "pruned", 5: "does_not_fit", 8: "failed"}
    trials = [trial(number, states.get(number, "complete")) for number in range(12)]
    best = min((each for each in trials if each["value"] is not None), key=lambda each: each["value"])
    return {
        "format": 1,
        "name": "rates",
        "kind": "run",
        "base": "base/config.yaml",
        "search": "tpe",
        "seed": 0,
        "metric": "eval/loss",
        "stage": None,
        "direction": "minimize",
        "pruner": "median",
        "trials_wanted": 12,
        "space": {
            LR: {"min": 1e-4, "max": 1e-2, "log": True, "step": None},
            WARMUP: {"min": 0, "max": 20, "log": False, "step": 1},
            PROJECTION: {"values": ["linear", "mlp"]},
        },
        "trials": trials,
        "best": best["number"],
        "importance": {LR: 0.71, PROJECTION: 0.21, WARMUP: 0.08},
    }


def write_sweep(directory: Path) -> Path:
    """Writes the directory of a sweep of twelve trials, one pruned, one that does not fit and one that failed."""
    summary = sweep()
    write_json(directory / "sweep.json", summary)
    (directory / "base").mkdir()
    (directory / "base" / "config.yaml").write_text(yaml.safe_dump(config("base", directory)))
    own = directory / "trials" / f"{summary['best']:04d}"
    own.mkdir(parents=True)
    (own / "config.yaml").write_text(yaml.safe_dump(config("best", own)))
    return directory
