"""Checkpoints: a directory for each saved step, written aside, sealed by a manifest and then renamed.

`step-N/` holds a safetensors file for each component that the chain of stages has trained, the optimizer's tensors,
JSON for everything else, and what `from_pretrained` needs: config and processor.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from theworld_train.config.errors import ConfigError
from theworld_train.model.components import component_modules
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.model.pretrained import COMPONENTS_FILE
from theworld_train.model.processing import TheWorldProcessor

MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
FORMAT = 1

_STEP = re.compile(r"^step-(\d+)$")


@dataclass(frozen=True)
class Base:
    """Where weights that were never trained come from.

    Attributes:
        id: Hub id or directory.
        revision: Commit on the hub, or None for a directory.
    """

    id: str
    revision: str | None


@dataclass(frozen=True)
class Carried:
    """A component that an earlier stage has trained and this one does not: its file is kept as it is.

    Attributes:
        path: The file in the earlier stage's checkpoint.
        sha256: Its hash.
        trained_by: Name of the run that trained it last.
    """

    path: Path
    sha256: str
    trained_by: str


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- finding and verifying ----------------------------------------------------------------------------------------


def checkpoints(directory: Path) -> list[Path]:
    """Returns the sealed checkpoints of a run directory in the order of their steps."""
    found = [path for path in directory.glob("step-*") if _STEP.match(path.name) and (path / MANIFEST_FILE).is_file()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Returns the step of a checkpoint from its name."""
    match = _STEP.match(path.name)
    assert match, f"{path} is no checkpoint"
    return int(match.group(1))


def resolve_checkpoint(path: Path) -> Path:
    """Returns the checkpoint itself, given it or its run's directory.

    Raises:
        ConfigError: If there is none.
    """
    if (path / MANIFEST_FILE).is_file():
        return path
    if found := checkpoints(path):
        return found[-1]
    raise ConfigError(
        f"{path} is no checkpoint: it holds neither {MANIFEST_FILE} nor a step-N directory that is complete"
    )


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compares every file of a checkpoint with its manifest and returns the manifest.

    Raises:
        ConfigError: Naming the file that is missing or has changed.
    """
    manifest_path = path / MANIFEST_FILE
    if not manifest_path.is_file():
        raise ConfigError(f"{path} is no complete checkpoint: it has no {MANIFEST_FILE}")
    try:
        manifest: dict[str, Any] = json.loads(manifest_path.read_text())
        files: dict[str, dict[str, Any]] = manifest["files"]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{manifest_path} is damaged: {error}") from error
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise ConfigError(f"{file} is missing")
        if file.stat().st_size != entry["size"] or file_sha256(file) != entry["sha256"]:
            raise ConfigError(f"{file} is not what was saved: its size or hash differs from {MANIFEST_FILE}")
    return manifest


# -- writing ------------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes the checkpoints of one run; used on the main rank alone."""

    def __init__(self, directory: Path, keep_last: int) -> None:
        """Args: directory: of the run. keep_last: checkpoints that stay."""
        self._directory = directory
        self._keep_last = keep_last

    def write(
        self,
        step: int,
        *,
        model: TheWorldForConditionalGeneration,
        processor: TheWorldProcessor,
        optimizer: torch.optim.Optimizer,
        config_yaml: str,
        run_name: str,
        base: Base,
        encoder: Base | None,
        trained: tuple[str, ...],
        carried: dict[str, Carried],
        base_digests: dict[str, str],
        ledger: dict[str, Any],
        rng: list[dict[str, Any]],
    ) -> Path:
        """Writes and seals `step-N` and removes what is older than the newest ones.

        Args:
            step: Optimizer steps done.
            model: The whole model; what trains holds fp32 masters.
            processor: Saved beside the weights.
            optimizer: With `parameter_names` in its groups.
            config_yaml: The resolved run config.
            run_name: Name of the run.
            base: Where the language and vision weights come from.
            encoder: Where the world encoder comes from, if there is a world path.
            trained: Components that this run saves from the model.
            carried: Components whose files are taken over from an earlier stage.
            base_digests: Digest of each component as its base holds it.
            ledger: The parameter ledger.
            rng: Random state of each rank.

        Returns:
            The checkpoint.
        """
        final = self._directory / f"step-{step}"
        if (final / MANIFEST_FILE).is_file():
            return final
        partial = self._directory / f".step-{step}.partial"
        for remains in (partial, final):
            shutil.rmtree(remains, ignore_errors=True)
        partial.mkdir(parents=True)
        components = self._write_components(partial, model, trained, carried, run_name)
        _write_json(
            partial / COMPONENTS_FILE,
            {
                "format": FORMAT,
                "base": vars(base),
                "encoder": vars(encoder) if encoder else None,
                "components": components,
                "base_digests": base_digests,
            },
        )
        _save_tensors(optimizer_tensors(optimizer), partial / OPTIMIZER_FILE)
        _write_json(partial / STATE_FILE, {"format": FORMAT, "step": step, "world_size": len(rng), "rng": rng})
        _write_json(partial / "ledger.json", ledger)
        (partial / "config.yaml").write_text(config_yaml)
        model.config.save_pretrained(partial)
        processor.save_pretrained(partial)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        seal(partial, {"step": step, "run": run_name, "world_size": len(rng)})
        partial.rename(final)
        _sync_directory(self._directory)
        self._retire(final)
        return final

    def _write_components(
        self,
        directory: Path,
        model: TheWorldForConditionalGeneration,
        trained: tuple[str, ...],
        carried: dict[str, Carried],
        run_name: str,
    ) -> dict[str, dict[str, str]]:
        record: dict[str, dict[str, str]] = {}
        for component, module in component_modules(model).items():
            file = directory / f"{component.value}.safetensors"
            if component.value in trained:
                tensors = {name: p.detach().cpu().contiguous() for name, p in module.named_parameters()}
                _save_tensors(tensors, file)
                record[component.value] = {"file": file.name, "sha256": file_sha256(file), "trained_by": run_name}
            elif component.value in carried:
                source = carried[component.value]
                _link_or_copy(source.path, file)
                record[component.value] = {"file": file.name, "sha256": source.sha256, "trained_by": source.trained_by}
        return record

    def _retire(self, newest: Path) -> None:
        """Removes the oldest checkpoints, by way of a name that nothing takes for a checkpoint."""
        assert (newest / MANIFEST_FILE).is_file()
        for old in checkpoints(self._directory)[: -self._keep_last]:
            trash = old.with_name(f".{old.name}.trash")
            old.rename(trash)
            shutil.rmtree(trash)


