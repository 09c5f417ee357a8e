"""Measures what a save costs on a tiny and on a 100M model, and says what it will cost at full size.

    python benchmarks/saving.py [--directory DIR]

Each model trains as a whole for a few steps and is saved after each. The bytes of the full model's stages follow from
its shapes, the seconds from the speed that was measured at 100M. Prints tables, and writes a record with hardware and
versions into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measuring import table, write_record
from rich.console import Console

from theworld_train.assemble import run
from theworld_train.assemble.model import ledger_of
from theworld_train.config import load_run_config, parse_run_config
from theworld_train.data.moving_digits import WORDS
from theworld_train.model.build import write_tiny
from theworld_train.train import checkpoint

MB = 1e6
STAGES = ("projection", "vision", "language", "full")
CONFIGS = Path(__file__).parents[1] / "configs" / "stages"
COMPONENTS = ("world_projector", "vision_tower", "multi_modal_projector", "language_model", "world_encoder")
#: Text configs that differ from the tiny model's.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "100m": {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 16, "head_dim": 160}
    | {"layer_types": ["sliding_attention", "full_attention"] * 8},
}
#: Saves of each model; the fastest counts.
SAVES = 3


def measure(size: str, root: Path) -> dict[str, Any]:
    """Trains a model of a size and returns parameters, bytes on disk and the seconds of a save's parts."""
    clips = torch.rand(4, 3, 5, 32, 32) * 2 - 1
    write_tiny(root / size, WORDS, clips, **SIZES[size])
    values = {
        "name": size,
        "output_dir": str(root / f"{size}-run"),
        "model": {
            "base": str(root / size / "gemma"),
            "world": {"encoder": str(root / size / "cosmos"), "resolution": 32},
        },
        "trainable": {component: {} for component in COMPONENTS},
        "data": {"train": {"source": "moving_digits", "split": "train", "samples": 8}, "num_workers": 0},
        "training": {"max_steps": SAVES, "global_batch_size": 1},
        "checkpoint": {"every_steps": 1, "keep_last": 1},
    }
    config = parse_run_config(values)
    spent: dict[str, list[float]] = {}
    with timed(spent, collect=run.RunSaver, write=run.RunSaver, seal=checkpoint):
        run.train(config, Console(file=io.StringIO()))
    files = [path for path in Path(config.output_dir).glob("step-*/*") if path.is_file()]
    return {
        "parameters": ledger_of(config).total,
        "bytes": sum(path.stat().st_size for path in files),
        "tensor_bytes": ledger_of(config).saved_bytes,
    } | {f"{part}_s": min(seconds) for part, seconds in spent.items()}


@contextmanager
def timed(spent: dict[str, list[float]], **owners: object) -> Generator[None]:
    """Notes the seconds that each call of some functions takes, given what holds each, while a block runs."""
    before = {name: getattr(owner, name) for name, owner in owners.items()}

    def noted(name: str) -> Callable[..., object]:
        def note(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            result = before[name](*args, **kwargs)
            spent.setdefault(name, []).append(time.perf_counter() - started)
            return result

        return note

    for name, owner in owners.items():
        setattr(owner, name, noted(name))
    try:
        yield
    finally:
        for name, owner in owners.items():
            setattr(owner, name, before[name])


def main() -> None:
    """Measures, plans and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to save; a temporary directory if absent")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(dir=arguments.directory) as root:
        measured = {size: measure(size, Path(root)) for size in SIZES}
    rate = measured["100m"]["bytes"] / (measured["100m"]["collect_s"] + measured["100m"]["write_s"])
    ledgers = {stage: ledger_of(load_run_config(CONFIGS / f"{stage}.yaml")) for stage in STAGES}
    planned = {
        stage: {"trainable": ledger.trainable, "bytes": ledger.saved_bytes, "seconds": ledger.saved_bytes / rate}
        for stage, ledger in ledgers.items()
    }
    header = ("model", "parameters", "MB on disk", "collect s", "write s", "of which sync and hash s", "MB/s")
    print(table(header, [_measured_row(size, found) for size, found in measured.items()]))
    header = ("stage at full size", "trained parameters", "MB written", "s")
    rows = [(s, f"{p['trainable']:,}", f"{p['bytes'] / MB:,.1f}", f"{p['seconds']:,.1f}") for s, p in planned.items()]
    print(table(header, rows))
    write_record("saving", "python benchmarks/saving.py", measured=measured, rate_mb_s=rate / MB, planned=planned)


def _measured_row(size: str, found: dict[str, Any]) -> tuple[str, ...]:
    seconds = found["collect_s"] + found["write_s"]
    parts = [f"{found[f'{part}_s']:.3f}" for part in ("collect", "write", "seal")]
    return (
        size,
        f"{found['parameters']:,}",
        f"{found['bytes'] / MB:,.1f}",
        *parts,
        f"{found['bytes'] / MB / seconds:,.0f}",
    )


if __name__ == "__main__":
    main()
