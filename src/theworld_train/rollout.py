"""Generates the futures of a run ahead: walks its samples, and keeps what the generator makes of their pictures."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
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
from theworld_train.data.rollouts import Futures, list_futures
from theworld_train.encode import HEADER_BYTES, SAY_S, free_space, read_places, writable_directory
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

#: Distinct prompts whose embeddings are held at once: at 512 tokens of T5-11B, a MiB each in bf16.
PROMPTS_AT_ONCE = 256


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

    What is there already stays. The ranks share what is missing, sorted by prompt.

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
            own = work.list_own(only_held_out=only_held_out)
        listed = sorted((item for rank in runtime.gather(own) for item in rank), key=lambda item: item.place)
        with runtime.agreement():
            missing = work.missing(listed)
            if runtime.is_main:
                work.announce(listed, missing, encoder.z_dim)
        refused: list[str] = []
        with runtime.agreement():
            torch.nn.Module.to(encoder, runtime.device)
            refused = work.generate_own(generator, encoder, missing)
        every = sorted({sample for rank in runtime.gather(refused) for sample in rank})
        return work.report(listed, missing, every) if runtime.is_main else None


def _world_encoder(config: RunConfig, inputs: Inputs) -> tuple[WorldEncoder, Recipe]:
    """Returns the world encoder that a run starts with, and the recipe of its latents."""
    origin = resolve_checkpoint(Path(config.init_from)) if config.init_from else None
    model = load_model(config, trainable_components(config), origin).model
    encoder = model.world_encoder
    assert isinstance(encoder, WorldEncoder)
    return encoder.eval(), recipe_of(Component.WORLD_ENCODER, config, inputs.processor, model)


@dataclass(frozen=True)
class _Work:
    """One rank's part in filling a directory."""

    config: RunConfig
    inputs: Inputs
    recipe: Recipe
    directory: Path
    runtime: Runtime
    console: Console

    def list_own(self, *, only_held_out: bool) -> list[Futures]:
        """Lists the futures of this rank's share of the samples, or of the held-out ones among them."""
        places = [place for place in read_places(self.config, self.inputs) if place[0] or not only_held_out]
        own = places[self.runtime.rank :: self.runtime.world_size]
        with closing(self._list(own, pictures=False)) as listed:
            return list(listed)

    def missing(self, listed: Sequence[Futures]) -> list[Futures]:
        """Returns the futures that are not kept yet, by prompt, each under the first sample that has it."""
        seen = set(EncodedFiles(self.recipe.folder(self.directory)).digests)
        found: list[Futures] = []
        for futures in listed:
            for future in futures.wanted:
                if future.digest not in seen:
                    seen.add(future.digest)
                    found.append(replace(futures, wanted=(future,)))
        return sorted(found, key=lambda futures: (futures.wanted[0].prompt, futures.place))

    def announce(self, listed: Sequence[Futures], missing: Sequence[Futures], channels: int) -> None:
        """Says what will be written, and makes room for it.

        Raises:
            ConfigError: If it does not fit.
        """
        if skipped := [futures.skipped for futures in listed if futures.skipped]:
            samples = f"{len(skipped):,} sample{'s' if len(skipped) > 1 else ''}"
            self._say(f"{samples} left out, as in training; the first one, {skipped[0]}")
        world = self.config.model.world
        size = 4 if world.encoder_dtype == "float32" else 2
        numbers = (1 + world.max_world_steps) * channels * latent_cells(world.resolution)
        needed = len(missing) * (numbers * size + HEADER_BYTES)
        free = free_space(self.directory, needed, "free some, or choose another directory")
        prompts = len({futures.wanted[0].prompt for futures in missing})
        self._say(
            f"{len(missing):,} futures under {prompts:,} prompts to generate into {self.directory}: {needed:,} bytes, "
            f"{free:,} are free"
        )
        self.recipe.write(self.directory)

    def generate_own(self, generator: WorldGenerator, encoder: WorldEncoder, missing: Sequence[Futures]) -> list[str]:
        """Generates and writes this rank's share of what is missing; returns the ids of samples that are refused."""
        rank, ranks = self.runtime.rank, self.runtime.world_size
        share = missing[len(missing) * rank // ranks : len(missing) * (rank + 1) // ranks]
        made_on = {"device": self.runtime.device_name, "torch": torch.__version__}
        writer = ShardWriter(self.recipe.folder(self.directory), made_on)
        refused: list[str] = []
        done, said = 0, time.monotonic()
        for part in _by_prompts(share):
            prompts = generator.encode_prompts(futures.wanted[0].prompt for futures in part)
            with closing(self._list([futures.place for futures in part], pictures=True)) as loaded:
                for wanted, there in zip(part, loaded, strict=True):
                    if not self._generate(generator, encoder, writer, wanted, there, prompts):
                        refused.append(wanted.sample)
                    done += 1
                    if self.runtime.is_main and time.monotonic() - said > SAY_S:
                        said = time.monotonic()
                        self._say(f"{done:,} of this process's {len(share):,} futures")
        writer.seal()
        return refused

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

    def report(self, listed: Sequence[Futures], missing: Sequence[Futures], refused: Sequence[str]) -> Generated:
        """Returns what is kept, once all ranks have written."""
        files = EncodedFiles(self.recipe.folder(self.directory))
        used = {future.digest for futures in listed for future in futures.wanted}
        return Generated(
            new=sum(futures.wanted[0].digest in files for futures in missing),
            entries=sum(digest in files for digest in used),
            refused=tuple(refused),
            nbytes=files.nbytes,
            generate_s=files.seconds / max(1, len(files)),
        )

    # -- parts ----------------------------------------------------------------------------------------------------

    def _list(self, places: Sequence[tuple[int, int]], *, pictures: bool) -> Generator[Futures]:
        held_out = self.inputs.held_out
        sources = [self.inputs.train] if held_out is None else [self.inputs.train, held_out]
        return list_futures(sources, self.inputs.collator, places, self.config.data.num_workers, pictures=pictures)

    def _say(self, text: str) -> None:
        self.console.print(f"{self.config.name}: {text}", highlight=False, markup=False, soft_wrap=True)


def _by_prompts(share: Sequence[Futures]) -> Iterator[list[Futures]]:
    """Yields futures, sorted by prompt, in runs that hold so many prompts at most; one prompt is never cut in two."""
    part: list[Futures] = []
    prompts: set[str] = set()
    for futures in share:
        prompt = futures.wanted[0].prompt
        if prompt not in prompts and len(prompts) == PROMPTS_AT_ONCE:
            yield part
            part, prompts = [], set()
        part.append(futures)
        prompts.add(prompt)
    if part:
        yield part
