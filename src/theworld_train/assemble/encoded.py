"""What a run keeps of its frozen encoders' work: their recipes, and the entries that it may read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from theworld_train.assemble.model import attention_of, describe_model
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.encoded_files import KEY, SUFFIX, EncodedFiles, Recipe, refuse_stale
from theworld_train.model import TheWorldForConditionalGeneration, TheWorldProcessor
from theworld_train.model.components import TRAITS, component_parameters
from theworld_train.model.digest import combined_digest
from theworld_train.model.world_encoder import read_vae_config, vae_config

#: Name of the one value of a recipe that is not known before the model is loaded.
WEIGHTS = "weights"
#: What the image processor does to an image, and what the vision tower does besides multiplying with its weights.
_PIXELS = ("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
_TOWER = ("hidden_act", "image_size", "layer_norm_eps", "num_attention_heads", "num_hidden_layers", "patch_size")


def frozen_encoders(config: RunConfig) -> tuple[Component, ...]:
    """Returns the encoders of a run that neither train nor have an adapter that does."""
    absent = () if config.model.world.enabled else (Component.WORLD_ENCODER,)
    encoders = [component for component, traits in TRAITS.items() if traits.is_encoder and component not in absent]
    return tuple(component for component in encoders if component not in config.trainable)


def recipe_of(
    component: Component,
    config: RunConfig,
    processor: TheWorldProcessor,
    model: TheWorldForConditionalGeneration | None = None,
) -> Recipe:
    """Returns all that determines what a frozen encoder of a run makes of a picture.

    Which frames of a clip are taken is not in it: entries are known by the frames that were taken.

    Args:
        component: The encoder.
        config: The run config.
        processor: Of the run.
        model: As the run starts with it; without one, the digest of the weights is left empty.
    """
    world = config.model.world
    weights = None if model is None else combined_digest(dict(component_parameters(model)[component]))
    values: dict[str, Any]
    if component is Component.WORLD_ENCODER:
        vae = vae_config(read_vae_config(world.encoder, world.encoder_revision))
        values = {
            "architecture": _hash(vae),
            "dtype": world.encoder_dtype,
            "resolution": world.resolution,
            "resize": world.resize,
        }
    else:
        tower: Any = describe_model(config).vision_config
        pixels: dict[str, Any] = json.loads(processor.image_processor.to_json_string())
        values = {
            "attention": attention_of(config)["vision_config"],
            "precision": config.precision,
            **{name: getattr(tower, name) for name in _TOWER},
            **{f"pixels.{name}": pixels.get(name) for name in _PIXELS},
        }
    return Recipe(component.value, {WEIGHTS: weights, **values})


def check_encoded(config: RunConfig, processor: TheWorldProcessor) -> None:
    """Compares what `data.encoded` holds with a run, as far as that can be done before a model is loaded.

    Raises:
        ConfigError: If there is no such directory, or what it holds is stale.
    """
    if config.data.encoded is None or not frozen_encoders(config):
        return
    directory = Path(config.data.encoded)
    if not directory.is_dir():
        message = "is a file, expected a directory" if directory.exists() else "no such directory"
        hint = "fill it first with `theworld-train encode CONFIG`, or set it to null"
        raise ConfigError(Problem(message, key=KEY, value=config.data.encoded, hint=hint))
    for component in frozen_encoders(config):
        refuse_stale(directory, recipe_of(component, config, processor), unknown=[WEIGHTS])


def open_encoded(
    config: RunConfig, processor: TheWorldProcessor, model: TheWorldForConditionalGeneration
) -> dict[Component, EncodedFiles] | None:
    """Opens the entries that a run may read: those of its frozen encoders; None if it keeps none at all.

    Args:
        config: The run config.
        processor: Of the run.
        model: As the run starts with it, on the host.

    Raises:
        ConfigError: If what the directory holds is stale or damaged.
    """
    if config.data.encoded is None:
        return None
    directory = Path(config.data.encoded)
    opened = {}
    for component in frozen_encoders(config):
        recipe = recipe_of(component, config, processor, model)
        refuse_stale(directory, recipe)
        opened[component] = EncodedFiles(recipe.folder(directory))
    return opened


def kept_encoders(config: RunConfig) -> frozenset[Component]:
    """Returns the frozen encoders of whose work `data.encoded` holds something; whether it fits, a run finds out."""
    if config.data.encoded is None:
        return frozenset()
    directory = Path(config.data.encoded)
    return frozenset(c for c in frozen_encoders(config) if any(directory.glob(f"{c.value}-*/*{SUFFIX}")))


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:16]
