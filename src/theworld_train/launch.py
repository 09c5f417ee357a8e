"""Starts the ranks of one machine through torchrun, ends them with itself, and tells by an exit code how they ended."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.train.stopping import SAVED_AND_STOPPED, end_with_parent

#: What the shell adds to the number of the signal that has ended a process.
SIGNAL_BASE = 128
#: Signals that are passed on to the ranks. SIGHUP is not among them: torchrun would take it even under nohup.
FORWARDED = ("SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1")
DEFAULT_PORT = 29500

#: Read by the ranks: the process that they end with, and the directory where they leave their exit codes.
LAUNCHER_PID = "THEWORLD_LAUNCHER_PID"
OUTCOMES = "THEWORLD_LAUNCH_OUTCOMES"

#: Least time for a save in seconds; the rate in bytes per second that a busy shared file system takes; and what a
#: checkpoint holds of each trained parameter: an fp32 master and AdamW's two moments.
LEAST_GRACE_S = 30
SLOW_BYTES_PER_S = 250e6
CHECKPOINT_BYTES_PER_PARAMETER = 12
#: For a run that does not state how many parameters it trains: all of 4.4 billion.
LARGEST_RUN = 4_400_000_000


# -- the command --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topology:
    """Which processes a run consists of.

    Attributes:
        nproc: Processes on each machine, one for each GPU.
        nnodes: Machines.
        node_rank: This machine's number; if absent, machines number themselves as they meet at the endpoint.
        rdzv_endpoint: `host[:port]` where machines meet, the same on all of them.
    """

    nproc: int = 1
    nnodes: int = 1
    node_rank: int | None = None
    rdzv_endpoint: str | None = None

    def problems(self) -> list[Problem]:
        """Returns what is wrong with it."""
        found = [
            Problem("must be at least 1", key=key, value=value)
            for key, value in (("--nproc", self.nproc), ("--nnodes", self.nnodes))
            if value < 1
        ]
        if self.node_rank is not None and not 0 <= self.node_rank < max(self.nnodes, 1):
            message = f"must be below --nnodes {self.nnodes}, numbered from 0"
            found.append(Problem(message, key="--node-rank", value=self.node_rank))
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            hint = "name the first machine, such as --rdzv-endpoint node0:29500"
            found.append(Problem("is needed for several machines", key="--rdzv-endpoint", hint=hint))
        if self.rdzv_endpoint is not None and not _is_endpoint(self.rdzv_endpoint):
            found.append(Problem("must be host or host:port", key="--rdzv-endpoint", value=self.rdzv_endpoint))
        return found


@dataclass(frozen=True)
class LaunchCommand:
    """A torchrun command.

    Attributes:
        arguments: What follows `torchrun`.
        environment: Variables that it needs.
        nproc: Processes that it starts on this machine.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]
    nproc: int

    def __str__(self) -> str:
        """Renders it for a shell."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join(["env", *settings, "torchrun", *self.arguments])


def launch_command(
    config: RunConfig, path: str, overrides: Sequence[str], topology: Topology, grace_s: int | None = None
) -> LaunchCommand:
    """Returns the command that starts this machine's ranks of a run.

    Args:
        config: The resolved run config.
        path: Its file, as the ranks will read it.
        overrides: `key=value` texts for the ranks.
        topology: Which processes the run consists of.
        grace_s: Seconds that ranks have to save after a signal; derived from the size of a checkpoint if absent.

    Raises:
        ConfigError: If the topology is impossible, or does not divide the global batch.
    """
    # Imported here, as it takes torch along, which the ranks' side below must not do.
    from theworld_train.data import accumulation_steps

    problems = topology.problems()
    if grace_s is not None and grace_s < 0:
        problems.append(Problem("must not be negative", key="--grace-s", value=grace_s))
    if problems:
        raise ConfigError(problems)
    accumulation_steps(
        config.training.global_batch_size, config.training.micro_batch_size, topology.nproc * topology.nnodes
    )
    grace = shutdown_grace_s(config) if grace_s is None else grace_s
    return LaunchCommand(
        (
            *_topology_arguments(topology, config.name),
            f"--nproc-per-node={topology.nproc}",
            f"--signals-to-handle={','.join(FORWARDED)}",
            "--module",
            "theworld_train",
            "train",
            path,
            *overrides,
        ),
        {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(grace)},
        topology.nproc,
    )


def _topology_arguments(topology: Topology, run_name: str) -> tuple[str, ...]:
    if topology.nnodes == 1:
        return ("--standalone",)
    assert topology.rdzv_endpoint is not None
    host, _, port = topology.rdzv_endpoint.partition(":")
    nodes = f"--nnodes={topology.nnodes}"
    if topology.node_rank is None:
        endpoint = f"{host}:{port or DEFAULT_PORT}"
        return (nodes, "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={run_name}")
    return (
        nodes,
        f"--node-rank={topology.node_rank}",
        f"--master-addr={host}",
        f"--master-port={port or DEFAULT_PORT}",
    )


def _is_endpoint(text: str) -> bool:
    host, colon, port = text.partition(":")
    return bool(host) and (not colon or (port.isdecimal() and 0 < int(port) < 65536))


def shutdown_grace_s(config: RunConfig) -> int:
    """Returns the seconds within which a run's checkpoint is written even to a slow file system."""
    parameters = config.expect_trainable or LARGEST_RUN
    return LEAST_GRACE_S + round(CHECKPOINT_BYTES_PER_PARAMETER * parameters / SLOW_BYTES_PER_S)


