"""Prepares a file of rows: checks all of it, fetches what it names, and writes the result in the order of the rows.

The files of the result depend on the rows and on what the servers gave, and not on the order in which that came
or on how often the command was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from theworld_train.checkpoint_files import file_sha256, sync
from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.data.files import rows_by_suffix
from theworld_train.data.formats import CaptionFormat, Format, own_format
from theworld_train.data.images import decode_image
from theworld_train.data.rows import Rows, existing_file
from theworld_train.data.source import MediaError, first_problems
from theworld_train.preparation.download import Downloader, DownloadError, Limits
from theworld_train.preparation.output import FAILED, Outputs
from theworld_train.preparation.rows import RemoteRows, Row
from theworld_train.preparation.spool import Outcome, Spool
from theworld_train.train.run_lock import run_lock

FORMATS = ("captions", "conversations")
#: What was asked for, written first; a directory without it is not ours.
RECORD = "prepare.json"
#: What has become of it, written last; a directory with it is complete.
REPORT = "report.json"
SPOOL = ".fetched"
#: Version of the record, of which a version of this program reads its own alone.
VERSION = 2
#: Downloads that are waiting for a connection, for each connection.
AHEAD = 4
#: URLs between two lines that say how far it is.
SAY_EVERY = 10_000


@dataclass(frozen=True)
class Settings:
    """What is prepared, and how.

    Attributes:
        rows: The file of rows, or a directory whose Parquet files are read one after the other.
        out: The directory that is written.
        format: What a row is, one of `FORMATS`.
        image_key: Field of a caption's image URL.
        text_key: Field of the caption.
        questions: What the user asks for a caption, taken in turn.
        unique_images: Whether rows are left out whose images an earlier row has, whatever they say.
        shard_bytes: Bytes of images with which a file of the result ends.
        connections: Downloads at once.
        max_total_bytes: Most bytes of all downloads.
        limits: What one download may take.
    """

    rows: str
    out: str
    format: str = "captions"
    image_key: str = "url"
    text_key: str = "caption"
    questions: tuple[str, ...] = ("Describe the image.",)
    unique_images: bool = False
    shard_bytes: int = 2**30
    connections: int = 16
    max_total_bytes: int = 100 * 2**30
    limits: Limits = field(default_factory=Limits)

    def record(self, path: Path) -> dict[str, Any]:
        """Returns what the result depends on, as plain values."""
        return {
            "version": VERSION,
            "rows_sha256": _digest(path),
            "format": self.format,
            "image_key": self.image_key,
            "text_key": self.text_key,
            "questions": list(self.questions),
            "unique_images": self.unique_images,
            "shard_bytes": self.shard_bytes,
            "max_file_bytes": self.limits.file_bytes,
            "ports": sorted(self.limits.ports),
        }


@dataclass(frozen=True)
class Report:
    """What has become of the rows.

    Attributes:
        rows: Rows of the file.
        kept: Rows that were written.
        duplicates: Rows left out as they hold what an earlier row holds.
        failed: Rows left out by why an image of them could not be had.
        images: Different images that were written.
        image_bytes: Their bytes.
    """

    rows: int
    kept: int
    duplicates: int
    failed: dict[str, int]
    images: int
    image_bytes: int

    def __str__(self) -> str:
        """Says it in a line or two."""
        failed = sum(self.failed.values())
        rows = f"{self.rows:,} row{'s' if self.rows != 1 else ''}"
        text = f"{rows}: {self.kept:,} kept, {self.duplicates:,} duplicates, {failed:,} failed"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.failed.items())
        return f"{text}{f' ({reasons})' if reasons else ''}; {self.images:,} images, {self.image_bytes:,} bytes"


class _TotalReachedError(Exception):
    """Raised in a download once all of them together have taken what they may."""


def prepare(settings: Settings, downloader: Downloader, say: Callable[[str], object] = lambda line: None) -> Report:
    """Fetches the images that rows name, and writes conversations that hold them.

    What is done already is not fetched again; a directory that is complete is only reported.

    Args:
        settings: What to do.
        downloader: Fetches single files.
        say: Takes a line now and then.

    Raises:
        ConfigError: Before the first connection, if the rows, the settings or the directory are wrong; later, if the
            downloads reach `max_total_bytes`, or no row could be kept.
    """
    path = Path(settings.rows)
    if not path.is_dir():
        existing_file(settings.rows, "a file of rows")
    rows = RemoteRows(_open(settings, path), _format(settings))
    if problems := first_problems(rows.problems(), settings.rows):
        raise ConfigError(problems)
    if not len(rows):
        raise ConfigError(Problem("it holds no rows", source=settings.rows))
    _require_some_url(rows, settings, downloader)
    out = Path(settings.out)
    _claim(out, settings.record(path))
    with run_lock(out, "prepare", "OUT"):
        if not (out / REPORT).is_file():
            with Spool(out / SPOOL) as spool:
                _fetch(rows, spool, settings, downloader, say)
                report = _write(rows, spool, out, settings)
            _replace(out / REPORT, json.dumps(asdict(report), indent=2) + "\n")
        shutil.rmtree(out / SPOOL, ignore_errors=True)
    report = Report(**json.loads((out / REPORT).read_text()))
    if not report.kept:
        hint = f"if the network was at fault, delete {out} and run the command again"
        raise ConfigError(Problem(f"no row could be kept: {report}", source=str(out / FAILED), hint=hint))
    say(f"written: {out}, for source: parquet")
    return report


# -- before the first connection --------------------------------------------------------------------------------------


def _open(settings: Settings, path: Path) -> Rows:
    if settings.format not in FORMATS:
        hint = did_you_mean(settings.format, FORMATS)
        raise ConfigError(Problem("unknown format", key="--format", value=settings.format, hint=hint))
    if path.is_dir():
        from theworld_train.data.arrow import parquet_rows  # takes pyarrow along, which text files do without

        return parquet_rows(path)
    columns = (settings.text_key, settings.image_key) if settings.format == "captions" else ()
    return rows_by_suffix(path, f"--format {settings.format}", columns)


def _digest(path: Path) -> str:
    """Returns a digest of a file of rows, or of the Parquet files of a directory and their names."""
    if not path.is_dir():
        return file_sha256(path)
    digest = hashlib.sha256()
    for shard in sorted(path.glob("*.parquet")):
        digest.update(f"{shard.name}\0{file_sha256(shard)}\n".encode())
    return digest.hexdigest()


def _format(settings: Settings) -> Format:
    if settings.format == "captions":
        return CaptionFormat(settings.image_key, settings.text_key, settings.questions)
    return own_format


def _require_some_url(rows: Iterable[Row], settings: Settings, downloader: Downloader) -> None:
    """Refuses a file of which nothing could be fetched: single rows may be hopeless, but not all of them."""
    first = None
    for url in (url for row in rows for url in row.urls):
        try:
            downloader.parse(url)
        except DownloadError as error:
            first = first or (url, error.detail)
        else:
            return
    hint = "name the field that holds the URLs by --image-key" if settings.format == "captions" else None
    message = (
        f"no row names an image that can be fetched; the first one: {first[1]}" if first else "no row names an image"
    )
    raise ConfigError(Problem(message, source=settings.rows, value=first[0] if first else None, hint=hint))


def _claim(out: Path, record: dict[str, Any]) -> None:
    """Makes the directory ours, or makes sure that it is, and of the same rows and settings."""
    path = out / RECORD
    if path.is_file():
        known = json.loads(path.read_text())
        differing = [
            Problem(f"the directory was begun with {known.get(key)!r}", source=str(path), key=key, value=value)
            for key, value in record.items()
            if known.get(key) != value
        ]
        if differing:
            differing[-1] = replace(differing[-1], hint="go on with the same rows and settings, or choose another OUT")
            raise ConfigError(differing)
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        message = "exists, and was not written by this command"
        raise ConfigError(Problem(message, key="OUT", value=str(out), hint="choose a new directory"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(Problem(f"cannot be written to: {error.strerror}", key="OUT", value=str(out))) from error


# -- fetching ---------------------------------------------------------------------------------------------------------


class _Budget:
    """Bytes that all downloads together may still take."""

    def __init__(self, left: int) -> None:
        self._left = left
        self._lock = threading.Lock()

    def spend(self, count: int) -> None:
        with self._lock:
            self._left -= count
            if self._left < 0:
                raise _TotalReachedError


class _Fetching:
    """Fetches one URL after the other, in several threads."""

    def __init__(self, downloader: Downloader, spool: Spool, budget: _Budget) -> None:
        self._downloader = downloader
        self._spool = spool
        self._budget = budget
        # Decoding is bound by the processors, and a large image takes hundreds of megabytes meanwhile. Threads that
        # decode share Pillow's warning filters; what refuses a large image does not depend on them.
        self._decoding = threading.Semaphore(os.cpu_count() or 1)

    def __call__(self, url: str) -> Outcome:
        received = 0

        def spend(count: int) -> None:
            nonlocal received
            received += count
            self._budget.spend(count)

        try:
            data = self._downloader.fetch(url, spend)
            with self._decoding:
                decode_image(data, "image")  # looks at the header first, and says what is damaged
        except DownloadError as error:
            return Outcome(url, received, reason=error.reason, detail=error.detail)
        except MediaError as error:
            return Outcome(url, received, reason="not an image", detail=str(error).removeprefix("image: "))
        return Outcome(url, received, sha256=self._spool.keep(data))


def _fetch(
    rows: Iterable[Row], spool: Spool, settings: Settings, downloader: Downloader, say: Callable[[str], object]
) -> None:
    """Fetches every URL that is not done yet, each once."""
    work = _Fetching(downloader, spool, _Budget(settings.max_total_bytes - spool.received))
    pool = ThreadPoolExecutor(settings.connections)
    running: set[Future[Outcome]] = set()
    try:
        if spool.outcomes:
            say(f"going on: {len(spool.outcomes):,} URLs are done")
        for url in _missing(rows, spool):
            running.add(pool.submit(work, url))
            if len(running) >= AHEAD * settings.connections:
                running = _collect(running, spool, say)
        while running:
            running = _collect(running, spool, say)
    except _TotalReachedError:
        message = (
            f"the downloads have reached {settings.max_total_bytes:,} bytes; {len(spool.outcomes):,} URLs are done"
        )
        hint = "what is done is kept: raise it, and run the command again"
        raise ConfigError(Problem(message, key="--max-total-bytes", hint=hint)) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _missing(rows: Iterable[Row], spool: Spool) -> Iterator[str]:
    asked = set(spool.outcomes)
    for row in rows:
        for url in row.urls:
            if url not in asked:
                asked.add(url)
                yield url


def _collect(running: set[Future[Outcome]], spool: Spool, say: Callable[[str], object]) -> set[Future[Outcome]]:
    """Waits for a download, records those that are done, and returns the others; raises what one of them did."""
    done, rest = wait(running, return_when=FIRST_COMPLETED)
    errors = [error for future in done if (error := future.exception()) is not None]
    for future in done:
        if future.exception() is None:
            spool.record(future.result())
            if len(spool.outcomes) % SAY_EVERY == 0:
                say(f"{len(spool.outcomes):,} URLs are done")
    if errors:
        raise errors[0]
    return rest


# -- writing ----------------------------------------------------------------------------------------------------------


def _write(rows: RemoteRows, spool: Spool, out: Path, settings: Settings) -> Report:
    """Writes what was fetched, in the order of the rows."""
    seen: set[bytes] = set()
    images: dict[str, int] = {}
    failed: Counter[str] = Counter()
    kept = duplicates = 0
    with Outputs(out, settings.shard_bytes) as outputs:
        for row in rows:
            outcomes = [spool.outcomes[url] for url in row.urls]
            failure = next((outcome for outcome in outcomes if outcome.reason is not None), None)
            if failure is not None and failure.reason is not None:
                failed[failure.reason] += 1
                outputs.fail(row.id, failure)
                continue
            digests = [str(outcome.sha256) for outcome in outcomes]
            holds = digests if settings.unique_images and digests else [row.messages, digests]
            content = hashlib.sha256(json.dumps(holds).encode()).digest()
            if content in seen:
                duplicates += 1
                continue
            seen.add(content)
            kept += 1
            images |= {digest: outcome.received for digest, outcome in zip(digests, outcomes, strict=True)}
            outputs.keep(row, [spool.read(digest) for digest in digests])
    return Report(len(rows), kept, duplicates, dict(sorted(failed.items())), len(images), sum(images.values()))


def _replace(path: Path, text: str) -> None:
    """Writes a small file, which is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)
