"""The model of a run: described, counted, or loaded in the state that the run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import Gemma3TextConfig

from theworld_train.accounting.ledger import ParameterLedger
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.model import TheWorld, TheWorldForConditionalGeneration
from theworld_train.model.attention import BANDED, FLEX
from theworld_train.model.build import build_on_meta, describe_architecture
from theworld_train.model.configuration import TheWorldConfig
from theworld_train.model.digest import base_digests
from theworld_train.model.kernels import COMPILED, LEAN, find_compiler, make_lean
from theworld_train.model.last_layers import make_trimmed
from theworld_train.model.liger import LIGER, find_obstacle, fuse_head
from theworld_train.train.checkpoint import (
    Base,
)
from theworld_train.train.freeze import apply_trainable
from theworld_train.train.handoff import Inheritance, inherit
from theworld_train.train.ledger import add_adapters, build_ledger, saved_names, trainable_components
from theworld_train.train.stage import StageModule


@dataclass(frozen=True)
class LoadedModel:
    """A model in the state that a run starts from.

    Attributes:
        model: The model, frozen and trainable parts set.
        base: Where language and vision weights come from.
        encoder: Where the chain's world encoder comes from.
        digests: Digest of each component as the chain's bases hold it.
        inheritance: What came from a checkpoint.
    """

    model: TheWorldForConditionalGeneration
    base: Base
    encoder: Base | None
    digests: dict[str, str]
    inheritance: Inheritance


def load_model(
    config: RunConfig, trainable: tuple[Component, ...], checkpoint: Path | None = None, *, resume: bool = False
) -> LoadedModel:
    """Loads the bases in their own dtypes, sets what trains, and copies a checkpoint's components.

    Args:
        config: The run config.
        trainable: Components that train; none for evaluation.
        checkpoint: A sealed checkpoint, or None to start from the bases.
        resume: Whether the run that wrote the checkpoint is continued.

    Raises:
        ConfigError: If weights are missing, or the checkpoint does not fit them.
    """
    world = config.model.world
    _check_means(config, trains=bool(trainable))
    if trainable and config.model.attention == "flex" and not torch.cuda.is_available():
        hint = "use banded, which computes the same"
        raise ConfigError(Problem("has no backward pass on a CPU", key="model.attention", value="flex", hint=hint))
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    model = TheWorld.from_pretrained(
        config.model.base,
        revision=config.model.revision,
        enable_world=world.enabled,
        cosmos=world.encoder,
        cosmos_revision=world.encoder_revision,
        attn_implementation=attention_of(config),
        projection=world.projection,
        tokens=world.tokens,
        resolution=world.resolution,
        resize=world.resize,
        pool=world.pool,
        max_world_steps=world.max_world_steps,
        dtype="auto",
    )
    base = _base(config.model.base, config.model.revision)
    encoder = _base(world.encoder, world.encoder_revision) if world.enabled else None
    digests = base_digests(model)
    if trainable:
        add_adapters(model, config)
    apply_trainable(model, trainable, config.precision, getattr(torch, world.encoder_dtype))
    inheritance = Inheritance()
    if checkpoint is not None:
        trained = saved_names(config)
        inheritance = inherit(
            model, checkpoint, base=base, encoder=encoder, digests=digests, resume=resume, trained=trained
        )
        # A stage without a world path hands on what the stages before it have recorded of theirs.
        encoder, digests = encoder or inheritance.encoder, inheritance.digests | digests
    return LoadedModel(model, base, encoder, digests, inheritance)


def _base(source: str, revision: str | None) -> Base:
    """Names a base: a directory by its absolute path, so that a checkpoint finds it from anywhere."""
    return Base(str(Path(source).resolve()), None) if Path(source).is_dir() else Base(source, revision)


def describe_model(config: RunConfig) -> TheWorldConfig:
    """Returns the config of a run's model without weights; for the built-in architectures not even a file is read."""
    world = config.model.world
    architecture = describe_architecture(
        config.model.base,
        config.model.revision,
        world.encoder,
        world.encoder_revision,
        enable_world=world.enabled,
        world_projection=world.projection,
        world_tokens=world.tokens,
        world_resolution=world.resolution,
        world_pool=world.pool,
        max_world_steps=world.max_world_steps,
    )
    architecture._attn_implementation = attention_of(config)
    return architecture


