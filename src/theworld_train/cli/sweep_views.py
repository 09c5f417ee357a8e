"""What a sweep has come to, as text and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from theworld_train.sweep.opening import Checked


def say(text: str) -> None:
    """Prints a line as it is."""
    from theworld_train.cli.tables import output

    output().print(text, highlight=False, markup=False, soft_wrap=True)


def print_best(found: Checked, summary: dict[str, Any]) -> None:
    """Prints the best trial of a sweep that has one, and how to run it again."""
    from theworld_train.sweep.target import CONFIG_FILE

    trial = summary["trials"][summary["best"]]
    config = found.directory / trial["directory"] / CONFIG_FILE
    command = "run" if found.sweep.kind == "pipeline" else "train"
    say(f"best: trial {trial['number']}, {found.sweep.metric} {trial['value']:.6g}")
    for key, value in trial["values"].items():
        share = summary["importance"].get(key)
        say(f"  {key}: {value}" + ("" if share is None else f"  (importance {share:.0%})"))
    say(f"  config: {config}")
    say(f"  again:  theworld-train {command} {config} output_dir=ELSEWHERE")


def print_trials(found: Checked, summary: dict[str, Any]) -> None:
    """Prints the table of a sweep's trials."""
    from rich import box
    from rich.table import Table

    from theworld_train.cli.tables import output
    from theworld_train.sweep.summary import counts, words

    trials = summary["trials"]
    say(f"{found.sweep.name}: {counts(trials)} of {found.wanted} trials, {found.sweep.direction} {found.sweep.metric}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("trial", justify="right")
    table.add_column("state")
    table.add_column(found.sweep.metric, justify="right")
    table.add_column("step", justify="right")
    for key in summary["space"]:
        table.add_column(key, justify="right", overflow="fold")
    table.add_column("reason", overflow="fold")
    for trial in trials:
        points = trial["intermediate"]
        value = trial["value"] if trial["value"] is not None else points[-1][1] if points else None
        table.add_row(
            f"{trial['number']}{'*' if trial['number'] == summary['best'] else ''}",
            words(trial["state"]),
            "" if value is None else f"{value:.5g}",
            str(points[-1][0]) if points else "",
            *(_cell(trial["values"].get(key)) for key in summary["space"]),
            trial["reason"] or "",
        )
    output().print(table)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
