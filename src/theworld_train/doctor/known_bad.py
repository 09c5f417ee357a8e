"""Combinations that are known to go wrong, as data: when, why, where that is from, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from packaging.specifiers import SpecifierSet

from theworld_train.config.schema import RunConfig
from theworld_train.doctor.finding import Finding, State
from theworld_train.doctor.machine import Machine


@dataclass(frozen=True)
class KnownBad:
    """A combination that goes wrong; it is met if all of its conditions are.

    Attributes:
        check: What it concerns.
        reason: What goes wrong.
        source: Where that is known from.
        advice: What to do.
        state: How bad it is where no config is named, or one that has it.
        gpu: Part of a GPU's name.
        least_gpus: GPUs that there are at least.
        driver: Versions of the NVIDIA driver.
        cuda_build: Whether torch is built for CUDA.
        unset: Variables of the environment, one of which is not set.
        lacks: A package, a file of it, and a word that a version with the mistake mended has there.
        strategies: Strategies of which a config states one; any if empty. `auto` may choose each.
    """

    check: str
    reason: str
    source: str
    advice: str
    state: State = "bad"
    gpu: str | None = None
    least_gpus: int = 0
    driver: str | None = None
    cuda_build: bool | None = None
    unset: tuple[str, ...] = ()
    lacks: tuple[str, str, str] | None = None
    strategies: tuple[str, ...] = ()

    def is_met(self, machine: Machine, configs: Sequence[RunConfig]) -> bool:
        """Says whether a machine, with the configs that it should run, has the combination."""
        return (
            (self.gpu is None or any(self.gpu in gpu.name for gpu in machine.gpus))
            and len(machine.gpus) >= self.least_gpus
            and (self.driver is None or (machine.driver is not None and machine.driver in SpecifierSet(self.driver)))
            and (self.cuda_build is None or self.cuda_build == (machine.torch_cuda is not None))
            and (not self.unset or any(name not in machine.environment for name in self.unset))
            and (self.lacks is None or _lacks(*self.lacks))
            and (not self.strategies or not configs or any(_may_take(config, self.strategies) for config in configs))
        )


KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(
        check="several GPUs of the RTX 40 series",
        reason="drivers before 550.40.07 have no P2P between them, and Accelerate refuses to start under torchrun",
        source="accelerate.utils.environment.check_cuda_p2p_ib_support",
        advice="update the driver, or export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1",
        gpu="RTX 40",
        least_gpus=2,
        driver="<550.40.07",
        unset=("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"),
    ),
    KnownBad(
        check="torch for CPU on a machine with an NVIDIA driver",
        reason="the GPUs are not used",
        source="torch.version.cuda is None while /proc/driver/nvidia/version is there",
        advice="pip install torch from the index of its CUDA build; make install without TORCH_INDEX takes that",
        driver=">=0",
        cuda_build=False,
    ),
    KnownBad(
        check="ZeRO-3 with checkpointing and frozen weights",
        reason="the backward pass fails: saved [1024], recomputed [0]",
        source="DeepSpeed issue 8130, mended by its pull request 8148",
        advice='pip install --upgrade "theworld-train[deepspeed]", or runtime.strategy=fsdp2, which shards as much',
        lacks=("deepspeed", "runtime/zero/partitioned_param_coordinator.py", "update_recompute_parameters"),
        strategies=("zero3",),
    ),
)


def check_combinations(machine: Machine, configs: Sequence[RunConfig]) -> list[Finding]:
    """Looks for the combinations that are known to go wrong."""
    met = [known for known in KNOWN_BAD if known.is_met(machine, configs)]
    if met:
        return [Finding(known.check, known.state, f"{known.reason} ({known.source})", known.advice) for known in met]
    return [Finding("known-bad combinations", "ok", f"none of {len(KNOWN_BAD)}")]


def _may_take(config: RunConfig, strategies: tuple[str, ...]) -> bool:
    return config.runtime.strategy in (*strategies, "auto")


def _lacks(package: str, file: str, word: str) -> bool:
    """Says whether an installed package has not the word in a file of it; without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return False
    path = Path(spec.origin).parent / file
    return not path.is_file() or word not in path.read_text(encoding="utf-8", errors="replace")
