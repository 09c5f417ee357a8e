"""Encodes the media of a run ahead: walks its samples, and keeps what its frozen encoders make of them."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from theworld_train.accounting.tokens import latent_cells, latent_frames
from theworld_train.assemble.encoded import frozen_encoders, recipe_of
from theworld_train.assemble.inputs import Inputs, max_steps, open_inputs
from theworld_train.assemble.model import build_stage, describe_model, load_model
from theworld_train.checkpoint_files import resolve_checkpoint
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.schema import RunConfig
from theworld_train.data.pictures import Listing, Picture, Place, list_pictures, load_pictures
from theworld_train.encoded_files import KEY, EncodedFiles, Recipe, ShardWriter, clear_partials, recipes_in
from theworld_train.model.components import component_modules
from theworld_train.train.ledger import trainable_components
from theworld_train.train.run_lock import run_lock
from theworld_train.train.runtime import Runtime
from theworld_train.train.stage import StageModule

#: Entries that are read back, to time it.
READ_BACK = 64
#: Bytes of a shard's header for each entry: its digest twice, checksum, shape and place.
HEADER_BYTES = 256
#: Seconds between lines that say how far it is.
SAY_S = 30.0
#: Samples that a rank lists before the ranks tell one another what they have found.
LISTED_TOGETHER = 1024


@dataclass(frozen=True)
class Kept:
    """What is kept of one encoder's work on the media of a run.

    Attributes:
        component: The encoder.
        new: Entries that were missing and have been written.
        entries: Different pictures of the run.
        uses: Pictures of one pass over the run's samples, repeated ones too.
        nbytes: Bytes of all entries under this recipe, also of other runs'.
        entry_bytes: Mean bytes of one.
        encode_s: Mean seconds to encode one, on the device that did.
        read_s: Mean seconds to read one, its page cache dropped where the system can.
    """

    component: Component
    new: int
    entries: int
    uses: int
    nbytes: int
    entry_bytes: float
    encode_s: float
    read_s: float

    def __str__(self) -> str:
        """Says what is kept, and what that saves."""
        name = self.component.value
        encoding, reading = self.uses * self.encode_s, self.uses * self.read_s
        lines = [
            f"{name}: {self.new:,} encoded, {self.entries:,} kept; {self.nbytes:,} bytes, {self.entry_bytes:,.0f} each",
            f"{name}: {self.encode_s * 1e3:.3g} ms to encode one, {self.read_s * 1e3:.3g} ms to read it; a pass over "
            f"{self.uses:,} pictures: {encoding:,.1f} s of encoding, or {reading:,.1f} s of reading in data workers",
        ]
        if self.entries and reading >= encoding:
            lines.append(f"{name}: keeping it saves nothing: remove its folder, and leave it out by --only")
        return "\n".join(lines)


def encode(config: RunConfig, console: Console, only: Sequence[str] = (), *, verify: bool = False) -> list[Kept]:
    """Writes what the frozen encoders of a run make of its media into `data.encoded`; every rank calls it.

    What is there already stays. The ranks share what is missing.

    Args:
        config: The run config.
        console: Where the main rank says what it does.
        only: Names of the encoders whose work is kept; all frozen ones if empty.
        verify: Whether to read all that is there first, and compare it with its checksums.

    Returns:
        What is kept now; on other ranks than the main one, nothing.

    Raises:
        ConfigError: If there is nothing to encode, an input is wrong, or the directory cannot take it.
    """
    components = chosen_encoders(config, only)
    with ExitStack() as held, Runtime(config) as runtime:
        with runtime.agreement():
            inputs = open_inputs(config)
            directory = writable_directory(config)
        with runtime.agreement():
            if runtime.is_main:
                held.enter_context(run_lock(directory, config.name, KEY))
                clear_partials(directory)
        with runtime.agreement():
            origin = resolve_checkpoint(Path(config.init_from)) if config.init_from else None
            model = load_model(config, trainable_components(config), origin).model
            recipes = {component: recipe_of(component, config, inputs.processor, model) for component in components}
            for component in components:
                recipes_in(directory, component.value)  # names one that is damaged
        work = _Work(config, inputs, recipes, directory, runtime, console)
        if verify:
            with runtime.agreement():
                work.verify()
        share = work.find_share()
        stage = build_stage(model, config)
        missing = sum(runtime.gather(share.sizes), Counter())
        with runtime.agreement():
            if runtime.is_main:
                work.announce(share, missing)
        with runtime.agreement():
            share.written.update(work.encode_share(stage, share))
        ranks = runtime.gather(share.counts)
        uses, found, written = (sum(counts, Counter[Component]()) for counts in zip(*ranks, strict=True))
        return work.report(share, uses, found, written) if runtime.is_main else []


def chosen_encoders(config: RunConfig, only: Sequence[str] = ()) -> tuple[Component, ...]:
    """Returns the encoders whose work is kept.

    Args:
        config: The run config.
        only: Names of some; all frozen ones if empty.

    Raises:
        ConfigError: If there is none, a name is not that of a frozen encoder, or no directory is named.
    """
    frozen = frozen_encoders(config)
    names = [component.value for component in frozen]
    problems = [
        Problem("is no frozen encoder of this run", key="--only", value=name, hint=did_you_mean(name, names))
        for name in only
        if name not in names
    ]
    if not frozen:
        hint = "what trains is encoded anew in every step"
        problems = [Problem("nothing to encode: every encoder of this run trains", key="trainable", hint=hint)]
    if config.data.encoded is None:
        hint = "such as data.encoded=runs/encoded"
        problems.append(Problem("names the directory to fill, and is not set", key=KEY, hint=hint))
    if problems:
        raise ConfigError(problems)
    return tuple(component for component in frozen if not only or component.value in only)


def writable_directory(config: RunConfig) -> Path:
    """Makes `data.encoded`, and makes sure that it can be written to.

    Raises:
        ConfigError: If it cannot.
    """
    assert config.data.encoded is not None
    directory = Path(config.data.encoded)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{socket.gethostname()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        message = f"cannot be written to: {error.strerror}"
        raise ConfigError(Problem(message, key=KEY, value=config.data.encoded)) from error
    return directory


def free_space(directory: Path, needed: int, hint: str) -> int:
    """Returns the bytes that are free in a directory.

    Raises:
        ConfigError: If fewer are free than needed.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        message = f"what is missing takes {needed:,} bytes, but {free:,} are free there"
        raise ConfigError(Problem(message, key=KEY, value=str(directory), hint=hint))
    return free


