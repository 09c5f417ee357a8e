"""Writes a checkpoint as a directory that `from_pretrained` loads on its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from theworld_train.checkpoint_files import resolve_checkpoint, verify_checkpoint
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.export.card import model_card
from theworld_train.model import TheWorld, TheWorldProcessor

Dtype = Literal["bf16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export(checkpoint: Path, target: Path, dtype: Dtype) -> Path:
    """Writes merged weights, configs, processor and model card.

    Args:
        checkpoint: A checkpoint, or a run directory, whose newest one is taken.
        target: The directory, which must not exist yet; it appears when it is complete.
        dtype: Of all weights but the world encoder's, which stay in fp32.

    Returns:
        The checkpoint that was taken.

    Raises:
        ConfigError: If the checkpoint is damaged, or the directory cannot be written.
    """
    source = resolve_checkpoint(checkpoint)
    verify_checkpoint(source)
    if target.exists():
        raise ConfigError(Problem("exists already", source=str(target), hint="name a new directory"))
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = TheWorld.from_pretrained(str(source), dtype=DTYPES[dtype])
    processor = TheWorldProcessor.from_pretrained(str(source))
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(source, dtype))
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConfigError(Problem(f"cannot be written: {error}", source=str(target))) from error
    return source


def push(directory: Path, repository: str) -> str:
    """Uploads an exported directory to a model repository on the hub, which is made private if it is new.

    Args:
        directory: The exported directory.
        repository: `owner/name`.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: If the hub takes it not.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=directory))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        message = str(error).splitlines()[0]
        hint = "a token that may write comes from HF_TOKEN or `hf auth login`; the exported directory is complete"
        raise ConfigError(Problem(f"cannot be uploaded: {message}", source=repository, hint=hint)) from error
