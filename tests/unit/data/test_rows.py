"""Rows of text files: each is found where it lies, and none is passed over in silence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from theworld_train.config.errors import ConfigError
from theworld_train.data.rows import RowError, json_array, json_lines, tsv_lines

ROWS: list[dict[str, Any]] = [
    {},
    {"a": 1},
    {"a": "brace } in { text", "b": ["]", "[", {"c": {}}]},
    {"quote": '\\" } \\\\', "counts": "PP]{0\\"},
    {"ü": "\u2028 😀", "long": "x" * 300},
    {"a": [[], [{}], {"b": [1, 2.5, None, True]}]},
]


def read(path: Path) -> list[object]:
    rows = json_array(path)
    assert list(rows.outlines(range(len(rows)))) == [rows[index] for index in range(len(rows))]
    return [rows[index] for index in range(len(rows))]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_objects_are_found_however_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    monkeypatch.setattr("theworld_train.data.rows.CHUNK", chunk)
    path = tmp_path / "rows.json"
    for ascii_only in (True, False):
        path.write_text(json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
        assert read(path) == ROWS


def test_random_arrays_are_read_as_json_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("theworld_train.data.rows.CHUNK", 16)
    draw = random.Random(0)

    def value(depth: int) -> Any:
        kind = draw.randrange(6 if depth else 4)
        if kind < 3:
            return "".join(draw.choice('"\\{}[],: a\n\u00fc') for _ in range(draw.randrange(12)))
        if kind == 3:
            return draw.choice([None, True, 3, -2.5])
        if kind == 4:
            return [value(depth - 1) for _ in range(draw.randrange(4))]
        return {str(number): value(depth - 1) for number in range(draw.randrange(4))}

    path = tmp_path / "rows.json"
    for _ in range(100):
        rows = [{"row": value(3)} for _ in range(draw.randrange(5))]
        text = json.dumps(rows, indent=draw.choice([None, 1]), ensure_ascii=draw.random() < 0.5)
        path.write_text(draw.choice(["", "\ufeff", " \n"]) + text + draw.choice(["", "\n\n"]), encoding="utf-8")
        assert read(path) == rows


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', "row 0 has no bracket before it; a file with an object a line is named .jsonl"),
        ('{"a": 1}\n{"a": 2}\n', "row 0 has no bracket before it; a file with an object a line is named .jsonl"),
        ('[{"a": 1}, {"a": 2}', "the array does not end after its 2 rows"),
        ('[{"a": 1}, {"a": 2', "the file ends within row 1"),
        ('[{"a": 1}, {"a": "2', "the file ends within row 1"),
        ('[{"a": 1} {"a": 2}]', "row 1 has no comma before it"),
        ('[{"a": 1},, {"a": 2}]', "row 1 has no comma before it"),
        ('[{"a": 1}, 3, {"a": 2}]', "row 1 has no comma before it"),
        ('[{"a": 1}, 12345, {"a": 2}]', "row 1 is something else"),
        ('[{"a": 1}, "text of some length", {"a": 2}]', "row 1 is something else"),
        ('[{"a": 1}, [{"a": 2}]]', "row 1 has no comma before it"),
        ('[{"a": 1}}, {"a": 2}]', "a brace closes before row 1 that none has opened"),
        ('[{"a": 1}],', "the array does not end after its 1 rows"),
        ('[{"a": 1}, ]', "the array does not end after its 1 rows"),
        ("[1, 2, 3, 4, 5]", "row 0 is something else"),
        ('"text"', "row 0 is something else"),
        ("null", "the array does not end after its 0 rows"),
        ('{"data": [{"a": 1}]}', "row 0 has no bracket before it"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_what_is_no_array_of_objects_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str, chunk: int
) -> None:
    monkeypatch.setattr("theworld_train.data.rows.CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        json_array(path)
    assert f"{path}: not a JSON array of objects: " in str(caught.value)
    assert expected in str(caught.value)


def test_a_row_that_is_broken_within_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a" 2}, {"a": "\\ud83d"}, {"a": 3}]')
    rows = json_array(path)
    first, second, third, fourth = rows.outlines(range(4))
    assert (first, fourth) == ({"a": 1}, {"a": 3})
    assert isinstance(second, RowError)
    assert isinstance(third, RowError)
    assert "surrogates not allowed" in str(third)
    assert (rows.where(1), rows.label(1)) == (f"{path}[1]", "rows.json[1]")
    with pytest.raises(RowError, match="not valid JSON"):
        rows[1]


def test_an_array_is_searched_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is read twice, to go on in the middle of a long string, grows with the string and not with the file."""
    monkeypatch.setattr("theworld_train.data.rows.CHUNK", 256)
    path = tmp_path / "rows.json"
    text = json.dumps([{"a": "x" * 5000}, *({"a": index} for index in range(5000))])
    path.write_text(text)
    searched = 0

    class Counted:
        def match(self, piece: bytes, at: int) -> Any:
            nonlocal searched
            found = pattern.match(piece, at)
            assert found is not None
            searched += max(found.end() - at, 1)
            return found

    from theworld_train.data import rows as module

    pattern = module.BETWEEN_BRACES
    monkeypatch.setattr(module, "BETWEEN_BRACES", Counted())
    assert len(json_array(path)) == 5001
    assert searched < 2 * len(text)


def test_lines_of_json_and_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    rows = json_lines(path)
    assert [rows[index] for index in range(len(rows))] == [{"a": 1}, {"a": 2}]
    assert [rows.where(index) for index in range(2)] == [f"{path}:1", f"{path}:3"]
    path = tmp_path / "rows.tsv"
    path.write_bytes('\ufeffa cup, "red"\ta.jpg\r\nein Löffel\tb.jpg\n'.encode())
    rows = tsv_lines(path, ("caption", "image"))
    assert [rows[index] for index in range(len(rows))] == [
        {"caption": 'a cup, "red"', "image": "a.jpg"},
        {"caption": "ein Löffel", "image": "b.jpg"},
    ]
    path.write_bytes(b"\xff\ta.jpg\n")
    with pytest.raises(RowError, match="not in UTF-8"):
        tsv_lines(path, ("caption", "image"))[0]