def read_places(config: RunConfig, inputs: Inputs) -> list[Place]:
    """Returns the samples that a run reads: those that its steps take in turn, and those that it is measured on."""
    total = len(inputs.train)
    trained: set[int] = set()
    for step in range(max_steps(config, total)):
        trained.update(inputs.order.indices(step))
        if len(trained) == total:
            break
    places = [(0, index) for index in sorted(trained)]
    if inputs.held_out is not None:
        measured = min(config.evaluation.max_samples or len(inputs.held_out), len(inputs.held_out))
        places += [(1, index) for index in range(measured)]
    return places


@dataclass
class _Share:
    """The pictures of a run that fall to one rank, by their contents: it encodes those that are missing.

    Attributes:
        rank: The rank.
        world_size: Ranks among which the pictures are divided.
        kept: What was there before, by encoder.
        missing: The pictures to encode, each under the first sample that has it.
        uses: How often the run's samples hold pictures of this rank, by encoder.
        found: Different pictures that were there already.
        written: Pictures that have been encoded.
        skipped: Samples that training leaves out, of all ranks.
        first_skipped: Why the first of them.
    """

    rank: int
    world_size: int
    kept: Mapping[Component, frozenset[str] | EncodedFiles]
    missing: dict[Place, list[Picture]] = field(default_factory=dict)
    uses: Counter[Component] = field(default_factory=Counter)
    found: Counter[Component] = field(default_factory=Counter)
    written: Counter[Component] = field(default_factory=Counter)
    skipped: int = 0
    first_skipped: str = ""
    _seen: dict[Component, set[str]] = field(default_factory=lambda: defaultdict(set))

    def take(self, listings: Iterable[Listing]) -> None:
        """Notes which pictures of some samples, in the order of the run, fall to this rank."""
        for listing in listings:
            if listing.skipped:
                self.skipped += 1
                self.first_skipped = self.first_skipped or listing.skipped
            for picture in listing.pictures:
                if int(picture.digest[:8], 16) % self.world_size == self.rank:
                    self._note(listing.place, picture)

    def _note(self, place: Place, picture: Picture) -> None:
        component, digest, _ = picture
        self.uses[component] += 1
        if digest in self._seen[component]:
            return
        self._seen[component].add(digest)
        if digest in self.kept[component]:
            self.found[component] += 1
        else:
            self.missing.setdefault(place, []).append(picture)

    @property
    def sizes(self) -> Counter[tuple[Component, int]]:
        """How many pictures are missing, by encoder and frames."""
        return Counter(
            (picture.component, picture.frames) for pictures in self.missing.values() for picture in pictures
        )

    @property
    def counts(self) -> tuple[Counter[Component], Counter[Component], Counter[Component]]:
        """`uses`, `found` and `written`."""
        return self.uses, self.found, self.written

    def digests(self, component: Component) -> list[str]:
        """Returns the different pictures of an encoder, sorted."""
        return sorted(self._seen[component])