def attention_of(config: RunConfig) -> dict[str, str]:
    """Returns the names under which transformers knows the attention of a run's language model and vision tower."""
    chosen = "banded" if config.model.attention == "auto" else config.model.attention
    language = {"flex": FLEX, "banded": BANDED}.get(chosen, chosen)
    return {"text_config": language, "vision_config": "eager" if chosen == "eager" else "sdpa"}


def trims_last_layers(config: RunConfig) -> bool:
    """Whether the last layers of a run compute the positions alone that its loss depends on."""
    blocks = attention_of(config)["text_config"] in (BANDED, FLEX) and config.training.loss != "reference_4_56"
    return blocks if config.model.last_layers == "auto" else config.model.last_layers == "needed"


def _check_means(config: RunConfig, *, trains: bool) -> None:
    """Refuses ways to compute that the base or the machine does not go with; only training drops out."""
    text = cast(Gemma3TextConfig, describe_model(config).text_config)
    problems = []
    if text.use_bidirectional_attention:
        message = "attends to later positions too (use_bidirectional_attention); expected a causal Gemma 3"
        problems.append(Problem(message, key="model.base", value=config.model.base))
    if trains and text.attention_dropout and attention_of(config)["text_config"] in (BANDED, FLEX):
        message = f"has no dropout, but {config.model.base} has attention_dropout {text.attention_dropout}"
        hint = "use sdpa or eager, or set attention_dropout to 0 in the base's config.json"
        problems.append(Problem(message, key="model.attention", value=config.model.attention, hint=hint))
    if config.model.kernels == "compiled" and not find_compiler():
        message = "needs a C++ compiler, and there is none"
        problems.append(Problem(message, key="model.kernels", value="compiled", hint="install g++, or use lean"))
    chosen = {"model.kernels": config.model.kernels, "training.loss": config.training.loss}
    liger = [key for key, value in chosen.items() if value == "liger"]
    if trains and liger and (obstacle := find_obstacle()):
        hint = "pip install 'theworld-train[liger]' on a machine with a GPU, or use lean kernels and the chunked loss"
        problems += [Problem(obstacle, key=key, value="liger", hint=hint) for key in liger]
    if problems:
        raise ConfigError(problems)


def ledger_of(config: RunConfig) -> ParameterLedger:
    """Returns the ledger of a run from shapes alone."""
    shell = build_on_meta(describe_model(config))
    dtype = getattr(torch, config.model.world.encoder_dtype)
    add_adapters(shell, config)
    apply_trainable(shell, trainable_components(config), config.precision, dtype)
    return build_ledger(shell, config)


def build_stage(model: TheWorldForConditionalGeneration, config: RunConfig) -> StageModule:
    """Returns the module of a run's training step around a model that `apply_trainable` has prepared."""
    if trims := trims_last_layers(config):
        make_trimmed(model.model.language_model)
    if config.model.kernels != "plain":
        forms = {"lean": LEAN, "compiled": COMPILED, "liger": LIGER}[config.model.kernels]
        make_lean(model.model.language_model, forms)
    if fused := config.training.loss == "liger":
        fuse_head(model.lm_head)
    return StageModule(
        model,
        trainable_components(config),
        precision=config.precision,
        chunk_size=config.training.loss_chunk_size,
        gradient_checkpointing=config.training.gradient_checkpointing,
        activation_offload=config.training.activation_offload,
        reference=config.training.loss == "reference_4_56",
        trims=trims,
        fused=fused,
    )


def move(model: TheWorldForConditionalGeneration, device: torch.device) -> None:
    """Moves a whole model to a device, in place."""
    torch.nn.Module.to(model, device)
