"""`theworld-train data`: what a run's data hold, before anything trains on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from theworld_train.cli.arguments import one_run_config, split_overrides

if TYPE_CHECKING:
    from rich.table import Table

    from theworld_train.inspection.token_ledger import TokenLedger

#: Samples, sizes or groups that are listed; `--json` holds all of them.
LISTED = 10


def data(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG [KEY=VALUE ...]", help="A run config, and dotted keys to override.")
    ],
    media: Annotated[
        bool, typer.Option("--media", help="Open all media: finds damaged ones, their sizes, and duplicates.")
    ] = False,
    show: Annotated[int, typer.Option("--show", min=0, help="Render so many samples as the model sees them.")] = 0,
    page: Annotated[Path, typer.Option("--page", help="Where --show writes its page of HTML.")] = Path("samples.html"),
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the lengths into this PNG file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, every sample that is not kept by its id.")
    ] = False,
) -> None:
    """Count the tokens that training will see, from exact lengths: what is cut or dropped and why, steps and padding.

    Nothing is downloaded and no weights are read.

    Example:
        theworld-train data configs/stages/projection.yaml data.max_sequence_length=4096 --show 20
    """
    from theworld_train.cli.ranks import offline
    from theworld_train.cli.tables import output
    from theworld_train.config.errors import ConfigError

    paths, overrides = split_overrides(arguments)
    _, config = one_run_config("data", paths, overrides)
    offline()
    from theworld_train import hub
    from theworld_train.assemble.inputs import open_inputs
    from theworld_train.inspection.page import render_samples
    from theworld_train.inspection.token_ledger import count_tokens

    config = hub.pin_revisions(config, hub.read_lock(hub.LOCK_FILE))  # weights need not be there
    inputs = open_inputs(config, allow_wrong_rows=True)
    ledger = count_tokens(config, inputs, media=media, num_workers=config.data.num_workers)
    if plot is not None:
        from theworld_train.inspection.picture import draw_lengths

        draw_lengths(plot, config.name, ledger)
    if show:
        _write(page, render_samples(config.name, inputs, show))
    if as_json:
        typer.echo(json.dumps(_as_json(ledger), indent=1))
    else:
        console = output()
        console.print(_table(ledger))
        for line in _remarks(ledger, media=media):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if show:
            console.print(f"{show} samples are shown in {page}", highlight=False, markup=False, soft_wrap=True)
    if problems := inputs.check.refusals(config.data.max_bad_samples):
        raise ConfigError(problems)


def _write(path: Path, text: str) -> None:
    from theworld_train.config.errors import ConfigError, Problem

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(Problem(f"cannot be written: {error.strerror}", key="--page", value=str(path))) from error


def _as_json(ledger: TokenLedger) -> dict[str, Any]:
    from theworld_train.inspection.token_ledger import totals

    return {
        "max_sequence_length": ledger.max_length,
        "steps": ledger.steps,
        "global_batch_size": ledger.global_batch_size,
        "padding_share": ledger.padding,
        "parts": {name: totals(entries) for name, entries in ledger.by_part().items()},
        "trimmed": list(ledger.ids("trimmed")),
        "dropped": ledger.ids("dropped"),
        "excluded": list(ledger.ids("excluded")),
        "duplicates": ledger.duplicates(),
        "image_sizes": {f"{width}x{height}": n for (width, height), n in ledger.image_sizes().most_common()},
    }


def _table(ledger: TokenLedger) -> Table:
    from rich import box
    from rich.table import Table

    from theworld_train.inspection.token_ledger import OUTCOMES, PERCENTILES, totals

    table = Table(title="what training sees", box=box.SIMPLE_HEAD)
    table.add_column("")
    found = {name: totals(entries) for name, entries in ledger.by_part().items()}
    for name in found:
        table.add_column(name, justify="right")
    columns = list(found.values())
    for outcome in OUTCOMES:
        if outcome == "kept" or any(column["samples"][outcome] for column in columns):
            table.add_row(f"samples {outcome}", *(f"{column['samples'][outcome]:,}" for column in columns))
    for kind in ("all", "text", "image", "world", "brackets", "supervised"):
        label = "tokens" if kind == "all" else f"  {kind}"
        table.add_row(label, *(f"{column['tokens'][kind]:,}" for column in columns))
    for percentile in PERCENTILES:
        cells = (column["percentiles"].get(str(percentile)) for column in columns)
        table.add_row(f"{percentile}% have at most", *("-" if cell is None else f"{cell:,}" for cell in cells))
    table.add_row("longest before the cut", *(f"{column['longest']:,}" for column in columns))
    return table


def _remarks(ledger: TokenLedger, *, media: bool) -> list[str]:
    """Returns what is to be said besides the table."""
    lines = [
        f"{ledger.steps:,} steps of {ledger.global_batch_size} samples, {ledger.padding:.1%} of their positions "
        f"padding; a sample may have {ledger.max_length:,} tokens"
    ]
    trimmed, dropped = ledger.ids("trimmed"), ledger.ids("dropped")
    if trimmed:
        lines.append(f"cut: {_listed(list(trimmed))}")
    lines += [f"dropped: {name}: {reason}" for name, reason in list(dropped.items())[:LISTED]]
    if len(dropped) > LISTED:
        lines.append(f"dropped: and {len(dropped) - LISTED:,} more")
    if not media:
        return [*lines, "media were not opened; --media finds damaged ones, sizes and duplicates"]
    groups = ledger.duplicates()
    lines += [f"the same: {_listed(group)}" for group in groups[:LISTED]]
    if len(groups) > LISTED:
        lines.append(f"the same: and {len(groups) - LISTED:,} more groups")
    sizes = [f"{width} x {height} ({number:,})" for (width, height), number in ledger.image_sizes().most_common(LISTED)]
    return [*lines, f"sizes of images: {', '.join(sizes) or 'there are none'}"]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
