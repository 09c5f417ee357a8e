"""Rows as files of text hold them: lines of JSON, elements of a JSON array, lines of TSV.

A file is indexed once, by the byte offsets of its rows, and a row is read from disk when it is asked for: memory stays
at a few bytes a row, however large the file is, and every problem names its row.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.data.order import Groups

#: Bytes of a JSON array that are searched at once; more if a single token is longer.
CHUNK = 1 << 20
#: What stands between two braces; a string, whose braces do not count, is passed over only if it ends.
BETWEEN_BRACES = re.compile(rb'[^"{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"{}]*+)*+', re.DOTALL)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowError(ValueError):
    """Raised for a row that cannot be decoded.

    Attributes:
        message: What is wrong.
        hint: How to mend it.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        """Args: message: what is wrong; hint: how to mend it."""
        super().__init__(message, hint)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Later:
    """Bytes of a clip that are read when they are needed.

    Attributes:
        read: Returns them.
    """

    read: Callable[[], bytes]


class Rows(Protocol):
    """A fixed number of stored rows; none is interpreted here.

    Attributes:
        name: Names the store in problems.
    """

    name: str

    def __len__(self) -> int:
        """Returns the number of rows."""
        ...

    def __getitem__(self, index: int) -> object:
        """Reads one row, whose embedded images and videos are `{"bytes": bytes, ...}` or bytes.

        Raises:
            RowError: If it cannot be decoded.
        """
        ...

    def outlines(self, indices: range) -> Iterator[object]:
        """Yields rows as `__getitem__` does, but with no bytes in embedded images, `Later` in embedded videos.

        In the place of a broken row comes a RowError.
        """
        ...

    def where(self, index: int) -> str:
        """Names a row in problems."""
        ...

    def label(self, index: int) -> str:
        """Names a row without the place of the file on this machine."""
        ...


@runtime_checkable
class GroupedRows(Rows, Protocol):
    """Rows of which some neighbouring ones are read at once.

    Attributes:
        groups: Which.
    """

    groups: Groups


class FileRows:
    """The rows of a text file, of which only their places are kept in memory."""

    def __init__(
        self,
        path: Path,
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        decode: Callable[[bytes], object],
        lines: NDArray[np.int64] | None = None,
    ) -> None:
        """Keeps the places of the rows.

        Args:
            path: The file.
            starts: `(rows,)` byte offset of each row.
            ends: `(rows,)` byte offset after each row.
            decode: Decodes the bytes of a row; raises RowError.
            lines: `(rows,)` line of each row, counted from 1; None if rows are counted, from 0.
        """
        self.name = str(path)
        self._path = path
        self._starts = starts
        self._ends = ends
        self._decode = decode
        self._lines = lines

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._starts)

    def __getitem__(self, index: int) -> object:
        """Reads one row; see `Rows`."""
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            return self._decode(file.read(self._ends[index] - self._starts[index]))

    def outlines(self, indices: range) -> Iterator[object]:
        """Yields rows in their order; see `Rows`."""
        with self._path.open("rb") as file:
            for index in indices:
                file.seek(self._starts[index])
                try:
                    yield self._decode(file.read(self._ends[index] - self._starts[index]))
                except RowError as error:
                    yield error

    def where(self, index: int) -> str:
        """Returns `path:line`, or `path[index]` for a row of an array."""
        return f"{self._path}{self._place(index)}"

    def label(self, index: int) -> str:
        """Returns the same with the file's name alone."""
        return f"{self._path.name}{self._place(index)}"

    def _place(self, index: int) -> str:
        return f"[{index}]" if self._lines is None else f":{self._lines[index]}"


def existing_file(name: str, kind: str) -> Path:
    """Returns the path of a file of rows.

    Raises:
        ConfigError: If there is no such file; `kind` says what was expected instead of a directory.
    """
    path = Path(name)
    if not path.is_file():
        message = f"is a directory, expected {kind}" if path.is_dir() else "no such file"
        raise ConfigError(Problem(message, source=name))
    return path


def json_lines(path: Path) -> FileRows:
    """Opens a JSONL file; blank lines are no rows."""
    starts, ends, lines = _index_lines(path)
    return FileRows(path, starts, ends, _decode_json_line, lines)


def tsv_lines(path: Path, columns: Sequence[str]) -> FileRows:
    """Opens a file of lines with tabs between their columns, and no header; rows are mappings of `columns`."""
    starts, ends, lines = _index_lines(path)
    return FileRows(path, starts, ends, partial(_decode_tsv_line, columns=tuple(columns)), lines)


