"""Encodes the media of a run ahead: walks its samples, and keeps what its frozen encoders make of them."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
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
            directory = _directory(config)
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
        with runtime.agreement():
            own = work.list_own()
        listings = sorted((item for rank in runtime.gather(own) for item in rank), key=lambda item: item.place)
        stage = build_stage(model, config)
        with runtime.agreement():
            missing = work.missing(listings)
            if runtime.is_main:
                work.announce(listings, missing)
        with runtime.agreement():
            work.encode_own(stage, missing)
        return work.report(listings, missing) if runtime.is_main else []


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


def _directory(config: RunConfig) -> Path:
    """Makes the directory, and makes sure that it can be written to."""
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


@dataclass(frozen=True)
class _Work:
    """One rank's part in filling a directory."""

    config: RunConfig
    inputs: Inputs
    recipes: Mapping[Component, Recipe]
    directory: Path
    runtime: Runtime
    console: Console

    def list_own(self) -> list[Listing]:
        """Lists the pictures of this rank's share of the samples."""
        places = read_places(self.config, self.inputs)[self.runtime.rank :: self.runtime.world_size]
        workers = self.config.data.num_workers
        with closing(
            list_pictures(self._sources, self.inputs.collator, list(self.recipes), places, workers)
        ) as listings:
            return list(listings)

    def missing(self, listings: Sequence[Listing]) -> list[tuple[Place, list[Picture]]]:
        """Returns the pictures that are not kept yet, each under the first sample that has it."""
        seen = {(component, digest) for component, files in self._files().items() for digest in files.digests}
        found: dict[Place, list[Picture]] = {}
        for listing in listings:
            for picture in listing.pictures:
                if (picture.component, picture.digest) not in seen:
                    seen.add((picture.component, picture.digest))
                    found.setdefault(listing.place, []).append(picture)
        return list(found.items())

    def announce(self, listings: Sequence[Listing], missing: Sequence[tuple[Place, Sequence[Picture]]]) -> None:
        """Says what will be written, and makes room for it: the recipes' folders.

        Raises:
            ConfigError: If it does not fit.
        """
        skipped = [listing.skipped for listing in listings if listing.skipped]
        if skipped:
            samples = f"{len(skipped):,} sample{'s' if len(skipped) > 1 else ''}"
            self._say(f"{samples} left out, as in training; the first one, {skipped[0]}")
        sizes = Counter((picture.component, picture.frames) for _, pictures in missing for picture in pictures)
        needed = sum(number * self._nbytes(*size) for size, number in sizes.items())
        free = shutil.disk_usage(self.directory).free
        self._say(f"{sizes.total():,} pictures to encode into {self.directory}: {needed:,} bytes, {free:,} are free")
        if needed > free:
            hint = "free some, choose another directory, or keep one encoder's work alone with --only"
            message = f"what is missing takes {needed:,} bytes, but {free:,} are free there"
            raise ConfigError(Problem(message, key=KEY, value=str(self.directory), hint=hint))
        for recipe in self.recipes.values():
            recipe.write(self.directory)

    def encode_own(self, stage: StageModule, missing: Sequence[tuple[Place, list[Picture]]]) -> None:
        """Encodes and writes this rank's share of what is missing."""
        share = missing[self.runtime.rank :: self.runtime.world_size]
        if not share:
            return
        device, made_on = self.runtime.device, {"device": self.runtime.device_name, "torch": torch.__version__}
        stage.set_training_modes()
        for component, module in component_modules(stage.model).items():
            if component in self.recipes:
                nn.Module.to(module, device)
        folders = {component: recipe.folder(self.directory) for component, recipe in self.recipes.items()}
        writers = {component: ShardWriter(folder, made_on) for component, folder in folders.items()}
        total, done, said = sum(len(pictures) for _, pictures in share), 0, time.monotonic()
        with closing(load_pictures(self._sources, self.inputs.collator, share, self.config.data.num_workers)) as loaded:
            for (component, digest, _), pixels in (pair for pairs in loaded for pair in pairs):
                began = time.perf_counter()
                encoded = stage.encode_alone(component, pixels.to(device)).cpu()
                writers[component].add(digest, encoded, time.perf_counter() - began)
                done += 1
                if self.runtime.is_main and time.monotonic() - said > SAY_S:
                    said = time.monotonic()
                    self._say(f"{done:,} of this process's {total:,} pictures")
        for writer in writers.values():
            writer.seal()

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

    def report(self, listings: Sequence[Listing], missing: Sequence[tuple[Place, Sequence[Picture]]]) -> list[Kept]:
        """Returns what is kept, once all ranks have written."""
        kept = []
        for component, files in self._files().items():
            used = [p.digest for listing in listings for p in listing.pictures if p.component is component]
            different = sorted(set(used))
            kept.append(
                Kept(
                    component=component,
                    new=sum(picture.component is component for _, pictures in missing for picture in pictures),
                    entries=sum(digest in files for digest in different),
                    uses=len(used),
                    nbytes=files.nbytes,
                    entry_bytes=files.nbytes / max(1, len(files)),
                    encode_s=files.seconds / max(1, len(files)),
                    read_s=_seconds_to_read(files, different),
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
