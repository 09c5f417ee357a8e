"""Checkpoints: a directory for each saved step, written aside, sealed by a manifest and then renamed.

`step-N/` holds a safetensors file for each component that the chain of stages has trained, the optimizer's tensors,
JSON for everything else, and what `from_pretrained` needs: config and processor.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Collection, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from theworld_train.checkpoint_files import (
    COMPONENTS_FILE,
    FORMAT,
    MANIFEST_FILE,
    SEAL,
    STATE_FILE,
    DamagedCheckpointError,
    Origin,
    checkpoints,
    file_sha256,
    manifest_digest,
    sync,
    verify_checkpoint,
)
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.model.adapters import ADAPTER_SUFFIX, adapter_metadata, adapter_parameters, base_parameters
from theworld_train.model.components import component_modules, component_parameters
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.model.processing import TheWorldProcessor
from theworld_train.train.engine import Engine
from theworld_train.train.groups import MOMENT_8BIT, is_8bit

OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass(frozen=True)
class Base:
    """Where weights that were never trained come from.

    Attributes:
        id: Hub id or directory.
        revision: Commit on the hub, or None for a directory.
    """

    id: str
    revision: str | None

    def __str__(self) -> str:
        """Renders `id`, or `id@revision`."""
        return f"{self.id}@{self.revision}" if self.revision else self.id


@dataclass(frozen=True)
class Carried:
    """A component that an earlier stage has trained and this one does not: its file is kept as it is.

    Attributes:
        path: The file in the earlier stage's checkpoint.
        sha256: Its hash.
        trained_by: Name of the run that trained it last; None if it is as it was initialised.
    """

    path: Path
    sha256: str
    trained_by: str | None


# -- what is written --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """The tensors of a checkpoint, whole and in host memory.

    Attributes:
        components: Weights of each component by their names in it.
        metadata: What the files of adapters say besides.
        optimizer: The optimizer's state as flat tensors, `<parameter>::<slot>`.
    """

    components: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        parts = (self.optimizer, *self.components.values())
        return sum(tensor.nbytes for part in parts for tensor in part.values())


def take_snapshot(
    model: TheWorldForConditionalGeneration,
    engine: Engine,
    components: Collection[str],
    *,
    keep: bool,
    copy: bool = False,
) -> Snapshot:
    """Puts together what the ranks hold; every rank calls it.

    Args:
        model: The whole model.
        engine: Holds its weights and the optimizer.
        components: Components and adapters whose weights are wanted.
        keep: Whether this rank writes the checkpoint; on others the snapshot stays empty.
        copy: Whether it has to stay as it is while training goes on.
    """
    snapshot = Snapshot()
    for component, module in component_modules(model).items():
        adapter = f"{component}{ADAPTER_SUFFIX}"
        for part, parameters in (component.value, base_parameters(module)), (adapter, adapter_parameters(module)):
            if part not in components:
                continue
            kept = snapshot.components[part] = {}
            for name, parameter in parameters.items():
                tensor = engine.whole(parameter)
                if keep:
                    kept[name] = _host(tensor, copy=copy)
        if adapter in components:
            snapshot.metadata[adapter] = adapter_metadata(module)
    for name, parameter in trained_parameters(model).items():
        slots = engine.slots(parameter)
        if keep:
            snapshot.optimizer.update({f"{name}::{slot}": _host(value, copy=copy) for slot, value in slots.items()})
    return snapshot


def _host(tensor: Tensor, *, copy: bool) -> Tensor:
    return tensor.detach().to("cpu", copy=copy).contiguous()


class Saver(Protocol):
    """What the trainer needs of a run to save it."""

    def collect(self, engine: Engine, *, keep: bool) -> Snapshot:
        """Takes the snapshot of a checkpoint; every rank calls it, one of them keeps it."""
        ...

    def write(self, step: int, snapshot: Snapshot, rng: list[dict[str, Any]], gates: dict[str, Any]) -> None:
        """Writes the checkpoint of a step; the rank that kept the snapshot calls it, with all ranks' random states.

        It may return before all is written.
        """
        ...

    def finish(self) -> None:
        """Waits until all is written, and raises what has gone wrong with it; the rank that writes calls it."""
        ...

    def failure(self) -> Exception | None:
        """Returns what has gone wrong with a write that has ended meanwhile, without waiting."""
        ...


# -- writing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRecord:
    """What all checkpoints of a run say alike.

    Attributes:
        run_name: Name of the run.
        config_yaml: The resolved run config.
        model: The model; its configs are saved beside the weights.
        processor: Likewise.
        base: Where the language and vision weights come from.
        encoder: Where the world encoder comes from, if the chain has a world path.
        init_from: Where the run's first weights came from, besides its bases.
        trained: Components, and adapters of components, that this run trains.
        initialised: Components that no base holds and nothing has trained; saved as they are.
        base_digests: Digest of each component as its base holds it.
        ledger: The parameter ledger.
    """

    run_name: str
    config_yaml: str
    model: TheWorldForConditionalGeneration
    processor: TheWorldProcessor
    base: Base
    encoder: Base | None
    init_from: Origin | None
    trained: tuple[str, ...]
    initialised: tuple[str, ...]
    base_digests: dict[str, str]
    ledger: dict[str, Any]


class CheckpointWriter:
    """Writes the checkpoints of one run; used on the main rank alone."""

    def __init__(self, directory: Path, keep_last: int, record: RunRecord, carried: dict[str, Carried]) -> None:
        """Keeps what all checkpoints of the run say alike.

        Args:
            directory: Of the run.
            keep_last: Checkpoints that stay.
            record: See there.
            carried: Components whose files are taken over from an earlier stage.
        """
        self._directory, self._keep_last = directory, keep_last
        self._record, self._carried = record, carried

    def write(
        self, step: int, snapshot: Snapshot, rng: list[dict[str, Any]], gates: dict[str, Any] | None = None
    ) -> Path:
        """Writes and seals `step-N`, removes what is older than the newest ones, and returns the new one.

        Args:
            step: Optimizer steps done.
            snapshot: The tensors.
            rng: Random state of each rank.
            gates: What the run's gates have seen.

        Raises:
            ConfigError: If the file system takes no more, and what was written of this checkpoint is removed; or if
                an older one cannot be removed.
        """
        final = self._directory / f"step-{step}"
        if (final / MANIFEST_FILE).is_file():
            return final
        partial = self._directory / f".step-{step}.partial"
        with _removed_on_failure(partial):
            for remains in (partial, final):
                shutil.rmtree(remains, ignore_errors=True)
            partial.mkdir(parents=True)
            _check_space(partial, snapshot.nbytes)
            self._write_files(
                partial, snapshot, {"step": step, "world_size": len(rng), "rng": rng, "gates": gates or {}}
            )
            seal(partial, {"step": step, "run": self._record.run_name, "world_size": len(rng)})
            partial.rename(final)
            sync(self._directory)
        try:
            retire(self._directory, self._keep_last)
        except OSError as error:
            message = f"{final.name} is saved, but an older checkpoint cannot be removed: {error}"
            hint = "mend that and run it again with resume=latest"
            raise ConfigError(Problem(message, key="output_dir", value=str(self._directory), hint=hint)) from error
        # The next checkpoint carries the files on from this one: the one that they came from may be gone by then.
        self._carried = {name: replace(entry, path=final / entry.path.name) for name, entry in self._carried.items()}
        return final

    def _write_files(self, directory: Path, snapshot: Snapshot, state: dict[str, Any]) -> None:
        record = self._record
        trainers = dict.fromkeys(record.trained, record.run_name) | dict.fromkeys(record.initialised)
        components = _write_components(directory, snapshot, trainers) | _link_components(directory, self._carried)
        facts = {
            "format": FORMAT,
            "base": vars(record.base),
            "encoder": vars(record.encoder) if record.encoder else None,
            "init_from": vars(record.init_from) if record.init_from else None,
            "base_digests": record.base_digests,
            "components": components,
        }
        _write_json(directory / COMPONENTS_FILE, facts)
        _save_tensors(snapshot.optimizer, directory / OPTIMIZER_FILE)
        _write_json(directory / STATE_FILE, {"format": FORMAT, **state})
        _write_json(directory / "ledger.json", record.ledger)
        (directory / "config.yaml").write_text(record.config_yaml)
        record.model.config.save_pretrained(directory)
        record.processor.save_pretrained(directory)
        if record.model.generation_config is not None:
            record.model.generation_config.save_pretrained(directory)


class BackgroundWriter:
    """Writes checkpoints in a thread, one at a time."""

    def __init__(self, writer: CheckpointWriter) -> None:
        """Args: writer: does the writing."""
        self._writer = writer
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._write: Future[Path] | None = None

    def write(self, step: int, snapshot: Snapshot, rng: list[dict[str, Any]], gates: dict[str, Any]) -> None:
        """Begins to write; the one before is finished first."""
        self.finish()
        self._write = self._executor.submit(self._writer.write, step, snapshot, rng, gates)

    def finish(self) -> None:
        """See `Saver`."""
        write, self._write = self._write, None
        if write is not None:
            write.result()

    def failure(self) -> Exception | None:
        """See `Saver`."""
        error = self._write.exception() if self._write is not None and self._write.done() else None
        assert error is None or isinstance(error, Exception)
        return error

    def close(self) -> None:
        """Waits until all is written, whatever comes of it."""
        self._executor.shutdown()


def retire(directory: Path, keep: int) -> list[Path]:
    """Removes all but the newest checkpoints of a run, once the newest one is known to be what was saved.

    Returns:
        Those that are gone.

    Raises:
        DamagedCheckpointError: If the newest one is not whole; all of them stay.
    """
    found = checkpoints(directory)
    retired = found[:-keep]
    if retired:
        verify_checkpoint(found[-1])
    for old in retired:
        # By way of a name that nothing takes for a checkpoint.
        trash = old.with_name(f".{old.name}.trash")
        old.rename(trash)
        shutil.rmtree(trash)
    return retired


def clear_remains(directory: Path) -> None:
    """Removes what a killed run has left half written or half removed."""
    for pattern in (".step-*.partial", ".step-*.trash"):
        for remains in directory.glob(pattern):
            shutil.rmtree(remains)


def set_damaged_aside(directory: Path) -> list[str]:
    """Renames the newest checkpoints of a run to `.step-N.damaged` until one is whole, and says what was wrong."""
    found: list[str] = []
    for checkpoint in reversed(checkpoints(directory)):
        try:
            verify_checkpoint(checkpoint)
        except DamagedCheckpointError as error:
            aside = checkpoint.with_name(f".{checkpoint.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            found.append(f"{error}; its checkpoint is {aside.name} now")
        else:
            break
    return found


def _check_space(directory: Path, needed: int) -> None:
    """Refuses a save before it begins if its tensors alone do not fit."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"the checkpoint takes {needed:,} bytes, more than are free", str(directory))


