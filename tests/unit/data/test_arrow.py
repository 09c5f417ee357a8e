"""Arrow tables: rows as they are stored, and outlines that read no image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from theworld_train.config.errors import ConfigError
from theworld_train.config.sources import ParquetSource
from theworld_train.data import open_source
from theworld_train.data.arrow import ArrowRows, Places, _without_bytes, parquet_rows


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
X, NONE = {"bytes": b"xyz", "path": "x"}, {"bytes": None, "path": "y"}
#: X without its pixels.
EMPTY = {"bytes": b"", "path": "x"}
COLUMNS: list[tuple[pa.DataType, list[Any], list[Any]]] = [
    (pa.binary(), [b"xyz", None, b""], [b"", None, b""]),
    (pa.large_binary(), [b"xyz", None], [b"", None]),
    (IMAGE, [X, None, NONE], [EMPTY, None, NONE]),
    (pa.list_(IMAGE), [[X], None, [], [None, NONE, X]], [[EMPTY], None, [], [None, NONE, EMPTY]]),
    (pa.list_(pa.binary()), [[b"x", b"y"], [], None, [None]], [[b"", b""], [], None, [None]]),
    (pa.string(), ["x", None], ["x", None]),
    (pa.list_(pa.struct([("text", pa.string())])), [[{"text": "x"}], None, [None]], [[{"text": "x"}], None, [None]]),
]


@pytest.mark.parametrize(("kind", "values", "expected"), COLUMNS, ids=[str(kind) for kind, *_ in COLUMNS])
def test_bytes_become_empty_and_all_else_stays(
    kind: pa.DataType, values: list[Any], expected: list[Any] | None
) -> None:
    array = pa.array(values * 3, type=kind)
    assert _without_bytes(array) == expected * 3
    for start in range(1, len(values)):
        assert _without_bytes(array[start : start + 2]) == (expected * 3)[start : start + 2]


def test_rows_and_outlines_of_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("theworld_train.data.arrow.BATCH", 2)
    images = List(ImageFeature(decode=False))
    features = Features({"images": images, "id": Value("string")})
    rows = [{"images": [{"bytes": b"x" * number, "path": None}] * number, "id": str(number)} for number in range(5)]
    stored = ArrowRows(
        Dataset.from_list(rows, features=features), "a", Places(("a/x", "a/y"), ("x", "y"), np.array([3, 5]))
    )
    assert [stored[index] for index in range(5)] == rows
    outlines = list(stored.outlines(range(1, 5)))
    assert outlines == [{**row, "images": [{"bytes": b"", "path": None}] * len(row["images"])} for row in rows[1:]]
    assert [stored.where(index) for index in (0, 2, 3)] == ["a/x[0]", "a/x[2]", "a/y[0]"]
    assert [stored.label(index) for index in (2, 4)] == ["x[2]", "y[1]"]


def test_a_parquet_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    import os

    path = tmp_path / "a.parquet"
    for value in (1, 2):
        Dataset.from_dict({"x": [value] * value}).to_parquet(path)
        os.utime(path, (value, value))
        rows = parquet_rows(path)
        assert [rows[index] for index in range(len(rows))] == [{"x": value}] * value


def test_columns_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"id": ["x"], "vector": [[0.5] * 8]}).to_parquet(path)
    assert parquet_rows(path, ("id", "messages"))[0] == {"id": "x"}


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet"])
def test_what_is_no_parquet_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.parquet: not a Parquet file"):
        open_source(ParquetSource(source="parquet", path=str(path)))
