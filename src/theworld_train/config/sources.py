"""The sources of data: a section for each kind, told apart by its key `source`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from theworld_train.config.section import Fraction, Name, Path, PositiveFloat, PositiveInt, Repository, Section, Seed

#: Files of a dataset's repository that a stream is read from; its card says which of them belong to which split.
STREAM_FILES = ("*.parquet", "README.md")

Questions = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class FileSource(Section):
    """Base of the sources whose rows stand in a file and name their media by paths."""

    source: str
    """Selects this kind of source."""
    path: Path
    """The file of rows."""
    media_root: Path | None = None
    """Directory that media paths are relative to and cannot leave; the directory of the file of rows if absent."""


class ClipRules(Section):
    """Base of the sources with clips: which of a clip's frames are taken."""

    max_video_frames: PositiveInt = 9
    """Most frames taken from a clip, 1 + 4k of them; they end in its last frame, and are spread evenly over the clip
    unless `window_s` or `sample_fps` says otherwise."""
    window_s: PositiveFloat | None = None
    """Take the frames from the last so many seconds of the clip alone, spread evenly over them."""
    sample_fps: PositiveFloat | None = None
    """Take so many frames a second, counted back from the last frame; a clip of fewer frames a second gives all."""
    directory_fps: PositiveFloat | None = None
    """Frames a second of clips that are given as directories or lists of frames, which do not tell it themselves."""

    @model_validator(mode="after")
    def _check_clips(self) -> ClipRules:
        if (self.max_video_frames - 1) % 4:
            raise ValueError(
                f"max_video_frames must be 1 + 4k, as the VAE compresses time by 4, got {self.max_video_frames}"
            )
        if self.window_s is not None and self.sample_fps is not None:
            raise ValueError("window_s and sample_fps are two rules for the same frames: set one of them")
        if self.directory_fps is not None and self.window_s is None and self.sample_fps is None:
            raise ValueError("directory_fps changes nothing unless window_s or sample_fps is set")
        return self


class JsonlSource(ClipRules, FileSource):
    """Conversations in a JSONL file, a line each, with media paths relative to the file."""

    source: Literal["jsonl"]
    """Selects this kind of source."""


class ParquetSource(ClipRules, FileSource):
    """Conversations in a Parquet file, whose images are paths or stand in the file themselves."""

    source: Literal["parquet"]
    """Selects this kind of source."""
    path: Path
    """A Parquet file, or a directory whose Parquet files are the shards, in the order of their names."""
    streaming: bool = False
    """Read row groups where they lie, in turn, and shuffle the rows of four at a time; else the rows are copied into
    the cache of `datasets` once, and all of them shuffled."""


class LlavaSource(ClipRules, FileSource):
    """Conversations as LLaVA stores them: `conversations` of `from` and `value`, and one `image`."""

    source: Literal["llava"]
    """Selects this kind of source."""
    path: Path
    """The file of rows: a JSON array, JSONL or Parquet."""


class ShareGptSource(ClipRules, FileSource):
    """Conversations as ShareGPT stores them: `conversations` of `from` and `value`, `system`, `images` and `videos`."""

    source: Literal["sharegpt"]
    """Selects this kind of source."""
    path: Path
    """The file of rows: a JSON array, JSONL or Parquet."""


class CaptionsSource(FileSource):
    """Images with a caption each, asked for by questions in turn."""

    source: Literal["captions"]
    """Selects this kind of source."""
    path: Path
    """The file of rows: a JSON array, JSONL, Parquet, or TSV with two columns, caption and image, and no header."""
    image_field: Annotated[str, Field(min_length=1)] = "image"
    """Field of a row that holds the image or its path."""
    caption_field: Annotated[str, Field(min_length=1)] = "caption"
    """Field of a row that holds the caption."""
    questions: Questions = ("Describe the image.",)
    """What the user asks, taken in turn; the caption is the answer."""


class VsrSource(FileSource):
    """Statements about images that are true or false, as Visual Spatial Reasoning stores them."""

    source: Literal["vsr"]
    """Selects this kind of source."""
    path: Path
    """The file of rows: JSONL, a JSON array or Parquet."""
    question: Annotated[
        str, Field(pattern=r"\{caption\}", json_schema_extra={"x-expected": "a text that holds {caption}"})
    ] = "Is the statement true or false? {caption}"
    """What the user asks; `{caption}` is the statement. The answer is "true" or "false"."""


class SpatialRgptSource(FileSource):
    """Conversations about regions of an image, as SpatialRGPT's OpenSpatialDataset stores them."""

    source: Literal["spatialrgpt"]
    """Selects this kind of source."""
    path: Path
    """The file of rows: a JSON array, JSONL or Parquet."""
    regions: Literal["draw", "text"] = "draw"
    """How the model is shown the regions: `draw`n into the image as numbered outlines, or by their box as `text`."""


class WebDatasetSource(ClipRules):
    """Shards as WebDataset and img2dataset write them: tar files whose members share a key for each sample."""

    source: Literal["webdataset"]
    """Selects this kind of source."""
    path: Path
    """A tar file, or a directory whose tar files are the shards, in the order of their names."""
    format: Literal["captions", "conversations", "llava"] = "captions"
    """What a sample is: an image or clip and its caption (`.txt`), or a `.json` with a conversation in our format or
    LLaVA's, whose images and clips are the sample's."""
    questions: Questions = ("Describe the image.",)
    """What the user asks for a caption, taken in turn."""
    max_video_frames: PositiveInt = 1
    """Most frames taken from a clip, 1 + 4k of them, which end in its last frame; 1, the last frame alone, unless set,
    as most shards hold images."""