@contextmanager
def _removed_on_failure(partial: Path) -> Generator[None]:
    """Removes a checkpoint that could not be completed, and says so if the file system is the reason.

    Raises:
        ConfigError: If a file cannot be written, read or renamed.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # Libraries written in Rust have exceptions of their own; the tokenizer's is a bare one.
        if not (isinstance(error, OSError | SafetensorError) or "(os error " in str(error)):
            raise
        free = shutil.disk_usage(next(path for path in partial.parents if path.is_dir())).free
        raise ConfigError(
            Problem(
                f"a checkpoint cannot be saved there: {error}; {free:,} bytes are free",
                key="output_dir",
                value=str(partial.parent),
                hint="mend that and run it again with resume=latest: earlier checkpoints are whole",
            )
        ) from error


def _write_components(
    directory: Path, snapshot: Snapshot, trainers: dict[str, str | None]
) -> dict[str, dict[str, str | None]]:
    """Writes the components and adapters of a snapshot, given the run that trained each, and returns their record."""
    assert snapshot.components.keys() == trainers.keys(), "the snapshot holds other components than are to be saved"
    record: dict[str, dict[str, str | None]] = {}
    for name, trainer in trainers.items():
        file = directory / f"{name}.safetensors"
        _save_tensors(snapshot.components[name], file, snapshot.metadata.get(name))
        record[name] = {"file": file.name, "sha256": file_sha256(file), "trained_by": trainer}
    return record


def _link_components(directory: Path, carried: dict[str, Carried]) -> dict[str, dict[str, str | None]]:
    """Takes over files of an earlier stage, also of components that this model lacks, and returns their record."""
    record: dict[str, dict[str, str | None]] = {}
    for name, source in carried.items():
        file = directory / f"{name}.safetensors"
        _link_or_copy(source.path, file)
        record[name] = {"file": file.name, "sha256": source.sha256, "trained_by": source.trained_by}
    return record


def seal(directory: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of a directory, last and synced: its presence says that everything before it is whole."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            sync(path)
            files[str(path.relative_to(directory))] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {"format": FORMAT, **facts, "files": files}
    _write_json(directory / MANIFEST_FILE, manifest | {SEAL: manifest_digest(manifest)})
    sync(directory / MANIFEST_FILE)
    sync(directory)


def _save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that is readable for others as the umask says; the library makes it private."""
    save_file(tensors, path, metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True))


