"""Advice: whether a run fits a GPU, with what margin and how large a micro-batch, and what to change if it does not."""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from theworld_train.accounting.gpus import GpuSpec
from theworld_train.accounting.tokens import world_tokens
from theworld_train.assemble.model import describe_model
from theworld_train.config import parse_run_config
from theworld_train.config.schema import GradientCheckpointing, Offload, RunConfig, able_strategies
from theworld_train.config.schema import Strategy as StrategyName
from theworld_train.config.sources import frames_of
from theworld_train.memory.timeline import Peak, Timeline
from theworld_train.plan.allocator import reserved_bytes
from theworld_train.plan.dry_run import DeviceKind, DryRun, Gathering, dry_run
from theworld_train.plan.strategies import STRATEGIES, Strategy, load_peak, rank_timeline

Word = Literal["fits", "tight", "does not fit"]
#: Dotted keys of the run config and their values.
Overrides = tuple[tuple[str, object], ...]

GIB = 2**30
#: What a process takes of a GPU beside PyTorch's allocator: CUDA's context and kernels, libraries' workspaces.
CONTEXT_BYTES = int(0.7 * GIB)
#: Buffers of NCCL where several ranks talk.
COLLECTIVE_BYTES = int(0.4 * GIB)
#: Share of a GPU below which the margin is called tight: what kernels take inside is not seen.
TIGHT_SHARE = 0.03
#: GPUs of a machine, within which `runtime.hybrid` shards.
MACHINE_RANKS = 8
#: Resolutions that advice tries below the config's, largest first.
RESOLUTIONS = (384, 256, 224)

#: Optimizer steps of a dry run: the optimizer's state comes with the first one.
_STEPS = 2


@dataclass(frozen=True)
class Setting:
    """How a run is laid out.

    Attributes:
        strategy: How ranks share the work.
        ranks: Their number.
        offload: What is kept in the host's memory.
        micro_batch_size: Samples that one rank processes at once.
    """

    strategy: Strategy
    ranks: int
    offload: Offload
    micro_batch_size: int


@dataclass(frozen=True)
class Need:
    """What one rank takes of a GPU.

    Attributes:
        setting: How the run is laid out.
        peak: The moment of most memory, in a step or when the model is loaded.
        reserved: Bytes that the caching allocator has taken by then, its fragments included.
        overhead: Bytes beside the allocator.
    """

    setting: Setting
    peak: Peak
    reserved: int
    overhead: int

    @property
    def least(self) -> int:
        """Bytes without which there is no step, if the allocator has to give back all that it can."""
        return self.peak.total + self.overhead

    @property
    def usual(self) -> int:
        """Bytes that the process is seen to take."""
        return self.reserved + self.overhead


@dataclass(frozen=True)
class Verdict:
    """Whether a need fits a GPU.

    Attributes:
        need: The need.
        gpu: The GPU.
        word: `fits`; `tight` if the allocator must give memory back in between or little is left; or `does not fit`.
        margin: Bytes left, negative if it does not fit.
    """

    need: Need
    gpu: GpuSpec
    word: Word
    margin: int


class Option(NamedTuple):
    """Something to change, not yet priced.

    Attributes:
        overrides: Keys of the run config and their values.
        strategy: How ranks share the work.
        offload: What is kept in the host's memory.
    """

    overrides: Overrides
    strategy: StrategyName
    offload: Offload


@dataclass(frozen=True)
class Change:
    """Something to change so that a run fits.

    Attributes:
        overrides: Keys of the run config and their values.
        layout: Options for strategy and offload, empty if they stay.
        verdict: What the changed run needs, priced by a dry run of its own.
    """

    overrides: Overrides
    layout: str
    verdict: Verdict

    def __str__(self) -> str:
        """Renders it as arguments of the command line."""
        return " ".join([*(f"{key}={json.dumps(value)}" for key, value in self.overrides), self.layout]).strip()


@dataclass(frozen=True)
class Assessment:
    """What is to be said of a run on a GPU.

    Attributes:
        verdict: Whether it fits as it is.
        largest_micro_batch: Samples of the largest micro-batch that fits; 0 if none does.
        change: The cheapest change that makes it fit; None if it fits already, or nothing does.
        least: If nothing makes it fit, the change that takes the least memory.
    """

    verdict: Verdict
    largest_micro_batch: int
    change: Change | None = None
    least: Change | None = None


def judge(need: Need, gpu: GpuSpec) -> Verdict:
    """Returns whether a need fits a GPU."""
    capacity = int(gpu.usable_gib * GIB)
    margin = capacity - need.usual
    if margin >= TIGHT_SHARE * capacity:
        return Verdict(need, gpu, "fits", margin)
    if need.least <= capacity:
        return Verdict(need, gpu, "tight", margin)
    return Verdict(need, gpu, "does not fit", capacity - need.least)