def json_array(path: Path) -> FileRows:
    """Opens a JSON file that is an array of objects; it is searched for them, not decoded.

    Raises:
        ConfigError: If it is something else.
    """
    starts, ends = _index_array(path)
    return FileRows(path, starts, ends, decode_json)


def decode_json(data: bytes) -> Any:  # noqa: ANN401 (whatever the JSON says)
    """Decodes a JSON value in UTF-8.

    Raises:
        RowError: If it is none, or holds half of a surrogate pair.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"))
        if rb"\u" in data:
            # JSON can escape half of a surrogate pair, which no tokenizer takes.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RowError(f"not valid JSON: {error}") from error
    return value


def _decode_json_line(data: bytes) -> object:
    try:
        return decode_json(data)
    except RowError as error:
        hint = "every line is one JSON object in UTF-8, without line breaks inside it"
        raise RowError(error.message, hint) from error


def _decode_tsv_line(data: bytes, columns: tuple[str, ...]) -> object:
    try:
        values = data.decode("utf-8-sig").rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise RowError(f"not in UTF-8: {error}") from error
    if len(values) != len(columns):
        raise RowError(f"expected {len(columns)} columns, {' and '.join(columns)}, and found {len(values)}")
    return dict(zip(columns, values, strict=True))


def _index_lines(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns where each line that is not blank starts and ends, and its number, counted from 1."""
    starts, ends, lines = array("q"), array("q"), array("q")
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                starts.append(offset)
                ends.append(offset + len(line))
                lines.append(number)
            offset += len(line)
    return np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64), np.array(lines, dtype=np.int64)


def _index_array(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns where each object of an array starts and ends, found in one pass over the file.

    Between two objects may stand nothing but a comma, so that no element is passed over; what is wrong within an object
    is found when it is decoded.
    """
    search = _ArraySearch()
    offset, rest = 0, b""
    try:
        with path.open("rb") as file:
            while chunk := file.read(max(CHUNK, len(rest))):
                text = rest + chunk
                done = search.feed(text, offset)
                offset, rest = offset + done, text[done:]
        search.finish(whole=not rest)
    except ValueError as error:
        hint = "a file with an object a line is named .jsonl" if search.holds_lines else None
        raise ConfigError(Problem(f"not a JSON array of objects: {error}", source=str(path), hint=hint)) from None
    return np.array(search.starts, dtype=np.int64), np.array(search.ends, dtype=np.int64)


class _ArraySearch:
    """Finds the objects of an array in pieces of its text."""

    def __init__(self) -> None:
        self.starts = array("q")
        self.ends = array("q")
        self._depth = 0
        self._gap = b""  # what stands between two objects, without white space

    @property
    def holds_lines(self) -> bool:
        """Whether what went wrong is an object without an array around it."""
        return not self.starts and self._gap in (b"", BYTE_ORDER_MARK)

    def feed(self, text: bytes, offset: int) -> int:
        """Searches a piece of text that begins at an offset in the file, and returns how many bytes it is done with."""
        at = 0
        while True:
            passed = BETWEEN_BRACES.match(text, at)
            assert passed is not None, "the pattern matches nothing at all, too"
            end = passed.end()
            if self._depth == 0:
                self._gap += b"".join(text[at:end].split())
                if len(self._gap) > len(BYTE_ORDER_MARK + b"[]"):
                    raise ValueError(f"row {len(self.starts)} is something else, or nothing separates it")
            if end == len(text) or text[end : end + 1] == b'"':
                return end
            at = end + 1
            self._brace(text[end:at], offset + end)

    def _brace(self, brace: bytes, offset: int) -> None:
        if brace == b"{":
            if self._depth == 0:
                if self._gap not in ((b",",) if self.starts else (b"[", BYTE_ORDER_MARK + b"[")):
                    raise ValueError(f"row {len(self.starts)} has no {'comma' if self.starts else 'bracket'} before it")
                self.starts.append(offset)
            self._depth += 1
            return
        self._depth -= 1
        if self._depth < 0:
            raise ValueError(f"a brace closes before row {len(self.starts)} that none has opened")
        if self._depth == 0:
            self.ends.append(offset + 1)
            self._gap = b""

    def finish(self, whole: bool) -> None:
        """Says that there is no more text; `whole`: that none was left over."""
        if self._depth or not whole:
            raise ValueError(f"the file ends within row {len(self.ends)}")
        if self._gap not in ((b"]",) if self.starts else (b"[]", BYTE_ORDER_MARK + b"[]", b"")):
            raise ValueError(f"the array does not end after its {len(self.ends)} rows")
