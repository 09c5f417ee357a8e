"""Conversations in a Hugging Face dataset, with the images inside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.sources import STREAM_FILES, HubSource, WorldFrames
from theworld_train.data.arrow import OWN_COLUMNS, ArrowRows, Places
from theworld_train.data.conversations import Conversations
from theworld_train.data.files import media_of
from theworld_train.data.formats import LLAVA, SHAREGPT, Format, own_format

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

#: The columns that are read of each format, of which the first has to be there.
FORMATS: dict[str, tuple[tuple[str, ...], Format]] = {
    "conversations": (OWN_COLUMNS, own_format),
    "llava": (("conversations", "image", "video"), LLAVA),
    "sharegpt": (("conversations", "images", "videos", "system"), SHAREGPT),
}
FETCH_HINT = "fetch it once while the network is reachable: theworld-train fetch CONFIG"


def open_hub(config: HubSource, world: WorldFrames) -> Conversations:
    """Opens a dataset, from the local cache alone if `HF_HUB_OFFLINE` is set; its clips give the frames of `world`.

    Images are the bytes that the dataset holds: paths are refused, so that a dataset from elsewhere cannot read this
    machine's disk.

    Raises:
        ConfigError: If it is not there, or has no conversations, or no rows.
    """
    if config.streaming:
        return _open_stream(config, world)
    dataset = _open(config)
    (needed, *others), adapt = FORMATS[config.format]
    if needed not in dataset.column_names:
        hint = did_you_mean(needed, dataset.column_names)
        raise ConfigError(Problem(f"the dataset has no column {needed!r}", source=config.id, hint=hint))
    if not len(dataset):
        raise ConfigError(Problem(f"split {config.split!r} holds no rows", source=config.id))
    dataset = dataset.select_columns([needed, *(name for name in others if name in dataset.column_names)])
    places = Places((config.id,), (config.id,), np.array([len(dataset)]), ":{}")
    return Conversations(ArrowRows(dataset, config.id, places), media_of(config, None, world), adapt)


def fetch_dataset(config: HubSource) -> str | None:
    """Downloads a dataset into the local cache as `open_hub` reads it unless it streams, or opens it there.

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


def _open_stream(config: HubSource, world: WorldFrames) -> Conversations:
    """Opens the Parquet files of a directory, or of the snapshot of a repository in the local cache."""
    from theworld_train.data.streams import StreamedRows  # takes pyarrow along

    folder = Path(config.id) if Path(config.id).is_dir() else _snapshot(config)
    columns, adapt = FORMATS[config.format]
    shards = _shards(config, folder)
    labels = [f"{config.id}/{shard.relative_to(folder).as_posix()}" for shard in shards]
    return Conversations(StreamedRows(config.id, shards, labels, columns), media_of(config, None, world), adapt)


def _snapshot(config: HubSource) -> Path:
    """Returns the folder of a repository's Parquet files in the local cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            config.id,
            repo_type="dataset",
            revision=config.revision,
            allow_patterns=list(STREAM_FILES),
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        message = f"neither a directory nor a dataset whose Parquet files are in the local cache: {error}"
        raise ConfigError(Problem(message, source=config.id, hint=FETCH_HINT)) from error
    return Path(folder)


def _shards(config: HubSource, folder: Path) -> list[Path]:
    """Returns the Parquet files of a split, by the hub's rules of what belongs to it."""
    from datasets import load_dataset_builder

    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        hint = "remove streaming: it is memory-mapped as it is"
        raise ConfigError(Problem("a dataset that save_to_disk wrote is no stream", source=config.id, hint=hint))
    try:
        builder = load_dataset_builder(str(folder), config.config_name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(Problem(f"no dataset that can be streamed: {error}", source=config.id)) from error
    files = builder.config.data_files or {}
    if config.split not in files:
        hint = f"its splits: {', '.join(map(str, files))}; a stream has no slices"
        raise ConfigError(Problem(f"split {config.split!r}: there is none", source=config.id, hint=hint))
    shards = [Path(file) for file in files[config.split]]
    if others := [shard.name for shard in shards if shard.suffix != ".parquet"]:
        message = f"streams are read from Parquet files, and the split has {others[0]}"
        raise ConfigError(Problem(message, source=config.id, hint="remove streaming"))
    return shards


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
