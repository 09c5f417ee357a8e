"""`theworld-train params`: the parameter ledger of one or several runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from theworld_train.cli.arguments import split_overrides

if TYPE_CHECKING:
    from rich.table import Table

    from theworld_train.accounting.ledger import LedgerRow, ParameterLedger
    from theworld_train.config import RunConfig
    from theworld_train.config.errors import Problem

GIB = 2**30
#: Columns of bytes, by what the table calls them.
BYTES = {
    "weights": "weight_bytes",
    "fp32 masters": "master_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
}


def params(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [KEY=VALUE ...]", help="Run configs or checkpoints, and keys to override."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Show only what differs between two runs.")] = False,
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
    from theworld_train.assemble.model import ledger_of

    ledgers: dict[str, ParameterLedger] = {}
    for path in paths:
        config = _config_of(path, overrides)
        if problems := wrong_names(config, path):
            raise ConfigError(problems)
        name = config.name if config.name not in ledgers else f"{config.name} ({path})"
        ledgers[name] = ledger_of(config)
    if as_json:
        every = {name: ledger.to_dict() for name, ledger in ledgers.items()}
        typer.echo(json.dumps(_differences(ledgers) if diff else every, indent=1))
        return
    header, rows = _difference_table(ledgers) if diff else _side_by_side(ledgers)
    if markdown:
        typer.echo("\n".join(_markdown(header, rows)))
    elif not rows:
        typer.echo("no difference")
    else:
        print_whole(_table(header, rows))


def _config_of(path: str, overrides: Sequence[str]) -> RunConfig:
    """Returns the run config of a YAML file, or that of the run that wrote a checkpoint."""
    from theworld_train.config import load_run_config

    if Path(path).is_dir():
        from theworld_train.assemble.run import CONFIG_FILE
        from theworld_train.checkpoint_files import resolve_checkpoint

        return load_run_config(str(resolve_checkpoint(Path(path)) / CONFIG_FILE), overrides)
    return load_run_config(path, overrides)


def wrong_names(config: RunConfig, path: str) -> list[Problem]:
    """Returns what is wrong with the names of a run's models; the weights themselves need not be here.

    Args:
        config: The run config.
        path: Its file.
    """
    from theworld_train.hub import required_repositories

    uses = [use for use in required_repositories(config, path) if use.kind == "model" and not use.generates]
    return [problem for use in uses if (problem := use.name_problem()) is not None]


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


def _side_by_side(ledgers: Mapping[str, ParameterLedger]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table in which each run has a column."""
    blanks = ["" for _ in ledgers]
    body = []
    for component in _components(ledgers):
        row = [component, _sizes(_rows_by_component(ledger)[component].total for ledger in _having(component, ledgers))]
        row += [_trains(_rows_by_component(ledger).get(component)) for ledger in ledgers.values()]
        body.append(row)
        for part in _parts(component, ledgers):
            holders = [_rows_by_component(ledger)[component].parts for ledger in _having(component, ledgers)]
            body.append([f"  {part}", _sizes(parts[part] for parts in holders if part in parts), *blanks])
        body += [[f"  {alias}", "tied", *blanks] for alias in _aliases(component, ledgers)]
    body.append(
        ["total", _sizes(led.total for led in ledgers.values()), *(f"{led.trainable:,}" for led in ledgers.values())]
    )
    body.append(["  trainable share", "", *(f"{ledger.trainable / ledger.total:.2%}" for ledger in ledgers.values())])
    for label, field in BYTES.items():
        sums = [sum(getattr(row, field) for row in ledger.rows) for ledger in ledgers.values()]
        body.append([f"{label} (GiB)", "", *(f"{number / GIB:.3f}" for number in sums)])
    return ["component", "parameters", *ledgers], body


def _having(component: str, ledgers: Mapping[str, ParameterLedger]) -> list[ParameterLedger]:
    return [ledger for ledger in ledgers.values() if component in _rows_by_component(ledger)]


def _parts(component: str, ledgers: Mapping[str, ParameterLedger]) -> list[str]:
    """Returns the parts of a component in the order of the model; none if it is in one piece."""
    holders = _having(component, ledgers)
    parts = list(dict.fromkeys(part for ledger in holders for part in _rows_by_component(ledger)[component].parts))
    return parts if len(parts) > 1 else []


def _aliases(component: str, ledgers: Mapping[str, ParameterLedger]) -> list[str]:
    """Returns the further names of the component's parameters that have several."""
    ties = [tie for ledger in _having(component, ledgers) for tie in _rows_by_component(ledger)[component].ties]
    return sorted({alias for _, *aliases in ties for alias in aliases})


def _sizes(numbers: Iterable[int]) -> str:
    """Returns one number, or those of several runs if they differ."""
    return " / ".join(f"{number:,}" for number in sorted(set(numbers)))


def _differences(ledgers: Mapping[str, ParameterLedger]) -> dict[str, dict[str, list[Any]]]:
    """Returns the fields in which two runs differ, by component, with both values; None where it is absent."""
    first, second = (_rows_by_component(ledger) for ledger in ledgers.values())
    differences: dict[str, dict[str, list[Any]]] = {}
    for component in _components(ledgers):
        for field in ("total", "trainable", "dtype", "ties", "lr", "weight_decay", "decayed", *BYTES.values()):
            values = [getattr(side.get(component), field, None) for side in (first, second)]
            if values[0] != values[1]:
                differences.setdefault(component, {})[field] = values
    return differences


def _difference_table(ledgers: Mapping[str, ParameterLedger]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table of differences."""
    rows = [
        [component, field, *map(_shown, values)]
        for component, fields in _differences(ledgers).items()
        for field, values in fields.items()
    ]
    return ["component", "field", *ledgers], rows


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def ledger_table(ledgers: Mapping[str, ParameterLedger]) -> Table:
    """Returns the table of several runs' ledgers, side by side."""
    return _table(*_side_by_side(ledgers))


def print_whole(table: Table) -> None:
    """Prints a table; in a log it is as wide as it needs to be, as not a digit may be lost."""
    from theworld_train.cli.tables import output

    console = output()
    if not console.is_terminal:
        unbound = console.options.update(width=10_000)
        console.width = max(console.width, console.measure(table, options=unbound).maximum)
    console.print(table)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
