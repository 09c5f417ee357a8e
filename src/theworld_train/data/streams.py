"""Rows of Parquet shards, read where the shards lie: a stream of whole row groups, without a copy and without an index.

A Parquet file gives a row group at once and no single row. The order of training therefore takes the groups in turn,
and shuffles the rows of a few of them at a time: see `order.Groups`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.data.arrow import Places, with_clips_later
from theworld_train.data.order import SHUFFLED_GROUPS, Groups
from theworld_train.data.rows import RowError

#: Bytes of a row group, unpacked: a worker holds `SHUFFLED_GROUPS` of them, and as many without images and clips.
MAX_GROUP_BYTES = 512 * 2**20
#: The leaf of an image or clip that holds its file.
BYTES = ".bytes"


class StreamedRows:
    """The rows of Parquet shards; a process keeps the row groups that it has read last."""

    def __init__(self, name: str, shards: Sequence[Path], labels: Sequence[str], columns: Sequence[str]) -> None:
        """Reads the shards' footers.

        Args:
            name: Names all of them in problems.
            shards: The files.
            labels: Names each of them in sample ids.
            columns: Those that are read, if the shards have them; the first has to be there.

        Raises:
            ConfigError: With every shard that is damaged, has other columns than the first, or too large row groups.
        """
        self.name = name
        self._shards = tuple(map(str, shards))
        footers = _footers(shards, columns)
        schema = footers[0].schema.to_arrow_schema()
        self._columns = [column for column in columns if column in schema.names]
        self._outlined, self._unread = _leaves(footers[0], self._columns)
        sizes = [[footer.row_group(group).num_rows for group in range(footer.num_row_groups)] for footer in footers]
        #: Of each group: its shard, its number there, and the index of its first row.
        self._groups = [(shard, group) for shard, of in enumerate(sizes) for group in range(len(of))]
        rows = np.array([size for of in sizes for size in of], dtype=np.int64)
        self._ends = np.cumsum(rows)
        self.groups = Groups(rows)
        self._places = Places(self._shards, tuple(labels), np.cumsum([sum(of) for of in sizes]))
        self._read: OrderedDict[int, pa.Table] = OrderedDict()
        self._read_outlined: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        """Returns the number of rows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> object:
        """Reads one row, and with it its row group if it was not among the last; see `Rows`."""
        group, offset = self._locate(index)
        return self._kept(self._read, group, self._columns).slice(offset, 1).to_pylist()[0]

    def outlines(self, indices: range) -> Iterator[object]:
        """Yields rows whose images are empty bytes, which are not read, nor whether there are any; see `Rows`.

        In the place of each row of a group that cannot be read comes a RowError.
        """
        for group, members in groupby(indices, key=lambda index: self._locate(index)[0]):
            try:
                table = self._kept(self._read_outlined, group, self._outlined)
            except OSError as error:
                yield from (RowError(f"cannot be read: {error}") for _ in members)
                continue
            for index in members:
                row = table.slice(self._locate(index)[1], 1).to_pylist()[0]
                row = {name: _with_bytes(value) if name in self._unread else value for name, value in row.items()}
                yield with_clips_later(row, partial(self.__getitem__, index))

    def where(self, index: int) -> str:
        """Returns the path of the shard and the row's number in it, counted from 0."""
        return self._places.where(index)

    def label(self, index: int) -> str:
        """Returns the label of the shard and the row's number in it."""
        return self._places.label(index)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the row groups that were read."""
        return {**self.__dict__, "_read": OrderedDict(), "_read_outlined": OrderedDict()}

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the group of a row, and its number in it."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def _kept(self, kept: OrderedDict[int, pa.Table], group: int, columns: Sequence[str]) -> pa.Table:
        """Returns a group from among those that were read last, where it is put if it is not there."""
        table = kept.pop(group, None)
        kept[group] = self._table(group, columns) if table is None else table
        while len(kept) > SHUFFLED_GROUPS:
            kept.popitem(last=False)
        return kept[group]

    def _table(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Reads a group; raises OSError, which names group and file."""
        shard, number = self._groups[group]
        try:
            with pq.ParquetFile(self._shards[shard]) as file:
                return file.read_row_group(number, columns=list(columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise OSError(f"row group {number} of {self._shards[shard]}: {error}") from error


def _footers(shards: Sequence[Path], columns: Sequence[str]) -> list[pq.FileMetaData]:
    """Reads what the shards say of themselves, and makes sure that they are of one kind."""
    footers: list[pq.FileMetaData] = []
    problems: list[Problem] = []
    for shard in shards:
        try:
            footer = pq.read_metadata(shard)
            footer.schema.to_arrow_schema()
        except (OSError, ValueError, pa.ArrowException) as error:
            problems.append(Problem(f"not a Parquet file that can be read: {error}", source=str(shard)))
            continue
        problems += _shard_problems(str(shard), footer, footers[0] if footers else None, columns)
        footers.append(footer)
    if problems:
        raise ConfigError(problems)
    return footers


def _shard_problems(
    shard: str, footer: pq.FileMetaData, first: pq.FileMetaData | None, columns: Sequence[str]
) -> Iterator[Problem]:
    schema = footer.schema.to_arrow_schema()
    if columns[0] not in schema.names:
        yield Problem(f"the shard has no column {columns[0]!r}", source=shard)
    if first is not None:
        expected = first.schema.to_arrow_schema()
        for name in columns:
            own, other = (of.field(name).type if name in of.names else None for of in (schema, expected))
            if own != other:
                yield Problem(f"the column is {own}, and {other} in the first shard", source=shard, key=name)
    largest = max((footer.row_group(group).total_byte_size for group in range(footer.num_row_groups)), default=0)
    if largest > MAX_GROUP_BYTES:
        message = f"a row group has {largest:,} bytes, and {MAX_GROUP_BYTES:,} are allowed in a stream"
        yield Problem(message, source=shard, hint="write it in smaller row groups, or set streaming: false")


def _leaves(footer: pq.FileMetaData, columns: Sequence[str]) -> tuple[list[str], set[str]]:
    """Returns the leaves of some columns without the bytes of images and clips, and the columns that had these.

    A column of plain bytes is read all the same: nothing else in it says how many there are.
    """
    paths = [footer.schema.column(leaf).path for leaf in range(footer.num_columns)]
    paths = [path for path in paths if path.split(".")[0] in columns]
    outlined = [path for path in paths if not path.endswith(BYTES) or not _has_others(path, paths)]
    return outlined, {path.split(".")[0] for path in paths if path not in outlined}


def _has_others(path: str, paths: Sequence[str]) -> bool:
    """Whether the structure that a leaf belongs to has other leaves, by which its rows can be told."""
    folder = path.removesuffix(BYTES) + "."
    return any(other.startswith(folder) and other != path for other in paths)


def _with_bytes(value: Any) -> Any:  # noqa: ANN401 (whatever the column holds)
    """Returns the images of a row with empty bytes where these were not read."""
    if isinstance(value, list):
        return [_with_bytes(item) for item in value]
    return {**value, "bytes": b""} if isinstance(value, dict) else value
