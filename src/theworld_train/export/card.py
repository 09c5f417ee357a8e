"""The model card of an exported checkpoint, from what its run has recorded."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from theworld_train.checkpoint_files import COMPONENTS_FILE, checkpoint_step, read_record
from theworld_train.config import load_run_config
from theworld_train.config.sources import MixtureSource
from theworld_train.train.metrics import read_metrics


def model_card(checkpoint: Path, dtype: str) -> str:
    """Renders the card.

    Args:
        checkpoint: A verified checkpoint; metrics are read from its run directory if they are still there.
        dtype: Name of the exported weights' dtype.
    """
    config = load_run_config(checkpoint / "config.yaml")
    record = read_record(checkpoint / COMPONENTS_FILE)
    ledger = json.loads((checkpoint / "ledger.json").read_text())
    step = checkpoint_step(checkpoint.resolve())
    template = files("theworld_train.export").joinpath("card.md.jinja").read_text()
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return environment.from_string(template).render(
        run=config.name,
        step=step,
        dtype=dtype,
        bases=[name for kind in ("base", "encoder") if record[kind] and (name := _hub_name(record[kind]))],
        components=record["components"],
        ledger=ledger,
        config=config,
        data={"train": _source(config.data.train), "held out": _source(config.data.eval)},
        held_out=_last_measurement(checkpoint.parent / "metrics.jsonl", step),
    )


def _hub_name(base: dict[str, Any]) -> str | None:
    """Returns the name of a base on the hub; that of a directory says nothing elsewhere."""
    return None if Path(base["id"]).is_absolute() else str(base["id"])


def _source(source: Any) -> str | None:  # noqa: ANN401
    """Names a source of data without the place where it lies on this machine."""
    if source is None:
        return None
    if isinstance(source, MixtureSource):
        return " + ".join(f"{name}: {_source(part.data)}" for name, part in source.parts.items())
    values = source.model_dump()
    place = values.get("id") or values.get("path")
    return str(source.source) + (f" ({Path(place).name if Path(place).is_absolute() else place})" if place else "")


def _last_measurement(path: Path, step: int) -> dict[str, Any] | None:
    """Returns the held-out measurement after a step, if there is one."""
    if not path.is_file():
        return None
    rows = [row for row in read_metrics(path, "eval") if row["step"] == step]
    return {key: value for key, value in rows[-1].items() if isinstance(value, float)} if rows else None
