"""What a step holds is the same for each kind of source, whoever loads it: any workers, any split over ranks.

And none of them opens a connection.
"""

from __future__ import annotations

import hashlib
import io
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.helpers.tiny import TinyCheckpoint
from tests.unit.data.test_sources import EXAMPLES, Example, as_clips
from tests.unit.data.test_sources import _cache as _cache  # copies of Parquet files go where the test is
from theworld_train.batch import Batch
from theworld_train.config import parse_run_config
from theworld_train.config.schema import BatchingKind
from theworld_train.data import (
    Batching,
    Collator,
    Dropped,
    ExcludingSource,
    Order,
    Source,
    Window,
    check_rows,
    measure_lengths,
    open_source,
    part_ends,
    training_batches,
    training_order,
)

#: Rows of each source. The one before the last is wrong if there is a way to be, and the medium of the last is damaged.
ROWS = 6
GLOBAL_BATCH = 4


def numbered(value: Any, number: int, example: Example) -> Any:
    """Returns a row with a number in its answer, and in the names of its clip and image."""
    if isinstance(value, dict):
        return {key: numbered(item, number, example) for key, item in value.items()}
    if isinstance(value, list):
        return [numbered(item, number, example) for item in value]
    if isinstance(value, bytes):
        data = picture(number)
        return data[:40] if number == ROWS - 1 else data
    if not isinstance(value, str):
        return value
    if example.image is not None and value in (example.image, Path(example.image).stem):
        return str(Path(value).with_name(f"{number}-{Path(value).name}"))
    return value.replace("cup", f"cup {number}").replace("Does", f"{number} does").replace("bear", f"bear {number}")


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (40 * number, 100, 50)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_rows(name: str, folder: Path) -> dict[str, Any]:
    """Writes rows of a kind of source, and returns the section that reads them."""
    example = EXAMPLES[name]
    rows = [numbered(example.row, number, example) for number in range(ROWS)]
    if example.write is as_clips:
        rows = [{**row, "clip": f"{row['clip']}-{number}"} for number, row in enumerate(rows)]
    if example.wrong:
        rows[-2] |= example.wrong[0][0]
    folder.mkdir()
    path = folder / example.name
    example.write(path, rows)
    if example.write is as_clips:
        (path / rows[-1]["clip"] / "4.png").write_bytes(picture(0)[:40])
    for number in range(ROWS if example.image is not None else 0):
        file = folder / Path(str(example.image)).with_name(f"{number}-{Path(str(example.image)).name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number)[: 40 if number == ROWS - 1 else None])
    return {**yaml.safe_load(example.config), example.key: str(path)}


def section(name: str, tmp_path: Path) -> dict[str, Any]:
    """Returns the section of a source, the mixture of all kinds among them."""
    digits = {"source": "moving_digits", "split": "train", "samples": ROWS, "frames": 5}
    if name == "moving_digits":
        return digits
    if name != "mixture":
        return write_rows(name, tmp_path / "rows")
    parts = {f"p{number}": write_rows(kind, tmp_path / f"p{number}") for number, kind in enumerate(EXAMPLES)}
    return {"source": "mixture", "parts": {part: {"data": data} for part, data in {**parts, "d": digits}.items()}}


def digest(batch: Batch) -> tuple[Any, ...]:
    """Returns what a batch holds, bit for bit."""
    tensors = (batch.input_ids, batch.labels, batch.token_type_ids, batch.attention_mask)
    pixels = [tensor for tensor in (batch.pixel_values, batch.world_frames) if tensor is not None]
    content = b"".join(tensor.numpy().tobytes() for tensor in (*tensors, *pixels))
    return batch.sample_ids, batch.kinds, batch.world_frame_counts, hashlib.sha256(content).hexdigest()


Step = tuple[list[tuple[Any, ...]], list[Dropped]]


@dataclass(frozen=True)
class Loading:
    """What is loaded, and in which order."""

    source: Source
    collator: Collator
    order: Order

    def steps(
        self, number: int, kind: BatchingKind = "padded", world_size: int = 1, workers: int = 0, start: int = 0
    ) -> list[Step]:
        """Returns, of so many steps, the micro-batches in the order of the step, and what was dropped."""
        indices = range(len(self.source))
        lengths = None if kind == "padded" else measure_lengths(self.source, self.collator, indices, 0)
        batching = Batching(kind, self.collator.max_length, lengths, tuple(part_ends(self.source)))

        def of(rank: int) -> Iterator[Window]:
            return training_batches(
                self.source,
                self.collator,
                self.order,
                batching,
                rank=rank,
                world_size=world_size,
                micro_batch_size=1,
                start_step=start,
                num_steps=number,
                num_workers=workers,
                pin_memory=False,
            )

        found: list[Step] = []
        for windows in zip(*map(of, range(world_size)), strict=True):
            side_by_side = zip(*(window.micro_batches for window in windows), strict=True)
            batches = [digest(batch) for ranks in side_by_side for batch in ranks]
            dropped = sorted((item for window in windows for item in window.dropped), key=lambda item: item.sample_id)
            found.append((batches, dropped))
        return found


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever asks for an address or connects to one fails, in this process and in workers, its forks."""
    asked: list[object] = []
    connect = socket.socket.connect

    def refused(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise AssertionError(f"the network was asked for {arguments}")

    def local_alone(self: socket.socket, address: Any) -> None:
        connect(self, address) if self.family == socket.AF_UNIX else refused(address)

    monkeypatch.setattr(socket.socket, "connect", local_alone)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    yield
    assert asked == []


@pytest.fixture
def load(tiny: TinyCheckpoint, tmp_path: Path) -> Callable[[str], Loading]:
    """Returns a function that writes and opens a kind of source."""

    def load(name: str) -> Loading:
        config = parse_run_config(
            {
                "name": "every",
                "output_dir": "runs/every",
                "trainable": {"world_projector": {}},
                "data": {"train": section(name, tmp_path)},
                "training": {"max_steps": 1},
            },
            source="test",
        )
        opened = open_source(config.data.train)
        source = ExcludingSource(opened, frozenset(), check_rows(opened, "data.train", None).wrong)
        order = training_order(config.data.train, opened, 3, GLOBAL_BATCH)
        return Loading(source, Collator(tiny.processor(), 200), order)

    return load


@pytest.mark.parametrize("name", [*EXAMPLES, "moving_digits"])
def test_neither_workers_nor_ranks_change_what_a_step_holds(name: str, load: Callable[[str], Loading]) -> None:
    loading = load(name)
    alone = loading.steps(2)
    assert all(len(batches) == GLOBAL_BATCH for batches, _ in alone)
    assert len({content for batches, _ in alone for *_, content in batches}) > 3
    seen = {item.sample_id for _, dropped in alone for item in dropped}
    bad = 0 if name == "moving_digits" else 1 + bool(EXAMPLES[name].wrong)
    assert len(seen) == bad, "the wrong row and the damaged medium were met"
    assert loading.steps(2, workers=2) == alone
    assert loading.steps(2, world_size=2) == alone
    assert loading.steps(1, start=1, workers=1) == alone[1:], "a resumed run goes on where it was"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_nor_do_they_in_a_mixture_of_all_kinds(load: Callable[[str], Loading]) -> None:
    loading = load("mixture")
    number = len(loading.source) // GLOBAL_BATCH
    alone = loading.steps(number)
    assert {name.split("/")[0] for batches, _ in alone for names, *_ in batches for name in names} == {
        *(f"p{part}" for part in range(len(EXAMPLES))),
        "d",
    }
    for workers in (2, 4):
        assert loading.steps(number, workers=workers) == alone
    assert loading.steps(number, world_size=2, workers=1) == alone
    assert loading.steps(2, world_size=2, start=number - 2) == alone[-2:]
    for kind in ("grouped", "packed"):
        alone = loading.steps(5, kind)
        assert loading.steps(5, kind, world_size=2, workers=1) == alone
        assert loading.steps(5, kind, workers=4) == alone
