"""The process group: the only place that knows Accelerate, ranks and devices."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar, cast
from uuid import uuid4

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.data import accumulation_steps
from theworld_train.train.accelerate_settings import take_over
from theworld_train.train.engine import (
    DeepSpeedEngine,
    Engine,
    MakeOptimizer,
    ReplicatedEngine,
    ShardedEngine,
    deepspeed_settings,
)
from theworld_train.train.stage import StageModule
from theworld_train.train.stopping import StoppedError
from theworld_train.train.watchdog import REPORT_S, Watchdog

T = TypeVar("T")

#: How long an exchange waits for a rank that loads or saves: how long that may take is for the watchdog to say, and a
#: rank that dies is noticed at once. `runtime.timeout_s` is for the exchanges of a step.
PATIENCE = timedelta(hours=6)


class Runtime:
    """One rank's view of the run's process group."""

    _watchdog: Watchdog | None = None

    def __init__(self, config: RunConfig) -> None:
        """Forms the process group that the launcher has announced, or none for a single process.

        Raises:
            ConfigError: If `accelerate launch` has been told otherwise than the config.
        """
        take_over(config, os.environ)
        self._first_high_water = _high_water()
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(mode=True)
        # Convolutions are fp32 where they say so: the default on GPUs since Ampere would round their inputs to 10 bits.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        self._timeout = timedelta(seconds=config.runtime.timeout_s + REPORT_S)
        process_group: dict[str, Any] = {"timeout": self._timeout}
        if torch.cuda.is_available():
            process_group["backend"] = "cuda:nccl,cpu:gloo"  # offloaded shards are exchanged on the host
        # Precision and accumulation are the trainer's: autocast over fp32 masters, and a scale on each backward.
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            gradient_accumulation_steps=1,
            kwargs_handlers=[
                InitProcessGroupKwargs(**process_group),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
        several = self.world_size > 1
        self._patient = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if several else None

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leaves the process group; only what has ended on all ranks together is ended in order."""
        if error is None or isinstance(error, StoppedError):
            self.close()
        else:
            self.abort()

    @property
    def rank(self) -> int:
        """This process's rank."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        device: torch.device = self.accelerator.device
        return device

    def engine(self, stage: StageModule, make_optimizer: MakeOptimizer, config: RunConfig) -> Engine:
        """Wraps a stage for the run's strategy; a single process holds everything, whatever the strategy."""
        engine = self._engine(stage, make_optimizer, config)
        if self.world_size > 1:
            self._limit_groups()
        return engine

    def _engine(self, stage: StageModule, make_optimizer: MakeOptimizer, config: RunConfig) -> Engine:
        if self.world_size == 1:
            if config.runtime.offload != "none":
                hint = "launch several ranks, or set it to none"
                problem = Problem("has no effect on a single process", "config", "runtime.offload", hint=hint)
                raise ConfigError(problem)
            return ReplicatedEngine(stage, make_optimizer)
        if config.runtime.strategy == "auto":
            hint = "name a strategy, or run it by `theworld-train train` or `launch`, which find one"
            raise ConfigError(Problem("is not resolved", "config", "runtime.strategy", "auto", hint))
        if config.runtime.strategy == "ddp":
            return ReplicatedEngine(stage, make_optimizer, self.accelerator.prepare_model)
        if config.runtime.strategy == "fsdp2":
            return ShardedEngine(stage, make_optimizer, config, self._mesh(config))
        accumulation = accumulation_steps(
            config.training.global_batch_size, config.training.micro_batch_size, self.world_size
        )
        return DeepSpeedEngine(stage, make_optimizer, deepspeed_settings(config, accumulation))

    def _mesh(self, config: RunConfig) -> DeviceMesh:
        if not config.runtime.hybrid:
            return init_device_mesh(self.device.type, (self.world_size,))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
        if not local or self.world_size % local:
            message = "needs a launcher that sets LOCAL_WORLD_SIZE, equal on all nodes"
            raise ConfigError(Problem(message, key="runtime.hybrid", value=local or None))
        return init_device_mesh(
            self.device.type, (self.world_size // local, local), mesh_dim_names=("replicate", "shard")
        )

    def _limit_groups(self) -> None:
        """Gives the groups that engines have made the run's timeout, in place of torch's own."""
        for group in distributed_c10d._world.pg_map:
            if group is not self._patient:
                distributed_c10d._set_pg_timeout(self._timeout, group)

    def seed(self, seed: int, step: int) -> None:
        """Seeds torch, otherwise on each rank, so that ranks draw dropout of their own.

        Args:
            seed: Of the run.
            step: Optimizer steps done: a run that goes on with other ranks does not draw again what it has drawn.
        """
        (state,) = np.random.SeedSequence((seed, self.rank, step)).generate_state(1, np.uint64)
        torch.manual_seed(int(state))

    def exchange(self, values: Sequence[float], *, patiently: bool = False) -> list[list[float]]:
        """Returns equally many numbers of every rank, in the order of ranks, in fp64.

        Args:
            values: This rank's numbers.
            patiently: Whether others may come much later than `runtime.timeout_s`.
        """
        self.beat()
        if self.world_size == 1:
            return [[float(value) for value in values]]
        own = torch.tensor(values, dtype=torch.float64, device="cpu" if patiently else self.device)
        every = [torch.empty_like(own) for _ in range(self.world_size)]
        torch.distributed.all_gather(every, own, group=self._patient if patiently else None)
        return cast(list[list[float]], torch.stack(every).tolist())

    @property
    def device_name(self) -> str:
        """What this rank computes on, such as `NVIDIA H100 80GB HBM3` or `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def memory_peak(self) -> int:
        """Returns the most bytes that this rank has held: tensors on a GPU; on a CPU, what the process has grown by."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return _high_water() - self._first_high_water

    def reset_memory_peak(self) -> None:
        """Forgets the peak of loading, so that `memory_peak` is that of training; a process's cannot be forgotten."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Returns a tensor summed over ranks; it stays on its device."""
        if self.world_size == 1:
            return value
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    def read(self, *scalars: Tensor) -> list[float]:
        """Returns scalars as numbers, in one transfer; with offload some lie on the host."""
        return cast(list[float], torch.stack([scalar.double().to(self.device) for scalar in scalars]).tolist())

    def gather(self, value: T) -> list[T]:
        """Returns a small picklable value of every rank, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return cast(list[T], values)

    # -- progress -----------------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self, directory: Path, timeout_s: float) -> Generator[None]:
        """Runs a block in which this rank has to move on, and says in the run's directory where it is."""
        launch = self.gather(uuid4().hex[:8])[0]
        with Watchdog(directory, self.rank, self.world_size, timeout_s, launch) as self._watchdog:
            yield
        self._watchdog = None

    def enter(self, phase: str, step: int, sample_ids: Sequence[str] = (), patience: float = 1.0) -> None:
        """Says what this rank does from now on; see `Watchdog.enter`."""
        if self._watchdog is not None:
            self._watchdog.enter(phase, step, sample_ids, patience)

    def beat(self) -> None:
        """Says that this rank has moved on."""
        if self._watchdog is not None:
            self._watchdog.beat()

    # -- failures -----------------------------------------------------------------------------------------------------

    @contextmanager
    def agreement(self) -> Generator[None]:
        """Runs a block without collectives; if it fails on any rank, all ranks stop and say what happened where.

        The block may take a rank long, such as the one that saves: the others wait for it patiently.

        Raises:
            Exception: This rank's own error.
            ConfigError: If only other ranks have failed, with what they say.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as failure:
            error = failure
        self.agree_on_failure(error)

    def agree_on_failure(self, error: Exception | None) -> None:
        """Raises on every rank if any rank has failed, so that none is left waiting in a collective.

        Ranks wait for one another patiently.

        Raises:
            Exception: This rank's own error.
            ConfigError: If only other ranks have one, with what they say.
        """
        if self.world_size > 1 and any(failed for (failed,) in self.exchange([error is not None], patiently=True)):
            self.raise_failures(error)
        if error is not None:
            raise error

    def raise_failures(self, error: Exception | None) -> NoReturn:
        """Raises on every rank, once it is known that at least one has failed.

        Raises:
            Exception: This rank's own error.
            ConfigError: If only other ranks have one, with what they say.
        """
        told = self.gather(None if error is None else _told(error))
        if error is not None:
            raise error
        ranks: dict[str, list[int]] = {}
        for rank, text in enumerate(told):
            if text is not None:
                ranks.setdefault(text, []).append(rank)
        raise ConfigError([Problem(text, source=f"rank {_listed(numbers)}") for text, numbers in ranks.items()])

    def same_everywhere(self, what: str, value: str) -> None:
        """Refuses to go on if ranks disagree on what they have found, such as on nodes without a common file system.

        Raises:
            ConfigError: With what each rank has found.
        """
        values = self.gather(value)
        if len(set(values)) > 1:
            found = "; ".join(
                f"{other} on rank {_listed([r for r, v in enumerate(values) if v == other])}"
                for other in dict.fromkeys(values)
            )
            raise ConfigError(
                Problem(f"ranks disagree on {what}: {found}", hint="do all nodes see the same file system?")
            )

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the process group; every rank calls it, and waits for the others."""
        self.accelerator.end_training()

    def abort(self) -> None:
        """Leaves the process group at once: others may be waiting in a collective for ever."""
        if torch.distributed.is_initialized():
            distributed_c10d._abort_process_group()


def _high_water() -> int:
    """Returns the most bytes of physical memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def take(iterator: Iterator[T]) -> tuple[T | None, Exception | None]:
    """Returns the next item, or the error that came in its stead; both are None at the end."""
    try:
        return next(iterator, None), None
    except Exception as error:
        return None, error


def _told(error: Exception) -> str:
    """Returns what an error says to a user, with its type where it was not written for one."""
    return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(str(number) for number in numbers[:most])
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
