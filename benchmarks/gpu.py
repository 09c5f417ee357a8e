"""Measures the published workload on a GPU, against its targets, and then all that `step.py` measures.

    python benchmarks/gpu.py [--repeats 5] [--parts step length ...]
    python benchmarks/gpu.py --size tiny

The workload is the projection-only step of Gemma 3 4B with random weights: two samples of 4,823 positions, of which
4,096 are world tokens and 300 supervised. A step is all that a training step computes: frozen encoders, forward,
backward, AdamW. A tiny model takes the same way on any machine, without targets. Prints tables, and writes a record
with hardware and versions into benchmarks/results/.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import step as steps
import torch
from measuring import device, fastest, memory_held, memory_peak, table, update_record
from torch import Tensor

from theworld_train.train.groups import build_optimizer

GIB = 2**30
#: By `training.gradient_checkpointing`: seconds of a step on an H100 or H200, and GiB at its peak.
TARGETS = {"none": (0.36, 37.0), "full": (0.48, 13.0)}
WAYS = {
    "lean kernels": steps.OURS,
    "compiled kernels": steps.OURS | {"kernels": "compiled"},
    "FlexAttention": steps.OURS | {"attention": "flex"},
    "all of the last layers": steps.LEAN,
}


@dataclass(frozen=True)
class Workload:
    """Sizes of a step: of the model, and of its batch."""

    size: str
    batch: int
    world_tokens: int
    text: int
    supervised: int


#: 4,096 world tokens, 256 image tokens, their brackets, and 467 of text.
PUBLISHED = Workload("4b", batch=2, world_tokens=4096, text=467, supervised=300)
TINY = Workload("tiny", batch=2, world_tokens=64, text=16, supervised=8)


@dataclass(frozen=True)
class TrainingStep:
    """A step as the trainer takes it."""

    step: steps.Step
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, workload: Workload, levers: dict[str, str], checkpointing: str) -> TrainingStep:
        made = steps.make_step(
            workload.size,
            levers,
            world_tokens=workload.world_tokens,
            batch=workload.batch,
            text=workload.text,
            supervised=workload.supervised,
            checkpointing=checkpointing,
        )
        return cls(made, build_optimizer(made.stage.model, made.config))

    def whole(self) -> Tensor:
        """Encodes, and takes the step; returns the mean loss before it."""
        encoded = replace(self.step, features=self.step.stage.encode(self.step.batch))
        loss = encoded.ours()
        self.optimizer.step()
        return loss


def measure_way(workload: Workload, way: str, checkpointing: str, repeats: int) -> dict[str, Any]:
    """Times one way to take the step, and its peak of memory with all that it holds."""
    training = TrainingStep.of(workload, WAYS[way], checkpointing)
    loss = float(training.whole())
    times = fastest({"step": training.whole, "without_encoders": training.step.ours}, repeats)
    peak = memory_held() + memory_peak(training.whole)
    return {"way": way, "checkpointing": checkpointing, "loss": loss, "peak": peak, **times}


def measure_targets(workload: Workload, repeats: int) -> list[dict[str, Any]]:
    """Measures every way, and prints each beside the targets."""
    rows = []
    for way in WAYS:
        if WAYS[way]["attention"] == "flex" and device().type != "cuda":
            continue  # it has no backward pass on a CPU
        for checkpointing in TARGETS:
            rows.append(measure_way(workload, way, checkpointing, repeats))
            torch.cuda.empty_cache()
    print(f"projection-only, {workload}")
    header = ["way", "checkpointing", "loss", "step (s)", "without encoders (s)", "peak (GiB)", "targets", ""]
    print(table(header, [_cells(row, judged=workload is PUBLISHED) for row in rows]), "\n")
    return rows


def _cells(row: dict[str, Any], *, judged: bool) -> list[str]:
    seconds, gib = TARGETS[row["checkpointing"]]
    met = row["step"] <= seconds and row["peak"] <= gib * GIB
    cells = [row["way"], row["checkpointing"], f"{row['loss']:.4f}", f"{row['step']:.3f}"]
    cells += [f"{row['without_encoders']:.3f}", f"{row['peak'] / GIB:.2f}"]
    return cells + ([f"{seconds} s, {gib:g} GiB", "met" if met else "missed"] if judged else ["-", "-"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=["4b", "tiny"], default="4b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="*", choices=list(steps.MEASURES), help="of step.py; all by default on a GPU")
    options = parser.parse_args(arguments)
    on_gpu = device().type == "cuda"
    if options.size == "4b" and not on_gpu:
        parser.error("no CUDA GPU; --size tiny takes the same way on this machine")
    parts = options.parts if options.parts is not None else list(steps.MEASURES) if on_gpu else []
    workload = PUBLISHED if options.size == "4b" else TINY
    command = f"python benchmarks/gpu.py --size {options.size} --repeats {options.repeats} --parts"
    found = update_record("gpu", command, {"targets": {"rows": measure_targets(workload, options.repeats)}})
    for name in parts:
        update_record("gpu", f"{command} {name}", {name: steps.MEASURES[name](options.size, options.repeats)})
    print(f"written to {found}")


if __name__ == "__main__":
    main()
