"""The sources of data: a section for each kind, told apart by its key `source`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from theworld_train.config.rollout import RolloutRules
from theworld_train.config.section import (
    Fraction,
    Name,
    NonNegativeInt,
    Path,
    PositiveFloat,
    PositiveInt,
    Repository,
    Section,
    Seed,
)

#: Files of a dataset's repository that a stream is read from; its card says which of them belong to which split.
STREAM_FILES = ("*.parquet", "README.md")

Questions = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
FrameChoice = Literal["image", "history", "future", "rollout"]


class WorldFrames(Section):
    """Which moments a world block holds besides the present, and where they come from."""

    frames: FrameChoice = "history"
    """`image`: none, the present alone; `history`: a clip that ends in the present; `future`: what a clip shows from
    the present on; `rollout`: what has been generated from the present, read from `data.encoded`. The vision tower sees
    the present alone. An image has neither history nor future, and stays an image."""
    steps: NonNegativeInt | None = None
    """Latent frames besides the present, k: a clip gives 1 + 4k frames, or the sample is left out. If absent, as many
    as a clip has, up to the `max_video_frames` of its source; a rollout needs the number."""
    rollout: RolloutRules = RolloutRules()
    """How futures are generated, for `frames: rollout` and for measuring with them."""

    @model_validator(mode="after")
    def _check_steps(self) -> WorldFrames:
        if self.frames == "image" and self.steps:
            raise ValueError(
                f"frames: image holds the present alone, and steps is {self.steps}: set steps to 0 or null"
            )
        if self.frames == "rollout" and not self.steps:
            raise ValueError("frames: rollout needs steps, the latent frames that follow the present; at least 1")
        if self.frames == "rollout" and 1 + 4 * (self.steps or 0) > self.rollout.num_frames:
            raise ValueError(
                f"steps: {self.steps} reaches over {1 + 4 * (self.steps or 0)} frames, and rollout.num_frames is "
                f"{self.rollout.num_frames}"
            )
        return self

    def taken(self, most: int) -> int:
        """Returns how many frames are taken of a clip at most, 1 + 4k, if its source gives `most` unless told."""
        if self.frames in ("image", "rollout"):
            return 1
        return most if self.steps is None else 1 + 4 * self.steps

    @property
    def is_exact(self) -> bool:
        """Whether a clip with fewer frames is of no use."""
        return self.frames in ("history", "future") and self.steps is not None

    @property
    def wants_later(self) -> bool:
        """Whether frames after the present are taken."""
        return self.frames == "future" and self.steps != 0

    @property
    def wants_earlier(self) -> bool:
        """Whether so many frames before the present are needed."""
        return self.frames == "history" and bool(self.steps)


#: The frames that sources give unless they are told otherwise: images, and clips as history.
AS_GIVEN = WorldFrames()


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
    """Most frames taken from a clip, 1 + 4k of them, unless `data.world.steps` states the number; they end in the
    present, and are spread evenly over the clip unless `window_s` or `sample_fps` says otherwise."""
    present: Fraction = 1.0
    """Where in a clip the present lies, the moment that the vision tower sees: 0 is its first frame, 1 its last.
    History is taken from what is before it, `data.world.frames: future` from what is after it."""
    window_s: PositiveFloat | None = None
    """Take the frames from the so many seconds next to the present alone, spread evenly over them."""
    sample_fps: PositiveFloat | None = None
    """Take so many frames a second, counted from the present; a clip of fewer frames a second gives all."""
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
    questions: tuple[Literal["direction", "digit", "where_next"], ...] = ("direction", "digit")
    """Kinds of question, taken in turn. `where_next` asks in which ninth of the canvas the digit's centre will be in
    the last of the `later_frames`."""
    frames: PositiveInt = 9
    """Frames of a clip up to the present, 1 + 4k."""
    later_frames: NonNegativeInt = 0
    """Frames of a clip after the present, 4k, which `data.world.frames: future` shows."""
    canvas: Annotated[int, Field(ge=16, le=4096)] = 64
    """Side of the canvas in pixels."""
    digit: PositiveInt | None = None
    """Side of a digit in pixels, whose scan has 8; half of the canvas if absent."""
    speed: PositiveInt = 6
    """Pixels that the digit moves between two frames."""
    grid: PositiveInt = 16
    """In the present the digit stands at multiples of so many pixels; a small vision tower wants its patch size."""
    plain_share: Fraction = 0.0
    """Share of the digit questions that come without world tokens, so that the model learns to answer without them."""
    seed: Seed = 0
    """Seed of everything that is drawn: scan, place, direction and question."""

    @model_validator(mode="after")
    def _check_clip(self) -> MovingDigitsSource:
        if (self.frames - 1) % 4:
            raise ValueError(f"frames must be 1 + 4k, as the VAE compresses time by 4, got {self.frames}")
        if self.later_frames % 4:
            raise ValueError(f"later_frames must be 4k, as the VAE compresses time by 4, got {self.later_frames}")
        if not self.questions:
            raise ValueError("questions must name at least one kind")
        if self.digit_side > self.canvas:
            raise ValueError(f"digit must not exceed the canvas of {self.canvas} pixels, got {self.digit}")
        return self

    @model_validator(mode="after")
    def _check_where_next(self) -> MovingDigitsSource:
        if "where_next" not in self.questions:
            return self
        if not self.later_frames:
            raise ValueError("the question where_next needs later_frames, after which it asks; at least 4")
        moved = self.speed * self.later_frames
        if any(len({self.third(place + move) for move in (-moved, 0, moved)}) < 3 for place in self.places):
            raise ValueError(
                "the question where_next needs a motion that leads to another third of the canvas in each direction, "
                f"or the present alone tells the answer; speed x later_frames is {moved} pixels on a canvas of "
                f"{self.canvas}, on which a digit of {self.digit_side} stands at {', '.join(map(str, self.places))}"
            )
        return self

    @property
    def digit_side(self) -> int:
        """Side of a digit in pixels."""
        return round(self.canvas / 2) if self.digit is None else self.digit

    @property
    def places(self) -> range:
        """Where a digit's left or upper edge can be in the present, in pixels."""
        return range(0, self.canvas - self.digit_side + 1, self.grid)

    def third(self, place: int) -> int:
        """Returns the third of the canvas, from 0, that holds the centre of a digit whose edge is at a place."""
        return (2 * place + self.digit_side) % (2 * self.canvas) * 3 // (2 * self.canvas)


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


