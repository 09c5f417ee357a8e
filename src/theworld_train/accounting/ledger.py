"""The parameter ledger: every parameter of a model once, by component, with what training it costs in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LedgerRow:
    """One component of a model in one stage.

    Attributes:
        component: Name of the component.
        total: Its parameters, tied ones once.
        trainable: Those of them that train.
        dtype: Dtype that its weights are stored in (`mixed` if they differ).
        lr: Peak learning rate, or None if frozen.
        weight_decay: Weight decay of its matrices, or None if frozen.
        decayed: Trainable parameters that weight decay applies to.
        weight_bytes: Bytes of its weights; for what trains these are the fp32 masters.
        gradient_bytes: Bytes of its gradients.
        optimizer_bytes: Bytes of the optimizer's state.
        ties: Names of further places in the model that share its weights, such as `lm_head.weight`.
    """

    component: str
    total: int
    trainable: int
    dtype: str
    lr: float | None
    weight_decay: float | None
    decayed: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    ties: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParameterLedger:
    """The rows of a model; they add up to its total."""

    rows: tuple[LedgerRow, ...]

    @property
    def total(self) -> int:
        """Parameters of the model."""
        return sum(row.total for row in self.rows)

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return sum(row.trainable for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the ledger as JSON-ready values."""
        return {"total": self.total, "trainable": self.trainable, "rows": [asdict(row) for row in self.rows]}


def lines(ledger: ParameterLedger) -> list[str]:
    """Renders the ledger as plain aligned lines for a log."""
    header = ("component", "parameters", "trainable", "dtype", "peak rate")
    body: list[Sequence[str]] = [
        (
            row.component,
            f"{row.total:,}",
            f"{row.trainable:,}",
            row.dtype,
            "frozen" if row.lr is None else f"{row.lr:g}",
        )
        for row in ledger.rows
    ]
    share = f"{ledger.trainable / max(1, ledger.total):.2%}"
    body.append(("total", f"{ledger.total:,}", f"{ledger.trainable:,}", "", share))
    widths = [max(len(row[column]) for row in [header, *body]) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column in (0, 3) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *body]
    ]
