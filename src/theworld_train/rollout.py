"""Generates the futures of a run ahead: walks its samples, and keeps what the generator makes of their pictures."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console

from theworld_train.accounting.tokens import latent_cells
from theworld_train.assemble.encoded import recipe_of, rollout_recipe
from theworld_train.assemble.inputs import Inputs, open_inputs
from theworld_train.assemble.model import load_model
from theworld_train.checkpoint_files import resolve_checkpoint
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.data import Source
from theworld_train.data.pictures import Place
from theworld_train.data.rollouts import Futures, list_futures, load_futures
from theworld_train.encode import HEADER_BYTES, LISTED_TOGETHER, SAY_S, free_space, read_places, writable_directory
from theworld_train.encoded_files import KEY, EncodedFiles, Recipe, ShardWriter, clear_partials
from theworld_train.model.world_encoder import WorldEncoder
from theworld_train.model.world_generator import (
    Fit,
    Guardrail,
    Prompt,
    UnsafeRolloutError,
    WorldGenerator,
    load_generator,
    noise_seed,
)
from theworld_train.train.ledger import trainable_components
from theworld_train.train.run_lock import run_lock
from theworld_train.train.runtime import Runtime

#: Futures that a rank generates before it meets the others: one whose share is refused waits for the rest no longer.
GENERATED_TOGETHER = 4


@dataclass(frozen=True)
class Generated:
    """What is kept of a run's futures.

    Attributes:
        new: Entries that were missing and have been written.
        entries: Different futures of the run that are kept.
        refused: Ids of samples whose prompt or future the guardrail refuses.
        nbytes: Bytes of all entries under this recipe.
        generate_s: Mean seconds to generate one, on the device that did.
    """

    new: int
    entries: int
    refused: tuple[str, ...]
    nbytes: int
    generate_s: float

    def __str__(self) -> str:
        """Says what is kept, and what was refused."""
        lines = [
            f"rollout: {self.new:,} generated, {self.entries:,} kept; {self.nbytes:,} bytes, "
            f"{self.generate_s:.3g} s to generate one"
        ]
        if self.refused:
            lines.append(f"rollout: the guardrail refuses {len(self.refused):,}: {', '.join(self.refused)}")
        return "\n".join(lines)


def check_rollout(config: RunConfig) -> None:
    """Makes sure that a run asks for rollouts, and names a directory for them.

    Raises:
        ConfigError: If it does not.
    """
    world = config.data.world
    if not config.model.world.enabled:
        message = "the model has no world tokens to fill"
        raise ConfigError(Problem(message, key="model.world.enabled", value=False))
    if world.frames != "rollout":
        hint = "such as data.world.frames=rollout data.world.steps=1 data.encoded=runs/encoded"
        message = "nothing to generate: this run's world frames are no rollouts"
        raise ConfigError(Problem(message, key="data.world.frames", value=world.frames, hint=hint))


def rollout(
    config: RunConfig, console: Console, guardrail: Guardrail | None = None, *, only_held_out: bool = False
) -> Generated | None:
    """Writes the futures that a run reads into `data.encoded`; every rank calls it.

    What is there already stays. The ranks share what is missing. For a sample that training cannot take, or that the
    guardrail refuses, the next usable one gets its future too, as training takes it instead.

    Args:
        config: The run config, whose `data.world.frames` is `rollout`.
        console: Where the main rank says what it does.
        guardrail: Checks prompts and frames instead of NVIDIA's.
        only_held_out: Whether the samples that are trained on are left out.

    Returns:
        What is kept now; on other ranks than the main one, nothing.

    Raises:
        ConfigError: If there is nothing to generate, an input is wrong, or the directory cannot take it.
    """
    check_rollout(config)
    if only_held_out and config.data.eval is None:
        raise ConfigError(Problem("the run has no held-out samples", key="data.eval"))
    with ExitStack() as held, Runtime(config) as runtime:
        with runtime.agreement():
            inputs = open_inputs(config)
            directory = writable_directory(config)
        with runtime.agreement():
            if runtime.is_main:
                held.enter_context(run_lock(directory, config.name, KEY))
                clear_partials(directory)
        with runtime.agreement():
            generator = load_generator(config.data.world.rollout, runtime.device, guardrail)
            encoder, encoded = _world_encoder(config, inputs)
            recipe = rollout_recipe(config, encoded, generator.weights_digest())
        work = _Work(config, inputs, recipe, directory, runtime, console)
        with runtime.agreement():
            torch.nn.Module.to(encoder, runtime.device)
            todo = work.places(only_held_out=only_held_out)
        needs = _Needs()
        while todo:  # what the guardrail refuses is replaced by other samples, of which it may refuse some again
            work.list_together(needs, todo)
            with runtime.agreement():
                missing = work.missing(needs)
                if runtime.is_main:
                    work.announce(needs, missing, encoder.z_dim)
            todo = needs.without(work.generate(generator, encoder, missing))
        return work.report(needs) if runtime.is_main else None


def _world_encoder(config: RunConfig, inputs: Inputs) -> tuple[WorldEncoder, Recipe]:
    """Returns the world encoder that a run starts with, and the recipe of its latents."""
    origin = resolve_checkpoint(Path(config.init_from)) if config.init_from else None
    model = load_model(config, trainable_components(config), origin).model
    encoder = model.world_encoder
    assert isinstance(encoder, WorldEncoder)
    return encoder.eval(), recipe_of(Component.WORLD_ENCODER, config, inputs.processor, model)


@dataclass
class _Needs:
    """What a run needs, the same on every rank.

    Attributes:
        groups: By the place of each sample that the run takes in turn: what it needs, behind those that can not be
            taken in its stead; the last one is usable.
        refused: Digests of futures that the guardrail refuses.
        names: Ids of the samples that need them.
        tried: Futures that were missing.
        passes: How often samples have been listed.
    """

    groups: dict[Place, list[Futures]] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    passes: int = 0

    @property
    def listed(self) -> list[Futures]:
        """What each sample needs, once, in the order of the samples."""
        every = {futures.place: futures for group in self.groups.values() for futures in group}
        return [every[place] for place in sorted(every)]

    def without(self, refused: Collection[str]) -> list[Place]:
        """Notes that some futures are refused; returns the places whose samples needed them."""
        self.refused.update(refused)
        found = []
        for place, group in self.groups.items():
            samples = [each.sample for each in group if any(future.digest in refused for future in each.wanted)]
            self.names.update(samples)
            found += [place] if samples else []
        return found


@dataclass(frozen=True)
class _Work:
    """One rank's part in filling a directory."""

    config: RunConfig
    inputs: Inputs
    recipe: Recipe
    directory: Path
    runtime: Runtime
    console: Console

    def places(self, *, only_held_out: bool) -> list[Place]:
        """Returns the samples that the run takes in turn, or the held-out ones among them."""
        return [place for place in read_places(self.config, self.inputs) if place[0] or not only_held_out]

    def list_together(self, needs: _Needs, places: Sequence[Place]) -> None:
        """Lists what samples need, each rank its part; the ranks tell one another of some at a time."""
        rank, ranks = self.runtime.rank, self.runtime.world_size
        own, workers = places[rank::ranks], self.config.data.num_workers
        packed = self.config.training.batching == "packed"
        with closing(
            list_futures(
                self._sources, self.inputs.collator, own, workers, refused=frozenset(needs.refused), packed=packed
            )
        ) as listings:
            for _ in range(0, len(places), LISTED_TOGETHER * ranks):
                with self.runtime.agreement():
                    listed = list(islice(listings, LISTED_TOGETHER))
                needs.groups |= {group[0].place: group for each in self.runtime.gather(listed) for group in each}
        needs.passes += 1

    def missing(self, needs: _Needs) -> list[Futures]:
        """Returns the futures that are not kept yet, by prompt, each under the first sample that has it."""
        seen = set(EncodedFiles(self.recipe.folder(self.directory)).digests)
        found: list[Futures] = []
        for futures in needs.listed:
            for future in futures.wanted:
                if future.digest not in seen:
                    seen.add(future.digest)
                    found.append(replace(futures, wanted=(future,)))
        needs.tried.update(futures.wanted[0].digest for futures in found)
        return sorted(found, key=lambda futures: (futures.wanted[0].prompt, futures.place))

    def announce(self, needs: _Needs, missing: Sequence[Futures], channels: int) -> None:
        """Says what will be written, and makes room for it.

        Raises:
            ConfigError: If it does not fit.
        """
        first = needs.passes == 1
        if first and (skipped := [futures.skipped for futures in needs.listed if futures.skipped]):
            samples = f"{len(skipped):,} sample{'s' if len(skipped) > 1 else ''}"
            self._say(f"{samples} left out, as in training; the first one, {skipped[0]}")
        world = self.config.model.world
        size = 4 if world.encoder_dtype == "float32" else 2
        numbers = (1 + world.max_world_steps) * channels * latent_cells(world.resolution)
        needed = len(missing) * (numbers * size + HEADER_BYTES)
        free = free_space(self.directory, needed, "free some, or choose another directory")
        prompts = len({futures.wanted[0].prompt for futures in missing})
        if first or missing:
            self._say(
                f"{len(missing):,} futures under {prompts:,} prompts to generate into {self.directory}"
                f"{'' if first else ', in place of refused ones'}: {needed:,} bytes, {free:,} are free"
            )
        self.recipe.write(self.directory)

    def generate(self, generator: WorldGenerator, encoder: WorldEncoder, missing: Sequence[Futures]) -> set[str]:
        """Generates and writes what is missing, each rank its part; returns the digests of what is refused on any.

        The ranks take turns among what is sorted by prompt, so each has its part of what is refused or cheap.
        """
        rank, ranks = self.runtime.rank, self.runtime.world_size
        own, rules = missing[rank::ranks], self.config.data.world.rollout
        made_on = {"device": self.runtime.device_name, "torch": torch.__version__}
        made_on |= {"pipeline": rules.pipeline, "revision": rules.revision or ""}
        writer = ShardWriter(self.recipe.folder(self.directory), made_on)
        refused: set[str] = set()
        prompts: dict[str, Prompt | None] = {}
        done, said = 0, time.monotonic()
        places, workers = [futures.place for futures in own], self.config.data.num_workers
        with closing(load_futures(self._sources, self.inputs.collator, places, workers)) as loaded:
            for first in range(0, -(-len(missing) // ranks), GENERATED_TOGETHER):
                with self.runtime.agreement():
                    part = own[first : first + GENERATED_TOGETHER]
                    wanted = dict.fromkeys(futures.wanted[0].prompt for futures in part)
                    prompts = {prompt: prompts[prompt] for prompt in wanted if prompt in prompts}
                    prompts |= generator.encode_prompts(prompt for prompt in wanted if prompt not in prompts)
                    for futures, there in zip(part, islice(loaded, len(part)), strict=True):
                        if not self._generate(generator, encoder, writer, futures, there, prompts):
                            refused.add(futures.wanted[0].digest)
                    done += len(part)
                if self.runtime.is_main and time.monotonic() - said > SAY_S:
                    said = time.monotonic()
                    self._say(f"{done:,} of this process's {len(own):,} futures")
        with self.runtime.agreement():
            writer.seal()
        return {digest for each in self.runtime.gather(refused) for digest in each}

    def _generate(
        self,
        generator: WorldGenerator,
        encoder: WorldEncoder,
        writer: ShardWriter,
        wanted: Futures,
        there: Futures,
        prompts: dict[str, Prompt | None],
    ) -> bool:
        """Generates one future, unless its sample has changed meanwhile; returns whether the guardrail lets it pass."""
        (future,) = wanted.wanted
        picture = next((each.picture for each in there.wanted if each.digest == future.digest), None)
        prompt = prompts[future.prompt]
        if picture is None or prompt is None:
            return prompt is not None
        world = self.config.model.world
        began = time.perf_counter()
        try:
            latents = generator.latents(
                picture,
                prompt,
                noise_seed(self.config.data.world.rollout.seed, future.digest),
                world.max_world_steps,
                encoder,
                Fit(world.resolution, world.resize),
            )
        except UnsafeRolloutError:
            return False
        writer.add(future.digest, latents.cpu(), time.perf_counter() - began)
        return True

    def report(self, needs: _Needs) -> Generated:
        """Returns what is kept, once all ranks have written."""
        files = EncodedFiles(self.recipe.folder(self.directory))
        used = {future.digest for futures in needs.listed for future in futures.wanted}
        return Generated(
            new=sum(digest in files for digest in needs.tried),
            entries=sum(digest in files for digest in used),
            refused=tuple(sorted(needs.names)),
            nbytes=files.nbytes,
            generate_s=files.seconds / max(1, len(files)),
        )

    # -- parts ----------------------------------------------------------------------------------------------------

    @property
    def _sources(self) -> list[Source]:
        held_out = self.inputs.held_out
        return [self.inputs.train] if held_out is None else [self.inputs.train, held_out]

    def _say(self, text: str) -> None:
        self.console.print(f"{self.config.name}: {text}", highlight=False, markup=False, soft_wrap=True)