def seal(directory: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of a directory, last and synced: its presence says that everything before it is whole."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _sync_file(path)
            files[str(path.relative_to(directory))] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    _write_json(directory / MANIFEST_FILE, {"format": FORMAT, **facts, "files": files})
    _sync_file(directory / MANIFEST_FILE)
    _sync_directory(directory)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file that is readable for others as the umask says; the library makes it private."""
    save_file(tensors, path)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_sync_directory = _sync_file


def _link_or_copy(source: Path, target: Path) -> None:
    """Gives an immutable file a second name, or a copy where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# -- the optimizer and random states ------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimizer's state as flat named tensors, `<parameter>::<slot>`."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["parameter_names"], group["params"], strict=True):
            for slot, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}::{slot}"] = value.detach().cpu().contiguous()
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restores what `optimizer_tensors` returned.

    Raises:
        ConfigError: If the state belongs to other parameters.
    """
    tensors = load_file(path)
    owners = {
        n: p for group in optimizer.param_groups for n, p in zip(group["parameter_names"], group["params"], strict=True)
    }
    strangers = sorted({key.split("::")[0] for key in tensors} - owners.keys())
    absent = sorted(owners.keys() - {key.split("::")[0] for key in tensors})
    if strangers or (absent and tensors):
        raise ConfigError(
            f"{path} belongs to another trainable set: it has {strangers[:3]} and lacks {absent[:3]}; "
            "resume needs the same trainable table, init_from takes weights only"
        )
    for key, tensor in tensors.items():
        name, slot = key.split("::")
        parameter = owners[name]
        # AdamW keeps its step counter on the CPU.
        optimizer.state[parameter][slot] = tensor if slot == "step" else tensor.to(parameter.device)


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
