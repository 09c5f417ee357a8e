"""Rows as Arrow tables hold them: Hugging Face datasets, and Parquet files, which are copied into one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.data.rows import Later, existing_file

if TYPE_CHECKING:
    from datasets import Dataset

#: Columns of our own format; others, however large, are left alone.
OWN_COLUMNS = ("messages", "images", "videos", "id", "kind", "world")
#: Columns that hold clips, whose bytes tell how many frames there are.
VIDEO_COLUMNS = ("video", "videos")
#: Rows that are read at once when all of them are.
BATCH = 1000


@dataclass(frozen=True)
class Places:
    """How rows of tables that follow each other are called: by their table, and their number in it, counted from 0.

    Attributes:
        names: Of each table, its name in problems.
        labels: Its name in sample ids.
        ends: `(tables,)` number of the row behind its last.
        place: What follows these names for a row.
    """

    names: Sequence[str]
    labels: Sequence[str]
    ends: NDArray[np.int64]
    place: str = "[{}]"

    def where(self, index: int) -> str:
        """Names a row in problems."""
        return self._named(self.names, index)

    def label(self, index: int) -> str:
        """Names a row in sample ids."""
        return self._named(self.labels, index)

    def _named(self, names: Sequence[str], index: int) -> str:
        table = int(np.searchsorted(self.ends, index, side="right"))
        return names[table] + self.place.format(index - (int(self.ends[table - 1]) if table else 0))


class ArrowRows:
    """The rows of a dataset, memory-mapped."""

    def __init__(self, dataset: Dataset, name: str, places: Places) -> None:
        """Keeps the dataset.

        Args:
            dataset: The rows.
            name: Names the dataset in problems.
            places: Names its rows.
        """
        self.name = name
        # As Arrow stores it: no feature decodes an image, and none opens a path.
        self._dataset = dataset.with_format("arrow")
        self._places = places

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> object:
        """Reads one row; see `Rows`."""
        return self._dataset[index : index + 1].to_pylist()[0]

    def outlines(self, indices: range) -> Iterator[object]:
        """Yields rows whose embedded images are empty bytes, or None where there are none; see `Rows`."""
        for start in range(indices.start, indices.stop, BATCH):
            table = self._dataset[start : min(start + BATCH, indices.stop)]
            columns = {
                name: [value for chunk in column.chunks for value in _without_bytes(chunk)]
                for name, column in zip(table.column_names, table.columns, strict=True)
            }
            for offset in range(len(table)):
                row = {name: values[offset] for name, values in columns.items()}
                yield with_clips_later(row, partial(self.__getitem__, start + offset))

    def where(self, index: int) -> str:
        """Returns the dataset's name and the row's number, counted from 0."""
        return self._places.where(index)

    def label(self, index: int) -> str:
        """Returns the same with the label."""
        return self._places.label(index)


def parquet_shards(path: Path) -> list[Path]:
    """Returns a Parquet file, or the Parquet files of a directory in the order of their names.

    Raises:
        ConfigError: If there is none.
    """
    shards = sorted(path.glob("*.parquet")) if path.is_dir() else [existing_file(str(path), "a Parquet file")]
    if not shards:
        raise ConfigError(Problem("the directory holds no Parquet files", source=str(path)))
    return shards


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> ArrowRows:
    """Opens Parquet files through the copy that `datasets` keeps in its cache, which makes any row quick to reach.

    Args:
        path: A file, or a directory of files that are alike.
        columns: Those that are read if the files have them; all of them if None.

    Raises:
        ConfigError: If one is no Parquet file, or there are no rows.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        shards = parquet_shards(path)
        ends = np.cumsum([pq.read_metadata(shard).num_rows for shard in shards])
        if not ends[-1]:
            raise ConfigError(Problem("it holds no rows", source=str(path)))
        dataset = Dataset.from_parquet([str(shard) for shard in shards])
    except (OSError, ValueError, pa.ArrowException, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ConfigError(Problem(f"not a Parquet file that can be read: {cause}", source=str(path))) from error
    if columns is not None:
        dataset = dataset.select_columns([name for name in columns if name in dataset.column_names])
    places = Places([str(shard) for shard in shards], [shard.name for shard in shards], ends)
    return ArrowRows(dataset, str(path), places)


def with_clips_later(row: dict[str, object], read: Callable[[], Any]) -> dict[str, object]:
    """Returns an outline whose clips have bytes that are read when they are needed.

    Args:
        row: The outline.
        read: Returns the row whole.
    """

    def later(value: object, path: tuple[int | str, ...]) -> object:
        if isinstance(value, list):
            return [later(item, (*path, number)) for number, item in enumerate(value)]
        if isinstance(value, dict) and value.get("bytes") is not None:
            return {**value, "bytes": later(value["bytes"], (*path, "bytes"))}
        return Later(lambda: reduce(getitem, path, read())) if isinstance(value, bytes) else value

    return {name: later(value, (name,)) if name in VIDEO_COLUMNS else value for name, value in row.items()}


def _without_bytes(array: pa.Array) -> list[object]:
    """Returns an array's values, with empty bytes for the bytes of images, which are not read."""
    kind = array.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [b"" if present else None for present in array.is_valid().to_pylist()]
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        rest = [field for field in (kind.field(i).name for i in range(kind.num_fields)) if field != "bytes"]
        columns = {
            "bytes": _without_bytes(array.field("bytes")),
            **{name: array.field(name).to_pylist() for name in rest},
        }
        present = array.is_valid().to_pylist()
        return [
            {name: values[index] for name, values in columns.items()} if present[index] else None
            for index in range(len(array))
        ]
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _holds_bytes(kind.value_type):
        values = iter(_without_bytes(array.flatten()))
        lengths = array.value_lengths().to_pylist()
        return [None if length is None else [next(values) for _ in range(length)] for length in lengths]
    found: list[object] = array.to_pylist()
    return found


def _holds_bytes(kind: pa.DataType) -> bool:
    is_image = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    return bool(is_image or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
