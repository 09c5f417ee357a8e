"""`theworld-train params`: the parameter ledger of one or several runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from theworld_train.cli.arguments import split_overrides

if TYPE_CHECKING:
    from theworld_train.accounting.ledger import LedgerRow, ParameterLedger
    from theworld_train.config import RunConfig

GIB = 2**30


def params(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [KEY=VALUE ...]", help="Run configs or checkpoints, and keys to override."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Print only what differs between two runs.")] = False,
) -> None:
    """Count every parameter of one or several runs by component: total, what trains, and what that takes in memory.

    Nothing is downloaded and no weights are read.

    Example:
        theworld-train params configs/stages/projection.yaml configs/stages/full.yaml
    """
    from theworld_train.cli.ranks import offline
    from theworld_train.config.errors import ConfigError

    paths, overrides = split_overrides(arguments)
    if not paths:
        raise ConfigError("params takes at least one config")
    if diff and len(paths) != 2:
        raise ConfigError(f"--diff compares two runs, got {len(paths)}")
    offline()
    from theworld_train.assemble import ledger_of
    from theworld_train.cli.tables import output

    ledgers: dict[str, ParameterLedger] = {}
    for path in paths:
        config = _config_of(path, overrides)
        name = config.name if config.name not in ledgers else f"{config.name} ({path})"
        ledgers[name] = ledger_of(config)
    if as_json:
        typer.echo(json.dumps({name: ledger.to_dict() for name, ledger in ledgers.items()}, indent=1))
        return
    header, rows = _difference(ledgers) if diff else _side_by_side(ledgers)
    if markdown:
        typer.echo("\n".join(_markdown(header, rows)))
    elif not rows:
        typer.echo("no difference")
    else:
        output().print(_table(header, rows))


def _config_of(path: str, overrides: Sequence[str]) -> RunConfig:
    """Returns the run config of a YAML file, or that of the run that wrote a checkpoint."""
    from theworld_train.config import load_run_config

    if Path(path).is_dir():
        from theworld_train.assemble import CONFIG_FILE
        from theworld_train.train.checkpoint import resolve_checkpoint

        return load_run_config(str(resolve_checkpoint(Path(path)) / CONFIG_FILE), overrides)
    return load_run_config(path, overrides)


def _trains(row: LedgerRow | None) -> str:
    if row is None:
        return "absent"
    if row.lr is None:
        return "frozen"
    number = "trains" if row.trainable == row.total else f"{row.trainable:,}"
    return f"{number} @ {row.lr:g}"


def _rows_by_component(ledger: ParameterLedger) -> dict[str, LedgerRow]:
    return {row.component: row for row in ledger.rows}


def _components(ledgers: Mapping[str, ParameterLedger]) -> list[str]:
    return list(dict.fromkeys(row.component for ledger in ledgers.values() for row in ledger.rows))


def _totals_of(component: str, ledgers: Mapping[str, ParameterLedger]) -> str:
    """Returns the size of a component: one number, or one for each run if they differ."""
    totals = {rows[component].total for ledger in ledgers.values() if component in (rows := _rows_by_component(ledger))}
    return " / ".join(f"{total:,}" for total in sorted(totals))


def _side_by_side(ledgers: Mapping[str, ParameterLedger]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table in which each run has a column."""
    body = []
    for component in _components(ledgers):
        row = [component, _totals_of(component, ledgers)]
        row += [_trains(_rows_by_component(ledger).get(component)) for ledger in ledgers.values()]
        body.append(row)
    totals = " / ".join(f"{total:,}" for total in sorted({ledger.total for ledger in ledgers.values()}))
    shares = [f"{led.trainable:,} ({led.trainable / led.total:.2%})" for led in ledgers.values()]
    body.append(["total", totals, *shares])
    for label, field in (
        ("weights", "weight_bytes"),
        ("gradients", "gradient_bytes"),
        ("optimizer", "optimizer_bytes"),
    ):
        sums = [sum(getattr(row, field) for row in ledger.rows) for ledger in ledgers.values()]
        body.append([f"{label} (GiB)", "", *(f"{number / GIB:.3f}" for number in sums)])
    ties = sorted({tie for ledger in ledgers.values() for row in ledger.rows for tie in row.ties})
    if ties:
        body.append(["tied, counted once", ", ".join(ties), *("" for _ in ledgers)])
    return ["component", "parameters", *ledgers], body


def _difference(ledgers: Mapping[str, ParameterLedger]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the fields in which two runs differ."""
    first, second = (_rows_by_component(ledger) for ledger in ledgers.values())
    fields = ("total", "trainable", "dtype", "lr", "weight_decay", "decayed", "weight_bytes", "optimizer_bytes")
    rows = []
    for component in _components(ledgers):
        for field in fields:
            values = [getattr(side.get(component), field, None) for side in (first, second)]
            if values[0] != values[1]:
                rows.append([component, field, *("-" if value is None else _shown(value) for value in values)])
    return ["component", "field", *ledgers], rows


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> object:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
