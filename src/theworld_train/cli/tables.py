"""Tables that several commands print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

#: Columns where the output is no terminal: a table that is cut off in a log is of no use.
PLAIN_WIDTH = 120


def output() -> Console:
    """Returns the console that commands print to."""
    console = Console()
    return console if console.is_terminal else Console(width=max(PLAIN_WIDTH, console.width))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _kinds(results: list[Mapping[str, Any]]) -> list[str]:
    """Returns the kinds of question of several results, `total` last."""
    kinds = {kind for result in results for kind in result["accuracy"]}
    return sorted(kinds - {"total"}) + (["total"] if "total" in kinds else [])


def _accuracies(result: Mapping[str, Any] | None, kinds: list[str]) -> list[str]:
    accuracy = {} if result is None else result["accuracy"]
    return [f"{accuracy[kind]:.1%}" if kind in accuracy else "-" for kind in kinds]


def stage_table(summary: Mapping[str, Any]) -> Table:
    """Returns the table of a pipeline's stages: what each has trained, its loss and its held-out accuracy."""
    stages = [stage for stage in summary["stages"] if stage["state"] == "complete"]
    kinds = _kinds([stage["eval"] for stage in stages if stage["eval"]])
    table = Table(title=f"{summary['pipeline']}: held-out accuracy by stage", box=box.SIMPLE_HEAD)
    table.add_column("stage")
    for heading in ("trainable", "steps", "first loss", "last loss", *kinds):
        table.add_column(heading, justify="right")
    for stage in stages:
        table.add_row(
            stage["name"],
            f"{stage['trainable']:,}",
            str(stage["steps"]),
            _number(stage["first_loss"]),
            _number(stage["last_loss"]),
            *_accuracies(stage["eval"], kinds),
        )
    return table


def ablation_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns the table of ablations, a row for each pair of checkpoint and variant."""
    every = [result for variants in results.values() for result in variants.values()]
    kinds = _kinds(every)
    table = Table(title="held-out accuracy with parts taken away", box=box.SIMPLE_HEAD)
    for heading in ("checkpoint", "variant"):
        table.add_column(heading)
    for heading in ("loss", *kinds, "samples", "dropped"):
        table.add_column(heading, justify="right")
    for name, variants in results.items():
        for variant, result in variants.items():
            counts = f"{sum(result['samples'].values()):,}", f"{result['dropped']:,}"
            table.add_row(name, variant, _number(result["loss"]), *_accuracies(result, kinds), *counts)
    return table