class ClipsSource(ClipRules):
    """A folder of clips with an answer each: video files, or directories of frames."""

    source: Literal["clips"]
    """Selects this kind of source."""
    path: Path
    """The folder."""
    answers: Literal["folders", "files"] = "folders"
    """`folders`: clips lie in a folder for each answer, which is its name; `files`: beside each clip lies a JSON file
    of its name, with `answer` and optionally `question` and `kind`."""
    questions: Questions = ("What happens in the clip?",)
    """What the user asks about clips that state no question, taken in turn."""


class HubSource(ClipRules):
    """A Hugging Face dataset whose rows hold conversations and their images, read from a copy on disk."""

    source: Literal["hub"]
    """Selects this kind of source."""
    id: Repository
    """Dataset id on the hub, or a directory written by `save_to_disk`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the dataset."""
    config_name: str | None = None
    """Configuration of the dataset, for datasets that have several."""
    split: str = "train"
    """Split to read; slices such as `train[:1%]` work."""
    format: Literal["conversations", "llava", "sharegpt"] = "conversations"
    """Format of a row: `messages`, `images` and `videos` as in our own, or `conversations` with the media of LLaVA's
    (`image`, `video`) or ShareGPT's (`images`, `videos`)."""
    max_video_frames: PositiveInt = 1
    """Most frames taken from a clip, 1 + 4k of them, which end in its last frame; 1, the last frame alone, unless set,
    as most datasets hold images."""
    streaming: bool = False
    """Read the row groups of its Parquet files where they lie, in turn, and shuffle the rows of four at a time. A
    directory is then one of the hub's layout, and `split` a whole split."""


class MovingDigitsSource(Section):
    """Handwritten digits that move over a canvas, with questions on which digit and which way."""

    source: Literal["moving_digits"]
    """Selects this kind of source."""
    split: Literal["train", "eval"]
    """Which scans are used: the held-out digits appear in `eval` alone."""
    samples: PositiveInt
    """Number of samples."""
    questions: tuple[Literal["direction", "digit"], ...] = ("direction", "digit")
    """Kinds of question, taken in turn."""
    frames: PositiveInt = 9
    """Frames of a clip, 1 + 4k."""
    canvas: Annotated[int, Field(ge=16, le=4096)] = 64
    """Side of the canvas in pixels; a digit takes half of it, and its scan has 8."""
    speed: PositiveInt = 6
    """Pixels that the digit moves between two frames."""
    grid: PositiveInt = 16
    """In the last frame the digit stands at multiples of so many pixels; a small vision tower wants its patch size."""
    plain_share: Fraction = 0.0
    """Share of the digit questions that come without world tokens, so that the model learns to answer without them."""
    seed: Seed = 0
    """Seed of everything that is drawn: scan, place, direction and question."""

    @model_validator(mode="after")
    def _check_clip(self) -> MovingDigitsSource:
        if (self.frames - 1) % 4:
            raise ValueError(f"frames must be 1 + 4k, as the VAE compresses time by 4, got {self.frames}")
        if not self.questions:
            raise ValueError("questions must name at least one kind")
        return self


SourceSection = (
    JsonlSource
    | ParquetSource
    | LlavaSource
    | ShareGptSource
    | CaptionsSource
    | VsrSource
    | SpatialRgptSource
    | WebDatasetSource
    | ClipsSource
    | HubSource
    | MovingDigitsSource
)
Source = Annotated[SourceSection, Field(discriminator="source")]


class MixturePart(Section):
    """One source of a mixture."""

    data: Source
    """Its samples."""
    weight: PositiveFloat | None = None
    """Its share of what is drawn, relative to the other parts'; stated for all parts or for none."""
    max_epochs: PositiveFloat | None = None
    """Passes over its samples after which it gives no more; its weight then goes to the others."""


class MixtureSource(Section):
    """Several sources, drawn from in fixed shares."""

    source: Literal["mixture"]
    """Selects this kind of source."""
    parts: dict[Name, MixturePart] = Field(min_length=1)
    """The sources by names of your choice."""
    temperature: PositiveFloat = 1.0
    """Without weights, a part's share goes with its size to the power 1 / temperature: 1 draws all samples alike, and
    the higher it is, the more alike are the parts."""

    @model_validator(mode="after")
    def _check_weights(self) -> MixtureSource:
        given = [name for name, part in self.parts.items() if part.weight is not None]
        if given and len(given) < len(self.parts):
            missing = ", ".join(name for name in self.parts if name not in given)
            raise ValueError(f"weight is stated for all parts or for none; missing: {missing}")
        if given and self.temperature != 1.0:
            raise ValueError("temperature makes weights of sizes, and the parts state theirs: remove one of them")
        return self


TrainingData = Annotated[SourceSection | MixtureSource, Field(discriminator="source")]


def leaf_sources(data: SourceSection | MixtureSource | None, key: str) -> dict[str, SourceSection]:
    """Returns the sources of which data consist, by their dotted keys.

    Args:
        data: What `data.train` or `data.eval` holds.
        key: That key.
    """
    if isinstance(data, MixtureSource):
        return {f"{key}.parts.{name}.data": part.data for name, part in data.parts.items()}
    return {} if data is None else {key: data}


def frames_of(source: SourceSection | MixtureSource | None) -> int:
    """Returns the most frames that a clip of a source has; 1 if it holds images alone."""
    if isinstance(source, MixtureSource):
        return max(frames_of(part.data) for part in source.parts.values())
    if isinstance(source, ClipRules):
        return source.max_video_frames
    return source.frames if isinstance(source, MovingDigitsSource) else 1