@dataclass(frozen=True)
class _Work:
    """One rank's part in filling a directory."""

    config: RunConfig
    inputs: Inputs
    recipes: Mapping[Component, Recipe]
    directory: Path
    runtime: Runtime
    console: Console

    def find_share(self) -> _Share:
        """Lists the samples of the run, each rank its part, and returns the pictures that fall to this rank.

        The ranks tell one another of a limited number of samples at a time, so none ever holds all of them.
        """
        world_size, collator = self.runtime.world_size, self.inputs.collator
        with self.runtime.agreement():
            kept = self._files()
            places = read_places(self.config, self.inputs)
        share, own = _Share(self.runtime.rank, world_size, kept), places[self.runtime.rank :: world_size]
        with closing(
            list_pictures(self._sources, collator, list(self.recipes), own, self.config.data.num_workers)
        ) as listings:
            for _ in range(0, len(places), LISTED_TOGETHER * world_size):
                with self.runtime.agreement():
                    listed = list(islice(listings, LISTED_TOGETHER))
                # Ranks take turns among the places, so that those of a round follow upon those of the round before.
                together = (listing for rank in self.runtime.gather(listed) for listing in rank)
                share.take(sorted(together, key=lambda listing: listing.place))
        return share

    def announce(self, share: _Share, missing: Counter[tuple[Component, int]]) -> None:
        """Says what will be written, and makes room for it: the recipes' folders.

        Raises:
            ConfigError: If it does not fit.
        """
        if share.skipped:
            samples = f"{share.skipped:,} sample{'s' if share.skipped > 1 else ''}"
            self._say(f"{samples} left out, as in training; the first one, {share.first_skipped}")
        needed = sum(number * self._nbytes(*size) for size, number in missing.items())
        hint = "free some, choose another directory, or keep one encoder's work alone with --only"
        free = free_space(self.directory, needed, hint)
        self._say(f"{missing.total():,} pictures to encode into {self.directory}: {needed:,} bytes, {free:,} are free")
        for recipe in self.recipes.values():
            recipe.write(self.directory)

    def encode_share(self, stage: StageModule, share: _Share) -> Counter[Component]:
        """Encodes and writes what is missing of this rank's share; returns how many of each encoder."""
        missing, written = list(share.missing.items()), Counter[Component]()
        if not missing:
            return written
        device, made_on = self.runtime.device, {"device": self.runtime.device_name, "torch": torch.__version__}
        stage.set_training_modes()
        for component, module in component_modules(stage.model).items():
            if component in self.recipes:
                nn.Module.to(module, device)
        folders = {component: recipe.folder(self.directory) for component, recipe in self.recipes.items()}
        writers = {component: ShardWriter(folder, made_on) for component, folder in folders.items()}
        total, said = share.sizes.total(), time.monotonic()
        workers = self.config.data.num_workers
        with closing(load_pictures(self._sources, self.inputs.collator, missing, workers)) as loaded:
            for (component, digest, _), pixels in (pair for pairs in loaded for pair in pairs):
                began = time.perf_counter()
                encoded = stage.encode_alone(component, pixels.to(device)).cpu()
                writers[component].add(digest, encoded, time.perf_counter() - began)
                written[component] += 1
                if self.runtime.is_main and time.monotonic() - said > SAY_S:
                    said = time.monotonic()
                    self._say(f"{written.total():,} of this process's {total:,} pictures")
        for writer in writers.values():
            writer.seal()
        return written

    def verify(self) -> None:
        """Reads all that is there; the main rank does it.

        Raises:
            ConfigError: Naming every damaged shard.
        """
        if not self.runtime.is_main:
            return
        files = self._files()
        if found := [problem for kept in files.values() for problem in kept.verify()]:
            raise ConfigError(found)
        self._say(f"verified {sum(len(kept) for kept in files.values()):,} entries")

    def report(
        self, share: _Share, uses: Counter[Component], found: Counter[Component], written: Counter[Component]
    ) -> list[Kept]:
        """Returns what is kept, once all ranks have written; reading is timed on this rank's share."""
        kept = []
        for component, files in self._files().items():
            kept.append(
                Kept(
                    component=component,
                    new=written[component],
                    entries=found[component] + written[component],
                    uses=uses[component],
                    nbytes=files.nbytes,
                    entry_bytes=files.nbytes / max(1, len(files)),
                    encode_s=files.seconds / max(1, len(files)),
                    read_s=_seconds_to_read(files, [each for each in share.digests(component) if each in files]),
                )
            )
        return kept

    # -- parts ----------------------------------------------------------------------------------------------------

    @property
    def _sources(self) -> list[Any]:
        held_out = self.inputs.held_out
        return [self.inputs.train] if held_out is None else [self.inputs.train, held_out]

    def _files(self) -> dict[Component, EncodedFiles]:
        return {component: EncodedFiles(recipe.folder(self.directory)) for component, recipe in self.recipes.items()}

    def _nbytes(self, component: Component, frames: int) -> int:
        """Returns the bytes that the entry of an image or clip will take."""
        config = self.config
        architecture: Any = describe_model(config)
        if component is Component.WORLD_ENCODER:
            cells = latent_cells(config.model.world.resolution)
            numbers = latent_frames(frames) * int(architecture.world_encoder_config["z_dim"]) * cells
            size = 4 if config.model.world.encoder_dtype == "float32" else 2
        else:
            vision = architecture.vision_config
            numbers = int(vision.image_size // vision.patch_size) ** 2 * int(vision.hidden_size)
            size = 4 if config.precision == "fp32" else 2
        return numbers * size + HEADER_BYTES

    def _say(self, text: str) -> None:
        self.console.print(f"{self.config.name}: {text}", highlight=False, markup=False, soft_wrap=True)


def _seconds_to_read(files: EncodedFiles, digests: Sequence[str]) -> float:
    """Returns the mean seconds to read an entry, over a few that are spread evenly."""
    chosen = digests[:: max(1, len(digests) // READ_BACK)]
    files.forget_pages()
    began = time.perf_counter()
    for digest in chosen:
        files.get(digest)
    return (time.perf_counter() - began) / max(1, len(chosen))
