"""Conversations in a Hugging Face dataset, with the images inside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from theworld_train.batch import Blank
from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.schema import HubSource
from theworld_train.data.conversation import Conversation, ImagePart, VideoPart, parse_row
from theworld_train.data.images import decode_image
from theworld_train.data.media import build_messages
from theworld_train.data.source import MediaError, Sample, UnreadableSampleError, first_problems

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

#: Rows that a check reads at once.
CHECK_ROWS = 1000
#: Columns that are read; others, however large, are left alone.
COLUMNS = ("id", "kind", "world", "messages", "images")
FETCH_HINT = "fetch it once while the network is reachable: theworld-train fetch CONFIG"


class HubConversations:
    """The rows of a dataset whose columns are `messages`, optionally `images`, and optionally `id` and `kind`.

    Rows are memory-mapped. Images are the bytes that the dataset holds: paths are refused, so that a dataset from
    elsewhere cannot read this machine's disk.
    """

    def __init__(self, config: HubSource) -> None:
        """Opens the dataset, from the local cache alone if `HF_HUB_OFFLINE` is set.

        Raises:
            ConfigError: If it is not there, or has no `messages`, or no rows.
        """
        from datasets import Image as ImageFeature
        from datasets import List

        dataset = _open(config)
        self._name = config.id
        if "messages" not in dataset.column_names:
            hint = did_you_mean("messages", dataset.column_names)
            raise ConfigError(Problem("the dataset has no column 'messages'", source=config.id, hint=hint))
        if not len(dataset):
            raise ConfigError(Problem(f"split {config.split!r} holds no rows", source=config.id))
        dataset = dataset.select_columns([name for name in COLUMNS if name in dataset.column_names])
        if "images" in dataset.column_names:
            dataset = dataset.cast_column("images", List(ImageFeature(decode=False)))
        self._dataset = dataset

    def __len__(self) -> int:
        """Returns the number of rows of the split."""
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        """Loads one row with its images.

        Raises:
            UnreadableSampleError: If an image is damaged.
            ConfigError: If the row is wrong.
        """
        conversation, problems = self._parse(self._dataset[index], index)
        if conversation is None:
            raise ConfigError(problems)
        sample_id = conversation.id or f"{self._name}:{index}"
        images = conversation.images

        def image(part: ImagePart) -> Image.Image:
            assert part.index is not None
            data = images[part.index]["bytes"]
            if data is None:
                raise MediaError(f"image {part.index} is a path; the dataset must hold the image itself")
            return decode_image(data, f"image {part.index}")

        try:
            messages = build_messages(conversation, image, _no_video)
        except MediaError as error:
            raise UnreadableSampleError(sample_id, str(error)) from error
        return Sample(sample_id, conversation.kind, messages, conversation.world)

    def outline(self, index: int) -> Sample:
        """Returns one row with blanks for its images, which are not read."""
        row = next(self._rows_without_pixels(index, index + 1))
        conversation, problems = self._parse(row, index)
        if conversation is None:
            raise ConfigError(problems)
        messages = build_messages(conversation, lambda _: Blank(), _no_video)
        return Sample(conversation.id or f"{self._name}:{index}", conversation.kind, messages, conversation.world)

    def check(self) -> list[Problem]:
        """Checks the structure of every row, without reading the images."""
        return first_problems(self._problems(), self._name)

    def _problems(self) -> Iterator[Problem]:
        rows_of_ids: dict[str, int] = {}
        for index, row in enumerate(self._rows_without_pixels()):
            conversation, problems = self._parse(row, index)
            yield from problems
            if conversation is None or conversation.id is None:
                continue
            first = rows_of_ids.setdefault(conversation.id, index)
            if first != index:
                message = f"the id is already that of row {first}"
                yield Problem(message, source=self._where(index), key="id", value=conversation.id)

    def _rows_without_pixels(self, first: int = 0, end: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields rows, with None for each image without bytes and an empty string for the others."""
        columns = [name for name in self._dataset.column_names if name != "images"]
        texts = self._dataset.select_columns(columns)
        end = len(texts) if end is None else end
        for start in range(first, end, CHECK_ROWS):
            stop = min(start + CHECK_ROWS, end)
            batch = texts[start:stop]
            images = self._image_marks(start, stop)
            for offset in range(stop - start):
                row = {name: batch[name][offset] for name in columns}
                yield row if images is None else {**row, "images": images[offset]}

    def _image_marks(self, start: int, stop: int) -> list[list[str | None] | None] | None:
        if "images" not in self._dataset.column_names:
            return None
        table = self._dataset.select_columns(["images"]).with_format("arrow")[start:stop]
        marks: list[list[str | None] | None] = []
        for chunk in table["images"].chunks:
            present = iter(chunk.flatten().field("bytes").is_valid().to_pylist())
            lengths = chunk.value_lengths().to_pylist()
            marks += [None if n is None else ["" if next(present) else None for _ in range(n)] for n in lengths]
        return marks

    def _parse(self, row: dict[str, Any], index: int) -> tuple[Conversation | None, list[Problem]]:
        conversation, problems = parse_row(row, self._where(index))
        if conversation is not None:
            problems = [self._path_problem(part, index) for part in conversation.media() if _is_path(part)]
            images = enumerate(conversation.images)
            problems += [self._bytes_problem(number, index) for number, image in images if image is None]
        return (None if problems else conversation), problems

    def _path_problem(self, part: ImagePart | VideoPart, index: int) -> Problem:
        message = "paths have no meaning in a dataset, whose media are its 'images'"
        hint = "use a part with an 'index'; for videos, use a source of kind 'jsonl'"
        return Problem(message, source=self._where(index), key=part.key, hint=hint)

    def _bytes_problem(self, number: int, index: int) -> Problem:
        hint = "save the dataset with its images embedded"
        return Problem("the image has no bytes", source=self._where(index), key=f"images[{number}]", hint=hint)

    def _where(self, index: int) -> str:
        return f"{self._name}:{index}"