class Planner:
    """Plans one run config; every dry run is made once."""

    def __init__(
        self,
        config: RunConfig,
        positions: int | None = None,
        supervised: int | None = None,
        device: DeviceKind = "cuda",
    ) -> None:
        """Starts with no dry run.

        Args:
            config: The run config.
            positions: Tokens of a sample instead of `data.max_sequence_length`.
            supervised: Supervised tokens of a sample; all of its text if absent.
            device: Whose memory is planned.
        """
        self.config = config
        self._device: DeviceKind = device
        self._positions = positions
        self._supervised = supervised
        self._runs: dict[tuple[int, Gathering], DryRun] = {}
        self._needs: dict[Setting, Need] = {}
        self._variants: dict[Overrides, Planner] = {}

    # -- one setting --------------------------------------------------------------------------------------------------

    def setting(
        self, strategy: StrategyName, ranks: int, offload: Offload = "none", micro_batch_size: int | None = None
    ) -> Setting:
        """Returns a setting whose micro-batch is the config's, as far as the global batch has one for every rank."""
        training = self.config.training
        size = training.micro_batch_size if micro_batch_size is None else micro_batch_size
        return Setting(STRATEGIES[strategy], ranks, offload, min(size, max(1, training.global_batch_size // ranks)))

    def run(self, setting: Setting, steps: int = _STEPS) -> DryRun:
        """Returns the dry run that a setting's memory is worked out from, of so many steps at least."""
        alone = setting.ranks == 1 and setting.offload == "none"
        gathering: Gathering = "none" if alone else setting.strategy.gathering
        key = (setting.micro_batch_size, gathering)
        known = self._runs.get(key)
        if known is None or known.steps < steps:
            self._runs[key] = dry_run(
                self.config,
                device=self._device,
                micro_batch_size=setting.micro_batch_size,
                steps=steps,
                gathering=gathering,
                positions=self._positions,
                supervised=self._supervised,
            )
        return self._runs[key]

    def timeline(self, setting: Setting, steps: int = _STEPS) -> Timeline:
        """Returns what one rank holds over time."""
        samples = setting.micro_batch_size * setting.ranks
        return rank_timeline(
            self.run(setting, steps),
            setting.strategy,
            self._shards(setting),
            setting.offload,
            accumulates=self.config.training.global_batch_size > samples,
        )

    def need(self, setting: Setting) -> Need:
        """Returns what one rank takes of a GPU."""
        if setting not in self._needs:
            timeline = self.timeline(setting)
            overhead = CONTEXT_BYTES + (COLLECTIVE_BYTES if setting.ranks > 1 else 0)
            step = timeline.peak(_STEPS - 1)
            load = load_peak(self.run(setting), setting.strategy, self._shards(setting))
            peak = max(step, load, key=lambda peak: peak.total)
            self._needs[setting] = Need(setting, peak, max(reserved_bytes(timeline.held), peak.total), overhead)
        return self._needs[setting]

    def _shards(self, setting: Setting) -> int:
        """Returns the ranks that share what is sharded: with `runtime.hybrid` those of one machine."""
        hybrid = self.config.runtime.hybrid and setting.strategy.name == "fsdp2"
        return min(setting.ranks, MACHINE_RANKS) if hybrid else setting.ranks

    # -- what else ----------------------------------------------------------------------------------------------------

    def largest_micro_batch(self, setting: Setting, gpu: GpuSpec) -> int:
        """Returns the largest micro-batch that fits, 0 if none does.

        Memory at each place of a step is a straight line over the samples, laid through dry runs of one and of two. The
        peak is the highest of the lines: it may bend where another place takes over. What the allocator wastes is taken
        to grow with it.
        """
        most = max(1, self.config.training.global_batch_size // setting.ranks)
        if setting.micro_batch_size == most and judge(self.need(setting), gpu).word != "does not fit":
            return most
        need = self.need(self._with_size(setting, 1))
        room = gpu.usable_gib * GIB - need.overhead
        if judge(need, gpu).word == "does not fit":
            return 0
        if most == 1 or need.reserved > room:
            return 1
        lines = self.lines(setting)
        waste = need.reserved / need.peak.total

        def fits(size: int) -> bool:
            return size == 1 or max(base + (size - 1) * more for base, more in lines) * waste <= room

        return bisect(range(1, most + 1), False, key=lambda size: not fits(size))

    def lines(self, setting: Setting) -> list[tuple[int, int]]:
        """Returns, for each place of a step, the bytes of a micro-batch of one and those that a further sample adds.

        The first step says what a sample adds; the last one has the optimizer's state.
        """
        one, two = (self.timeline(self._with_size(setting, size), steps=1).peaks_by_place(0) for size in (1, 2))
        last = self.timeline(self._with_size(setting, 1)).peaks_by_place(_STEPS - 1)
        return [(base, two[place] - one[place]) for place, base in last.items() if place in one and place in two]

    def _with_size(self, setting: Setting, size: int) -> Setting:
        return Setting(setting.strategy, setting.ranks, setting.offload, size)

    def assess(self, setting: Setting, gpu: GpuSpec) -> Assessment:
        """Judges a setting, and looks for the cheapest change if it does not fit with room to spare."""
        verdict = judge(self.need(setting), gpu)
        largest = self.largest_micro_batch(setting, gpu)
        if verdict.word == "fits":
            return Assessment(verdict, largest)
        # A layout that does not fit with all overrides together, the last ones, is not tried with fewer.
        options = list(self.options(setting))
        last = [option for option in options if option.overrides == options[-1].overrides]
        priced = [(option, self.price(option, setting, gpu)) for option in last]
        able = {(option.strategy, option.offload) for option, change in priced if change.verdict.word == "fits"}
        for option in options:
            if (option.strategy, option.offload) in able:
                change = self.price(option, setting, gpu)
                if change.verdict.word == "fits":
                    return Assessment(verdict, largest, change)
        changes = [change for _, change in priced]
        return Assessment(verdict, largest, least=min(changes, key=lambda each: each.verdict.need.usual, default=None))

    def options(self, setting: Setting) -> Iterator[Option]:
        """Returns what can be changed, cheapest first: batch, checkpointing, sharding, offload, smaller frames."""
        layouts = [(setting.strategy.name, setting.offload), *_layouts(setting.ranks)]
        for overrides in self._overrides():
            config = self.variant(overrides).config
            for strategy, offload in dict.fromkeys(layouts):
                if strategy not in able_strategies(config, offload) or (config.runtime.hybrid and strategy != "fsdp2"):
                    continue
                if overrides or (strategy, offload) != layouts[0]:
                    yield Option(overrides, strategy, offload)

    def price(self, option: Option, setting: Setting, gpu: GpuSpec) -> Change:
        """Returns what an option makes of a setting."""
        variant = self.variant(option.overrides)
        layout = ""
        if (option.strategy, option.offload) != (setting.strategy.name, setting.offload):
            layout = f"--strategy {option.strategy}"
            layout += f" --offload {option.offload}" if option.offload != "none" else ""
        need = variant.need(variant.setting(option.strategy, setting.ranks, option.offload))
        return Change(option.overrides, layout, judge(need, gpu))

    def _overrides(self) -> Iterator[Overrides]:
        """Returns sets of overrides, cheapest first, each of which does all that those before it do."""
        training = self.config.training
        overrides: list[tuple[str, object]] = []
        if training.micro_batch_size > 1:
            overrides.append(("training.micro_batch_size", 1))
            yield tuple(overrides)
        if "none" in training.gradient_checkpointing.by_component.values():
            yield (*overrides, ("training.gradient_checkpointing", "selective"))
        if training.gradient_checkpointing != GradientCheckpointing():
            overrides.append(("training.gradient_checkpointing", "full"))
            yield tuple(overrides)
        if not overrides:
            yield ()
        for resolution in RESOLUTIONS:
            if self.config.model.world.enabled and resolution < self.config.model.world.resolution:
                yield (*overrides, *self._smaller(resolution))

    def _smaller(self, resolution: int) -> Overrides:
        """Returns the overrides of a smaller resolution, whose samples are shorter by the world tokens that go."""
        world = self.config.model.world
        frames = frames_of(self.config.data.train, self.config.data.world)
        before, after = (
            world_tokens(world.tokens, side, describe_model(self.config).world_latent_channels, frames, pool=world.pool)
            for side in (world.resolution, resolution)
        )
        limit = self._positions or self.config.data.max_sequence_length
        shorter = () if limit is None else (("data.max_sequence_length", limit - before + after),)
        return (("model.world.resolution", resolution), *shorter)

    def variant(self, overrides: Overrides) -> Planner:
        """Returns a planner of the config with overrides, the same one for the same overrides."""
        if not overrides:
            return self
        if overrides not in self._variants:
            shortened = any(key == "data.max_sequence_length" for key, _ in overrides)
            changed = _overridden(self.config, overrides)
            positions = None if shortened else self._positions
            self._variants[overrides] = Planner(changed, positions, self._supervised, self._device)
        return self._variants[overrides]


def _layouts(ranks: int) -> list[tuple[StrategyName, Offload]]:
    """Returns strategies and offloads by what they cost in time, cheapest first."""
    if ranks == 1:
        return []
    shared: tuple[StrategyName, ...] = ("ddp", "zero1", "zero2", "fsdp2")
    return [*((name, "none") for name in shared), ("zero2", "optimizer"), ("fsdp2", "all")]


def _overridden(config: RunConfig, overrides: Overrides) -> RunConfig:
    """Returns a config with some values replaced."""
    values = config.model_dump(mode="json")
    for dotted, value in overrides:
        *sections, key = dotted.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[key] = value
    return parse_run_config(values, config.name)