# -- the launcher's side ------------------------------------------------------------------------------------------


def run(command: LaunchCommand) -> int:
    """Runs torchrun's agent in this process until all ranks of this machine have ended.

    The ranks are children of this process and end with it, in whatever way it ends.

    Returns:
        0, the exit code of the rank that failed first, or 128 + the signal that ended it or this process;
        `SAVED_AND_STOPPED` if a signal has stopped the ranks and all of them say that the run is saved.
    """
    # Until there are ranks to tell, a signal ends this process at once: meeting other machines blocks in native code.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    with tempfile.TemporaryDirectory(prefix="theworld-launch-") as outcomes:
        os.environ |= command.environment | {LAUNCHER_PID: str(os.getpid()), OUTCOMES: outcomes}
        try:
            torchrun(parse_args(list(command.arguments)))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode if failure.exitcode >= 0 else SIGNAL_BASE - failure.exitcode
            print(f"rank {rank} ended first, with exit code {code}", file=sys.stderr)
            return code
        except SignalException as stop:
            return _stopped_code(Path(outcomes), command.nproc, stop.sigval)
    return 0


def _stopped_code(outcomes: Path, nproc: int, received: signal.Signals) -> int:
    """Returns the exit code after a signal: what all ranks say, or else that the signal has ended them."""
    codes = [path.read_text() for path in outcomes.iterdir()]
    if len(codes) == nproc and set(codes) <= {"0", str(SAVED_AND_STOPPED)}:
        return max(map(int, codes))
    return SIGNAL_BASE + received


# -- the ranks' side ----------------------------------------------------------------------------------------------


@contextmanager
def as_rank() -> Generator[None]:
    """Lets this process end with its launcher, and leaves its exit code there; without a launcher it does nothing."""
    launcher = os.environ.pop(LAUNCHER_PID, None)
    outcomes = os.environ.pop(OUTCOMES, None)
    if launcher is not None:
        _end_with(int(launcher))
    code = 0
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        raise
    finally:
        if outcomes is not None and Path(outcomes).is_dir():
            (Path(outcomes) / os.environ["RANK"]).write_text(str(code))


def _end_with(launcher: int) -> None:
    """Has the kernel kill this process when its parent ends, and ends it now if that has happened before."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != launcher:
        raise SystemExit(f"the launcher, process {launcher}, has ended")
