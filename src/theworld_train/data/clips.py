"""A folder of clips, each with an answer: the name of the folder that it lies in, or a JSON file beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.sources import ClipsSource, WorldFrames
from theworld_train.data.conversations import Conversations
from theworld_train.data.files import media_of
from theworld_train.data.formats import Adapted
from theworld_train.data.media import RefusedMediumError, locate
from theworld_train.data.rows import RowError, decode_json
from theworld_train.data.video import frame_files

#: Files that are taken for clips; directories that hold images are clips, too.
CLIP_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m4v", ".gif")
#: Fields of the JSON file beside a clip.
FIELDS = ("answer", "question", "kind")


def open_clips(config: ClipsSource, world: WorldFrames) -> Conversations:
    """Opens a folder of clips, with the frames of theirs that are asked for.

    Raises:
        ConfigError: If there is no such folder, or it holds no clips.
    """
    root = Path(config.path)
    if not root.is_dir():
        message = "is a file, expected a folder of clips" if root.is_file() else "no such folder"
        raise ConfigError(Problem(message, source=config.path))
    names = _find_in_folders(root) if config.answers == "folders" else _find(root, "")
    if not names:
        layout = "FOLDER/CLIP, a folder for each answer" if config.answers == "folders" else "CLIP with CLIP.json"
        raise ConfigError(Problem("it holds no clips", source=config.path, hint=f"expected {layout}"))
    rows = ClipRows(root, names, answers_beside=config.answers == "files")
    return Conversations(rows, media_of(config, root, world), ClipFormat(config.questions))


class ClipRows:
    """Clips as rows: `clip`, the path within the folder, and the fields of its answer."""

    def __init__(self, root: Path, names: Sequence[str], answers_beside: bool) -> None:
        """Args: root: the folder; names: paths of the clips in it; answers_beside: whether each has a JSON file."""
        self.name = str(root)
        self._root = root.resolve()
        self._names = tuple(names)
        self._answers_beside = answers_beside

    def __len__(self) -> int:
        """Returns the number of clips."""
        return len(self._names)

    def __getitem__(self, index: int) -> object:
        """Reads one row; see `Rows`."""
        name = self._names[index]
        if not self._answers_beside:
            return {"clip": name, "answer": Path(name).parent.name.replace("_", " ")}
        file = self._answer_file(name)
        try:
            row = decode_json(locate(self._root, file).read_bytes())
        except RefusedMediumError as error:
            raise RowError(str(error)) from error
        except OSError as error:
            hint = f"every clip has a JSON file with its answer beside it, {name} this one"
            raise RowError(f"cannot be read: {error.strerror}", hint) from error
        return {**row, "clip": name} if isinstance(row, dict) else row

    def outlines(self, indices: range) -> Iterator[object]:
        """Yields rows in their order; see `Rows`."""
        for index in indices:
            try:
                yield self[index]
            except RowError as error:
                yield error

    def where(self, index: int) -> str:
        """Returns the path of the clip, or of the file with its answer."""
        name = self._names[index]
        return os.path.join(self.name, self._answer_file(name) if self._answers_beside else name)

    def label(self, index: int) -> str:
        """Returns the path of the clip within the folder."""
        return self._names[index]

    def _answer_file(self, name: str) -> str:
        is_file = name.lower().endswith(CLIP_SUFFIXES)
        return f"{os.path.splitext(name)[0] if is_file else name}.json"


@dataclass(frozen=True)
class ClipFormat:
    """A clip, its answer, and the question if there is one; without a `kind`, all are of one.

    Attributes:
        questions: What the user asks otherwise, taken in turn.
    """

    questions: Sequence[str]

    def __call__(self, row: dict[str, Any], index: int) -> Adapted:
        """Adapts a row."""
        question, answer = row.get("question"), row.get("answer")
        if question is None:
            question = self.questions[index % len(self.questions)]
        turns = [
            {"role": "user", "content": [{"type": "video", "path": row["clip"]}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
        keys = {
            "messages[0].content[0].path": "clip",
            "messages[0].content[1].text": "question",
            "messages[1].content": "answer",
        }
        unknown = [name for name in row if name not in (*FIELDS, "clip")]
        problems = [
            Problem("unknown field", key=name, value=row[name], hint=did_you_mean(name, FIELDS)) for name in unknown
        ]
        if not isinstance(answer, str):
            problems.append(Problem("expected a text", key="answer", value=answer))
        return Adapted({"messages": turns, "kind": row.get("kind")}, keys, problems)


def _find_in_folders(root: Path) -> list[str]:
    """Returns the paths of all clips that lie in folders of a folder, in the order of their names."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    return [name for folder in folders for name in _find(root / folder, f"{folder}/")]


def _find(directory: Path, prefix: str) -> list[str]:
    """Returns the paths of the clips that lie in a folder itself, in the order of their names."""
    entries = sorted((e for e in os.scandir(directory) if not e.name.startswith(".")), key=lambda entry: entry.name)
    return [
        f"{prefix}{entry.name}"
        for entry in entries
        if (frame_files(Path(entry.path)) if entry.is_dir() else entry.name.lower().endswith(CLIP_SUFFIXES))
    ]
