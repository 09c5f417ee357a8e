"""Rows as Arrow tables hold them: Hugging Face datasets, and Parquet files, which are copied into one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from theworld_train.config.errors import ConfigError, Problem

if TYPE_CHECKING:
    from datasets import Dataset

#: Columns of our own format; others, however large, are left alone.
OWN_COLUMNS = ("messages", "images", "id", "kind", "world")
#: Rows that are read at once when all of them are.
BATCH = 1000


class ArrowRows:
    """The rows of a dataset, memory-mapped."""

    def __init__(self, dataset: Dataset, name: str, label: str, place: str) -> None:
        """Keeps the dataset.

        Args:
            dataset: The rows.
            name: Names the dataset in problems.
            label: Names it in sample ids.
            place: What follows these two for a row, such as `[{}]`.
        """
        self.name = name
        # As Arrow stores it: no feature decodes an image, and none opens a path.
        self._dataset = dataset.with_format("arrow")
        self._label = label
        self._place = place

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
                yield {name: values[offset] for name, values in columns.items()}

    def where(self, index: int) -> str:
        """Returns the dataset's name and the row's number, counted from 0."""
        return f"{self.name}{self._place.format(index)}"

    def label(self, index: int) -> str:
        """Returns the same with the label."""
        return f"{self._label}{self._place.format(index)}"


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> ArrowRows:
    """Opens a Parquet file through the copy that `datasets` keeps in its cache, which makes any row quick to reach.

    Args:
        path: The file.
        columns: Those that are read if the file has them; all of them if None.

    Raises:
        ConfigError: If it is no Parquet file, or holds no rows.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        if not pq.read_metadata(path).num_rows:
            raise ConfigError(Problem("it holds no rows", source=str(path)))
        dataset = Dataset.from_parquet(str(path))
    except (OSError, ValueError, pa.ArrowException, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ConfigError(Problem(f"not a Parquet file that can be read: {cause}", source=str(path))) from error
    if columns is not None:
        dataset = dataset.select_columns([name for name in columns if name in dataset.column_names])
    return ArrowRows(dataset, str(path), path.name, "[{}]")


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
