"""Sources whose rows are a file: in which containers, in which format, and where their media are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.sources import (
    CaptionsSource,
    ClipRules,
    FileSource,
    JsonlSource,
    LlavaSource,
    ParquetSource,
    ShareGptSource,
    SpatialRgptSource,
    VsrSource,
    WorldFrames,
)
from theworld_train.data.conversations import Conversations
from theworld_train.data.formats import LLAVA, SHAREGPT, CaptionFormat, Format, VsrFormat, own_format
from theworld_train.data.media import Media
from theworld_train.data.regions import RegionFormat
from theworld_train.data.rows import Rows, existing_file, json_array, json_lines, tsv_lines
from theworld_train.data.video import Timing

TABLES = (".json", ".jsonl", ".parquet")


def open_file(config: FileSource, world: WorldFrames) -> Conversations:
    """Opens a source whose rows are a file, with the frames of its clips that are asked for.

    Raises:
        ConfigError: If the file is missing, empty or of another kind, or there is no such media root.
    """
    kinds = {"jsonl": "a JSONL file", "parquet": "a Parquet file"}
    path = Path(config.path)
    if not (isinstance(config, ParquetSource) and path.is_dir()):
        existing_file(config.path, kinds.get(config.source, "a file of rows"))
    beside = path if path.is_dir() else path.parent
    root = beside if config.media_root is None else _root(config)
    return Conversations(_rows(config, path), media_of(config, root, world), _format(config))


def media_of(config: FileSource | ClipRules, root: Path | None, world: WorldFrames) -> Media:
    """Returns where the media of a source are, None if rows hold them, and which frames of its clips are taken."""
    resolved = None if root is None else root.resolve()
    if not isinstance(config, ClipRules):
        return Media(resolved)
    timing = Timing(
        config.window_s,
        config.sample_fps,
        config.directory_fps,
        present=config.present,
        later=world.wants_later,
        exact=world.is_exact,
    )
    return Media(resolved, world.taken(config.max_video_frames), timing)


def _root(config: FileSource) -> Path:
    assert config.media_root is not None
    root = Path(config.media_root)
    if not root.is_dir():
        raise ConfigError(Problem("no such directory", source=config.path, key="media_root", value=config.media_root))
    return root


def _rows(config: FileSource, path: Path) -> Rows:
    # Our own two kinds are named after their container, whatever the file is called.
    if isinstance(config, JsonlSource):
        return json_lines(path)
    if isinstance(config, ParquetSource):
        return _streamed(path) if config.streaming else _parquet(path, own=True)
    columns = (config.caption_field, config.image_field) if isinstance(config, CaptionsSource) else ()
    return rows_by_suffix(path, f"source: {config.source}", columns)


def rows_by_suffix(path: Path, reader: str, columns: Sequence[str] = ()) -> Rows:
    """Opens a file of rows by what its name ends with.

    Args:
        path: The file.
        reader: Who reads it, for problems.
        columns: What the columns of a TSV file are called; TSV is refused without them.

    Raises:
        ConfigError: If the name ends otherwise, or the file is none of its kind.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        return json_array(path)
    if suffix == ".jsonl":
        return json_lines(path)
    if suffix == ".parquet":
        return _parquet(path)
    if suffix == ".tsv" and columns:
        return tsv_lines(path, columns)
    known = (*TABLES, ".tsv") if columns else TABLES
    raise ConfigError(Problem(f"rows of {reader} are read from files named {', '.join(known)}", source=str(path)))


def _parquet(path: Path, own: bool = False) -> Rows:
    from theworld_train.data.arrow import OWN_COLUMNS, parquet_rows  # takes pyarrow along, which text files do without

    return parquet_rows(path, OWN_COLUMNS if own else None)


def _streamed(path: Path) -> Rows:
    from theworld_train.data.arrow import OWN_COLUMNS, parquet_shards
    from theworld_train.data.streams import StreamedRows

    shards = parquet_shards(path)
    return StreamedRows(str(path), shards, [shard.name for shard in shards], OWN_COLUMNS)


def _format(config: FileSource) -> Format:
    if isinstance(config, LlavaSource):
        return LLAVA
    if isinstance(config, ShareGptSource):
        return SHAREGPT
    if isinstance(config, CaptionsSource):
        return CaptionFormat(config.image_field, config.caption_field, config.questions)
    if isinstance(config, VsrSource):
        return VsrFormat(config.question)
    if isinstance(config, SpatialRgptSource):
        return RegionFormat(config.regions)
    return own_format
