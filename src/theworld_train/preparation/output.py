"""The files that a preparation writes: the conversations as shards of Parquet, and the rows that were left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from theworld_train.checkpoint_files import sync
from theworld_train.preparation.rows import Row
from theworld_train.preparation.spool import Outcome

#: Name of a shard of conversations, by its number.
SHARD = "rows-{:05}.parquet"
FAILED = "failed.jsonl"
#: Our own format, which `source: parquet` reads; `urls` says where the images come from, and is not read.
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "kind": pa.string(),
        "world": pa.bool_(),
        "messages": pa.list_(
            pa.struct(
                {
                    "role": pa.string(),
                    "content": pa.list_(pa.struct({"type": pa.string(), "text": pa.string(), "index": pa.int64()})),
                }
            )
        ),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "urls": pa.list_(pa.string()),
    }
)
#: A group of rows ends with the row that reaches either.
GROUP_ROWS = 1000
GROUP_BYTES = 64 * 2**20


class Outputs:
    """All files, which get their names when they are complete, the conversations first.

    Without a row, there is no shard.
    """

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        """Opens a directory.

        Args:
            directory: Where the files are written; what an earlier attempt has left is overwritten.
            shard_bytes: Bytes of images with which a shard ends, that of its last group of rows included.
        """
        self._directory = directory
        self._limit = shard_bytes
        self._failed = _partial(directory / FAILED).open("w", encoding="utf-8")
        self._group: list[dict[str, Any]] = []
        self._group_bytes = 0
        self._shards: list[Path] = []
        self._shard: pq.ParquetWriter | None = None
        self._shard_bytes = 0

    def __enter__(self) -> Outputs:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Names all files, unless an error ends the writing."""
        if kind is None:
            self._flush()
        self._end_shard()
        self._failed.close()
        if kind is not None:
            return
        paths = [*self._shards, self._directory / FAILED]
        for path in paths:
            sync(_partial(path))
        for path in paths:
            os.replace(_partial(path), path)
        sync(self._directory)

    def keep(self, row: Row, images: list[bytes]) -> None:
        """Writes a row with the bytes of its images, in the order of its URLs."""
        self._group.append(
            {
                "id": row.id,
                "kind": row.kind,
                "world": row.world,
                "messages": row.messages,
                "images": [{"bytes": data, "path": None} for data in images],
                "urls": list(row.urls),
            }
        )
        self._group_bytes += sum(map(len, images))
        if len(self._group) == GROUP_ROWS or self._group_bytes >= min(GROUP_BYTES, self._limit):
            self._flush()

    def fail(self, row_id: str, outcome: Outcome) -> None:
        """Writes why a row was left out."""
        line = {"id": row_id, "url": outcome.url, "reason": outcome.reason, "detail": outcome.detail}
        self._failed.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _flush(self) -> None:
        if not self._group:
            return
        if self._shard is None:
            self._shards.append(self._directory / SHARD.format(len(self._shards)))
            self._shard = pq.ParquetWriter(_partial(self._shards[-1]), SCHEMA, use_dictionary=False)
        self._shard.write_table(pa.Table.from_pylist(self._group, SCHEMA))
        self._shard_bytes += self._group_bytes
        self._group, self._group_bytes = [], 0
        if self._shard_bytes >= self._limit:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
        self._shard, self._shard_bytes = None, 0


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