def fetch_dataset(config: HubSource) -> str | None:
    """Downloads a dataset into the local cache, or opens it there.

    Returns:
        The commit on the hub, or None for a directory.

    Raises:
        ConfigError: If it does not exist or cannot be reached.
    """
    if Path(config.id).is_dir():
        return None
    builder = _builder(config)
    builder.download_and_prepare()
    commit: str = builder.hash
    return commit


def _open(config: HubSource) -> Dataset:
    if Path(config.id).is_dir():
        return _open_directory(config)
    builder = _builder(config)
    try:
        builder.download_and_prepare()
        dataset: Dataset = builder.as_dataset(split=config.split)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"split {config.split!r}: {error}", source=config.id)) from error
    return dataset


def _builder(config: HubSource) -> DatasetBuilder:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(config.id, config.config_name, revision=config.revision)
    except (OSError, ValueError, RuntimeError) as error:
        message = f"neither a directory nor a dataset that can be opened: {error}"
        raise ConfigError(Problem(message, source=config.id, hint=FETCH_HINT)) from error
    # Offline, `datasets` takes the newest commit in the cache, whatever revision is asked for.
    if config.revision and re.fullmatch("[0-9a-f]{40}", config.revision) and builder.hash != config.revision:
        message = f"the local cache holds commit {builder.hash}, not {config.revision}"
        raise ConfigError(Problem(message, source=config.id, hint=FETCH_HINT))
    return builder


def _open_directory(config: HubSource) -> Dataset:
    from datasets import DatasetDict, ReadInstruction, load_from_disk

    try:
        loaded = load_from_disk(config.id)
    except (OSError, ValueError) as error:
        hint = "point at a directory written by save_to_disk, or use a source of kind 'jsonl'"
        raise ConfigError(Problem(f"not a saved dataset: {error}", source=config.id, hint=hint)) from error
    splits = loaded if isinstance(loaded, DatasetDict) else {str(loaded.split or "train"): loaded}
    sizes = {str(name): len(dataset) for name, dataset in splits.items()}
    try:
        (part,) = ReadInstruction.from_spec(config.split).to_absolute(sizes)
    except ValueError as error:
        hint = f"its splits: {', '.join(sizes)}"
        raise ConfigError(Problem(f"split {config.split!r}: {error}", source=config.id, hint=hint)) from error
    first = part.from_ or 0
    stop = sizes[part.splitname] if part.to is None else part.to
    return splits[part.splitname].select(range(first, stop))


def _is_path(part: ImagePart | VideoPart) -> bool:
    return isinstance(part, VideoPart) or part.path is not None


def _no_video(part: VideoPart) -> list[Image.Image]:
    raise AssertionError(f"{part.key}: refused by the check of paths")
