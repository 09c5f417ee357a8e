"""The report of a profile as plain values: what `report.json` and `memory.json` hold."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from theworld_train.accounting.flops import StepWork
from theworld_train.memory.timeline import Peak, Timeline
from theworld_train.memory.tracker import CATEGORIES
from theworld_train.profiling.attribution import PARTS, PASSES
from theworld_train.profiling.steps import Profile

#: Operators that a report names.
TOP_OPERATIONS = 15


@dataclass(frozen=True)
class Planned:
    """What a plan says of the step whose storages were followed.

    Attributes:
        peak: Its moment of most memory.
        work: What it computes.
    """

    peak: Peak
    work: StepWork


#: Plans a step of a profile; products know nothing of each other, so the plan is handed in.
Plan = Callable[[Profile], Planned]


def describe(profile: Profile, planned: Planned | None) -> dict[str, Any]:
    """Returns the report.

    Args:
        profile: What the steps have shown.
        planned: What a plan says of them, if there is one.
    """
    training = profile.config.training
    (followed,) = profile.taken("followed")
    return {
        "name": profile.config.name,
        "environment": _environment(profile),
        "run": {
            "precision": profile.config.precision,
            "global_batch_size": training.global_batch_size,
            "micro_batch_size": training.micro_batch_size,
            "gradient_checkpointing": training.gradient_checkpointing.by_component,
            "trainable": [component.value for component in profile.config.trainable],
        },
        "step": _step(profile),
        "losses": [
            {"step": number, "how": step.how, "loss": step.loss, "loss_hex": step.loss.hex()}
            for number, step in enumerate(profile.steps, start=1)
        ],
        "time": _time(profile),
        "operations": [vars(operation) for operation in profile.breakdown.operations[:TOP_OPERATIONS]],
        "memory": {
            "shape": {"positions": followed.longest, "supervised": followed.supervised},
            "measured": _peak(profile.memory.peak(0)),
            "planned": None if planned is None else _peak(planned.peak),
            "process_bytes": profile.peak_bytes,
        },
        "parameters": _parameters(profile, planned),
    }


def _environment(profile: Profile) -> dict[str, Any]:
    return {
        "device": profile.device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _step(profile: Profile) -> dict[str, Any]:
    timed, traced = profile.taken("timed"), profile.taken("traced")
    spent = sum(step.seconds + step.data_wait for step in timed)
    tokens, padding = (sum(getattr(step, name) for step in timed) for name in ("tokens", "padding"))
    return {
        "seconds": profile.seconds,
        "each": [step.seconds for step in timed],
        "data_wait_seconds": statistics.median(step.data_wait for step in timed),
        "traced_seconds": statistics.median(step.seconds for step in traced),
        "tokens_per_second": tokens / spent,
        "samples_per_second": sum(step.samples for step in timed) / spent,
        "positions": max(step.longest for step in timed),
        "padding_share": padding / (tokens + padding),
    }


def _time(profile: Profile) -> dict[str, Any]:
    breakdown = profile.breakdown
    parts = {
        part: {kind: breakdown.by_part.get((part, kind), 0.0) for kind in PASSES}
        for part in PARTS
        if any((part, kind) in breakdown.by_part for kind in PASSES)
    }
    return {
        "clock": "main thread" if profile.device == "cpu" else "kernels of the GPU",
        "seconds": breakdown.seconds,
        "parts": parts,
    }


def _peak(peak: Peak) -> dict[str, Any]:
    return {
        "bytes": peak.total,
        "phase": peak.phase,
        "op": peak.op,
        "module": peak.module,
        "by_category": peak.by_category(),
        "by_component": peak.by_component(),
    }


def _parameters(profile: Profile, planned: Planned | None) -> dict[str, Any]:
    """Counts parameters, and says what of the step's arithmetic serves those that train."""
    ledger = profile.ledger
    values: dict[str, Any] = {
        "total": ledger.total,
        "trainable": ledger.trainable,
        "trainable_share": ledger.trainable / ledger.total,
        "by_component": {row.component: {"total": row.total, "trainable": row.trainable} for row in ledger.rows},
        "updated_per_second": ledger.trainable / profile.seconds,
    }
    if planned is not None:
        work, passes = planned.work, planned.work.flops_by("phase")
        values |= {
            "step_flops": work.flops,
            "useful_flops": work.useful_flops,
            "flops_by_pass": passes,
            "weight_gradient_share": passes.get("weight_gradients", 0.0) / work.flops,
            "flops_per_second": work.flops / profile.seconds,
        }
    return values


def describe_memory(timeline: Timeline) -> dict[str, Any]:
    """Returns the memory of the followed step over its events: bytes by category, and where each phase begins."""
    inside = [index for index, event in enumerate(timeline.events) if event.step >= 0]
    first = inside[0]
    starts: list[dict[str, Any]] = []
    for index in inside:
        phase = timeline.events[index].phase
        if not starts or starts[-1]["phase"] != phase:
            starts.append({"phase": phase, "event": index - first})
    return {
        "unit": "bytes",
        "events": len(inside),
        "phases": starts,
        "by_category": {
            category: timeline.by_category[row, first:].tolist() for row, category in enumerate(CATEGORIES)
        },
        "total": timeline.total[first:].tolist(),
        "peak": _peak(timeline.peak(0)) | {"event": timeline.peak(0).event - first},
    }
