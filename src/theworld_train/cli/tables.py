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


def _headline(results: list[Mapping[str, Any]]) -> str:
    """Returns the share that a table shows: correct answers, where all results have generated some."""
    return "correct" if all("correct" in result["total"] for result in results) else "predicted"


def _kinds(results: list[Mapping[str, Any]]) -> list[str]:
    """Returns the kinds of question of several results."""
    return sorted({kind for result in results for kind in result["kinds"]})


def _shares(result: Mapping[str, Any] | None, name: str, kinds: list[str], *, interval: bool) -> list[str]:
    """Returns a share by kind, and of all samples where there are several kinds."""
    groups = [(result or {"kinds": {}})["kinds"].get(kind) for kind in kinds]
    if len(kinds) > 1:
        groups.append(None if result is None else result["total"])
    return [_share(None if group is None else group.get(name), interval) for group in groups]


def _share(share: Mapping[str, Any] | None, interval: bool) -> str:
    if share is None or share["value"] is None:
        return "-"
    ends = f" ({100 * share['low']:.0f}-{100 * share['high']:.0f})" if interval else ""
    return f"{share['value']:.1%}{ends}"


def _headings(kinds: list[str]) -> list[str]:
    return [*kinds, "total"] if len(kinds) > 1 else kinds


def stage_table(summary: Mapping[str, Any]) -> Table:
    """Returns the table of a pipeline's stages: what each has trained, its loss and its held-out answers."""
    stages = [stage for stage in summary["stages"] if stage["state"] == "complete"]
    measured = [stage["eval"] for stage in stages if stage["eval"]]
    kinds, share = _kinds(measured), _headline(measured)
    shown = f"share of held-out answers {share}, by stage" if measured else "by stage"
    table = Table(title=f"{summary['pipeline']}: {shown}", box=box.SIMPLE_HEAD)
    table.add_column("stage")
    for heading in ("trainable", "steps", "first loss", "last loss", *_headings(kinds)):
        table.add_column(heading, justify="right")
    for stage in stages:
        table.add_row(
            stage["name"],
            f"{stage['trainable']:,}",
            str(stage["steps"]),
            _number(stage["first_loss"]),
            _number(stage["last_loss"]),
            *_shares(stage["eval"], share, kinds, interval=False),
        )
    return table


def ablation_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns the table of ablations, a row for each pair of checkpoint and variant, with 95% intervals."""
    every = [result for variants in results.values() for result in variants.values()]
    kinds, share = _kinds(every), _headline(every)
    title = f"share of held-out answers {share}, with parts taken away (95% intervals)"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("checkpoint", "variant"):
        table.add_column(heading, no_wrap=True)
    for heading in ("loss", *_headings(kinds), "samples", "dropped"):
        table.add_column(heading, justify="right")
    for name, variants in results.items():
        for variant, result in variants.items():
            total = result["total"]
            counts = f"{total['samples']:,}", f"{result['dropped']:,}"
            shares = _shares(result, share, kinds, interval=True)
            table.add_row(name, variant, _number(total["loss"]["value"]), *shares, *counts)
    return table
