"""What has been fetched so far: a journal with a line for each URL, and the images by the digest of their bytes.

An image is complete under its name before the journal says so, and the journal only grows. A run that was killed loses
what it was fetching, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What became of a URL: an image, or a reason why there is none.

    Attributes:
        url: The URL.
        received: Bytes that came.
        sha256: Digest of the image's bytes; None if there is none.
        reason: Kind of the failure; None if there is an image.
        detail: What exactly has failed.
    """

    url: str
    received: int
    sha256: str | None = None
    reason: str | None = None
    detail: str | None = None


class Spool:
    """A directory of outcomes, written by one process.

    Attributes:
        outcomes: What became of each URL that is done.
    """

    def __init__(self, directory: Path) -> None:
        """Opens a directory, which is made if there is none; what a killed run has left half written is forgotten."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / JOURNAL
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        known = (Outcome(**json.loads(line)) for line in whole.splitlines())
        self.outcomes = {outcome.url: outcome for outcome in known if self._holds(outcome)}
        self._journal = path.open("r+b" if path.exists() else "w+b")
        self._journal.truncate(len(whole))
        self._journal.seek(len(whole))

    def __enter__(self) -> Spool:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes the journal."""
        self._journal.close()

    @property
    def received(self) -> int:
        """Bytes that came for all that is done."""
        return sum(outcome.received for outcome in self.outcomes.values())

    def keep(self, data: bytes) -> str:
        """Writes an image and returns its digest; threads may call it at once."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        if not path.is_file() or path.stat().st_size != len(data):
            path.parent.mkdir(exist_ok=True)
            partial = path.with_name(f".{digest}.{threading.get_ident()}")
            partial.write_bytes(data)
            os.replace(partial, path)
        return digest

    def record(self, outcome: Outcome) -> None:
        """Notes what became of a URL."""
        self._journal.write(json.dumps(asdict(outcome)).encode() + b"\n")
        self._journal.flush()
        self.outcomes[outcome.url] = outcome

    def read(self, digest: str) -> bytes:
        """Returns an image.

        Raises:
            OSError: If its file is missing, or holds something else.
        """
        data = self._path(digest).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise OSError(f"{self._path(digest)} is damaged; delete it and run the command again")
        return data

    def _path(self, digest: str) -> Path:
        return self._directory / digest[:2] / digest[2:]

    def _holds(self, outcome: Outcome) -> bool:
        if outcome.sha256 is None:
            return True
        path = self._path(outcome.sha256)
        return path.is_file() and path.stat().st_size == outcome.received
