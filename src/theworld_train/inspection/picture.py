"""The distribution of lengths as a picture."""

from __future__ import annotations

from pathlib import Path

from theworld_train.inspection.token_ledger import TokenLedger

BINS = 60


def draw_lengths(path: Path, name: str, ledger: TokenLedger) -> None:
    """Draws how many samples are of which length before the cut, those that are dropped above the others.

    Args:
        path: Where to write; the suffix says in which format.
        name: Of the run.
        ledger: Its token ledger.

    Raises:
        ConfigError: If matplotlib is missing or the file cannot be written.
    """
    from theworld_train.config.errors import ConfigError, Problem

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = 'pip install "theworld-train[plot]"'
        raise ConfigError(Problem("drawing needs the package 'matplotlib'", key="--plot", hint=hint)) from error
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    groups = {
        "whole": [entry.whole for entry in ledger.entries if entry.outcome == "kept"],
        "cut": [entry.whole for entry in ledger.entries if entry.outcome == "trimmed"],
        "dropped": [entry.whole for entry in ledger.entries if entry.outcome == "dropped" and entry.whole],
    }
    groups = {label: lengths for label, lengths in groups.items() if lengths}
    colours = {"whole": "#4c72b0", "cut": "#dd8452", "dropped": "#c44e52"}
    axes.hist(
        list(groups.values()), bins=BINS, stacked=True, label=list(groups), color=[colours[label] for label in groups]
    )
    if max(entry.whole for entry in ledger.entries) > 0.8 * ledger.max_length:
        axes.axvline(ledger.max_length, color="black", linewidth=1, linestyle="--", label="longest allowed")
    axes.set_xlabel("tokens of a sample")
    axes.set_ylabel("samples")
    axes.set_title(f"{name}: {len(ledger.entries):,} samples")
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"cannot be written: {error}", key="--plot", value=str(path))) from error