def _link_or_copy(source: Path, target: Path) -> None:
    """Gives an immutable file a second name, or a copy where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# -- the optimizer and random states ------------------------------------------------------------------------------


def trained_parameters(model: TheWorldForConditionalGeneration) -> dict[str, nn.Parameter]:
    """Returns the parameters that the optimizer has state of, by name."""
    every = component_parameters(model).values()
    return {name: value for parameters in every for name, value in parameters.items() if value.requires_grad}


def load_optimizer(engine: Engine, parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Restores the optimizer's part of a snapshot.

    Raises:
        ConfigError: If the state belongs to other parameters, or to another optimizer.
    """
    slots: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, slot = key.split("::")
        slots.setdefault(name, {})[slot] = tensor
    if slots and any(MOMENT_8BIT in state for state in slots.values()) is not is_8bit(engine.optimizer):
        raise ConfigError(f"{path} holds the state of another optimizer; resume needs the same optimizer.name")
    strangers, absent = sorted(slots.keys() - parameters.keys()), sorted(parameters.keys() - slots.keys())
    if strangers or (absent and slots):
        raise ConfigError(
            f"{path} belongs to another trainable set: it has {strangers[:3]} and lacks {absent[:3]}; "
            "resume needs the same trainable table, init_from takes weights only"
        )
    for name, state in slots.items():
        engine.load_slots(parameters[name], state)


def random_state() -> dict[str, Any]:
    """Returns this process's random state as JSON-ready values."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


def _bytes_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
