"""The files that a preparation writes: the conversations as Parquet, and the rows that were left out."""

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

ROWS = "rows.parquet"
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
    """Both files, which get their names when they are complete, the conversations first.

    Without a row, there is no file of conversations.
    """

    def __init__(self, directory: Path) -> None:
        """Opens both in a directory; what an earlier attempt has left is overwritten."""
        self._directory = directory
        self._rows = pq.ParquetWriter(_partial(directory / ROWS), SCHEMA, use_dictionary=False)
        self._failed = _partial(directory / FAILED).open("w", encoding="utf-8")
        self._group: list[dict[str, Any]] = []
        self._group_bytes = 0
        self._written = 0

    def __enter__(self) -> Outputs:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Names both files, unless an error ends the writing."""
        if kind is None:
            self._flush()
        self._rows.close()
        self._failed.close()
        if kind is not None:
            return
        for name in (ROWS, FAILED):
            sync(_partial(self._directory / name))
        if self._written:
            os.replace(_partial(self._directory / ROWS), self._directory / ROWS)
        else:
            _partial(self._directory / ROWS).unlink()
        os.replace(_partial(self._directory / FAILED), self._directory / FAILED)
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
        if len(self._group) == GROUP_ROWS or self._group_bytes >= GROUP_BYTES:
            self._flush()

    def fail(self, row_id: str, outcome: Outcome) -> None:
        """Writes why a row was left out."""
        line = {"id": row_id, "url": outcome.url, "reason": outcome.reason, "detail": outcome.detail}
        self._failed.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _flush(self) -> None:
        if self._group:
            self._rows.write_table(pa.Table.from_pylist(self._group, SCHEMA))
        self._written += len(self._group)
        self._group, self._group_bytes = [], 0


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