def frames_of(source: SourceSection | MixtureSource | None, world: WorldFrames) -> int:
    """Returns the most frames that a world block of a source spans, generated ones included; 1 for images alone."""
    if isinstance(source, MixtureSource):
        return max(frames_of(part.data, world) for part in source.parts.values())
    if source is not None and world.frames == "rollout":
        return 1 + 4 * (world.steps or 0)
    if isinstance(source, ClipRules):
        alone = 1.0 if world.frames == "future" else 0.0
        return 1 if source.present == alone else world.taken(source.max_video_frames)
    if isinstance(source, MovingDigitsSource):
        return world.taken(1 + source.later_frames if world.frames == "future" else source.frames)
    return 1


def frames_problem(source: SourceSection | MixtureSource | None, world: WorldFrames, key: str) -> str | None:
    """Returns why no clip of a source can give the frames that are asked for; None if some may, or none are asked for.

    Args:
        source: What `data.train` or `data.eval` holds.
        world: What is asked for.
        key: That key.
    """
    if not (world.wants_later or world.wants_earlier):
        return None
    reasons = [reason for name, leaf in leaf_sources(source, key).items() for reason in [_lacks(leaf, world, name)]]
    return None if None in reasons or not reasons else reasons[0]


def _lacks(source: SourceSection, world: WorldFrames, key: str) -> str | None:
    """Returns why the clips of one source cannot give the frames that are asked for."""
    asked = f"data.world.frames: {world.frames}"
    if isinstance(source, MovingDigitsSource):
        name, there = ("later_frames", source.later_frames) if world.wants_later else ("frames", source.frames)
        needed = 4 * (world.steps or 1) + (0 if world.wants_later else 1)
        if there < needed:
            steps = "" if world.steps is None else f" with {world.steps} steps"
            return f"{asked}{steps} needs {key}.{name} of at least {needed}, got {there}"
        return None
    if not isinstance(source, ClipRules):
        return f"{asked} needs clips, and {key} is a source of images ({source.source})"
    if source.present == (1.0 if world.wants_later else 0.0):
        where, side = ("last", "later") if world.wants_later else ("first", "earlier")
        return (
            f"{asked} needs {side} frames, and {key}.present of {source.present:g} makes the {where} frame of each "
            "clip the present"
        )
    if world.taken(source.max_video_frames) == 1:
        return f"{asked} takes more than one frame, and {key}.max_video_frames is 1: set it, or data.world.steps"
    return None
