"""The parameter ledger: every parameter of a model once, by component, with what training it costs in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LedgerRow:
    """One component of a model in one stage.

    The four columns of bytes are disjoint: what trains is stored once, in fp32. Under autocast it is the master copy of
    the weights that are computed with, and counts as such; in an fp32 run it is simply the weights.

    Attributes:
        component: Name of the component.
        total: Its parameters, tied ones once.
        trainable: Those of them that train.
        parts: Its parameters by part, such as `projection` and `temporal`.
        dtypes: Its parameters by the dtype that they are stored in.
        ties: Groups of names that share one Parameter, which is counted once, under the first of them.
        lr: Peak learning rate, or None if no optimizer holds it.
        weight_decay: Weight decay of its matrices, or None if no optimizer holds it.
        decayed: Trainable parameters in the group with that decay; the other ones are not decayed.
        weight_bytes: Bytes of weights as they are computed with, masters not included.
        master_bytes: Bytes of the fp32 masters of what trains.
        gradient_bytes: Bytes of its gradients.
        optimizer_bytes: Bytes of the optimizer's state.
    """

    component: str
    total: int
    trainable: int
    parts: Mapping[str, int]
    dtypes: Mapping[str, int]
    ties: tuple[tuple[str, ...], ...]
    lr: float | None
    weight_decay: float | None
    decayed: int
    weight_bytes: int
    master_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    def __post_init__(self) -> None:
        """Makes sure that the row agrees with itself."""
        assert sum(self.parts.values()) == self.total, f"{self.component}: the parts do not add up to {self.total}"
        assert sum(self.dtypes.values()) == self.total, f"{self.component}: the dtypes do not add up to {self.total}"
        assert 0 <= self.decayed <= self.trainable <= self.total, f"{self.component}: more trains than there is"

    @property
    def dtype(self) -> str:
        """Dtypes that its weights are stored in, joined by `+`."""
        return "+".join(sorted(self.dtypes))


@dataclass(frozen=True)
class ParameterLedger:
    """A model in one stage.

    Attributes:
        rows: Its components.
        total: Its parameters, counted on the model and not on the components; the rows add up to it.
    """

    rows: tuple[LedgerRow, ...]
    total: int

    def __post_init__(self) -> None:
        """Makes sure that every parameter is in a row, and in one only."""
        assert len({row.component for row in self.rows}) == len(self.rows), "a component has two rows"
        counted = sum(row.total for row in self.rows)
        assert counted == self.total, f"the rows add up to {counted:,} parameters, but the model has {self.total:,}"

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return sum(row.trainable for row in self.rows)

    @property
    def saved_bytes(self) -> int:
        """Bytes that a checkpoint writes of what trains: weights as they are stored, and the optimizer's state."""
        return sum(row.gradient_bytes + row.optimizer_bytes for row in self.rows)

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
