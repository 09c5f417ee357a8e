"""What a run keeps of its frozen encoders' work: their recipes, and the entries that it may read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from theworld_train.assemble.model import attention_of, describe_model
from theworld_train.batch import ROLLOUT
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.encoded_files import KEY, SUFFIX, EncodedFiles, Recipe, recipes_in, refuse_stale
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


def _read_kinds(config: RunConfig) -> tuple[str, ...]:
    """Returns the kinds of entries that a run may read."""
    rollouts = (ROLLOUT,) if config.data.world.frames == "rollout" and config.model.world.enabled else ()
    return (*frozen_encoders(config), *rollouts)


def find_rollouts(
    config: RunConfig, processor: TheWorldProcessor, model: TheWorldForConditionalGeneration | None = None
) -> Recipe:
    """Returns the recipe of the rollouts that a run reads: the one of its own world encoder.

    Args:
        config: The run config, whose `data.world.frames` is `rollout`.
        processor: Of the run.
        model: As the run starts with it; without one, the weights of its world encoder are not compared.

    Raises:
        ConfigError: If there is none, or there are several.
    """
    assert config.data.encoded is not None
    encoder = recipe_of(Component.WORLD_ENCODER, config, processor, model).values
    ours = _rollout_values(config, encoder)
    if model is None:
        del ours[f"encoder.{WEIGHTS}"]
    steps = config.data.world.steps or 0
    recipes = recipes_in(Path(config.data.encoded), ROLLOUT)
    differing = [
        {name: (recipe.values.get(name), ours[name]) for name in ours if recipe.values.get(name) != ours[name]}
        | ({"steps": (kept, steps)} if (kept := recipe.values.get("steps", 0)) < steps else {})
        for recipe in recipes
    ]
    fitting = [recipe for recipe, found in zip(recipes, differing, strict=True) if not found]
    value = config.data.encoded
    if not recipes:
        message = "holds no rollouts, which data.world.frames: rollout reads"
        raise ConfigError(Problem(message, key=KEY, value=value, hint="make them with `theworld-train rollout CONFIG`"))
    if not fitting:
        raise ConfigError(
            [
                Problem(f"its rollouts differ in {name}: {theirs!r} there, {own!r} in this run", key=KEY, value=value)
                for name, (theirs, own) in min(differing, key=len).items()
            ]
        )
    # Before the weights are known, rollouts of several world encoders may seem to fit.
    if model is not None and len(fitting) > 1:
        names = sorted({name for recipe in fitting[1:] for name in fitting[0].differences(recipe)})
        message = f"holds {len(fitting)} sets of rollouts, which differ in {', '.join(names)}"
        raise ConfigError(Problem(message, key=KEY, value=value, hint="keep one of them in this directory"))
    return fitting[0]


def rollout_recipe(config: RunConfig, encoder: Recipe, weights: str) -> Recipe:
    """Returns all that determines the rollouts of a picture and a prompt.

    Args:
        config: The run config.
        encoder: Recipe of the run's world encoder.
        weights: Digest of the generator's weights.
    """
    steps = config.model.world.max_world_steps
    return Recipe(ROLLOUT, {"steps": steps, "generator.weights": weights, **_rollout_values(config, encoder.values)})


def _rollout_values(config: RunConfig, encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is known of rollouts without the generator's weights; the prompts are in the keys of entries."""
    # What pipeline and revision name is told by its digest, wherever it was fetched.
    rules = config.data.world.rollout.model_dump(mode="json", exclude={"prompt", "pipeline", "revision"})
    return {
        **{f"encoder.{name}": value for name, value in encoder.items()},
        **{f"generator.{name}": value for name, value in rules.items()},
    }


def check_encoded(config: RunConfig, processor: TheWorldProcessor) -> None:
    """Compares what `data.encoded` holds with a run, as far as that can be done before a model is loaded.

    Raises:
        ConfigError: If there is no such directory, or what it holds is stale.
    """
    if config.data.encoded is None or not _read_kinds(config):
        return
    directory = Path(config.data.encoded)
    if not directory.is_dir():
        message = "is a file, expected a directory" if directory.exists() else "no such directory"
        hint = "fill it first with `theworld-train encode CONFIG`, or set it to null"
        raise ConfigError(Problem(message, key=KEY, value=config.data.encoded, hint=hint))
    for component in frozen_encoders(config):
        refuse_stale(directory, recipe_of(component, config, processor), unknown=[WEIGHTS])
    check_rollouts(config, processor)


def check_rollouts(config: RunConfig, processor: TheWorldProcessor) -> None:
    """Makes sure that a run which reads rollouts finds some that fit, as far as that can be told without weights.

    Raises:
        ConfigError: If it does not.
    """
    if ROLLOUT in _read_kinds(config):
        find_rollouts(config, processor)


def open_encoded(
    config: RunConfig, processor: TheWorldProcessor, model: TheWorldForConditionalGeneration
) -> dict[str, EncodedFiles] | None:
    """Opens the entries that a run may read: those of its frozen encoders, and rollouts; None if it keeps none at all.

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
        opened[component.value] = EncodedFiles(recipe.folder(directory))
    return opened | open_rollouts(config, processor, model)


def open_rollouts(
    config: RunConfig, processor: TheWorldProcessor, model: TheWorldForConditionalGeneration
) -> dict[str, EncodedFiles]:
    """Opens the rollouts that a run reads, if it does; arguments and errors as of `open_encoded`."""
    if ROLLOUT not in _read_kinds(config):
        return {}
    assert config.data.encoded is not None
    recipe = find_rollouts(config, processor, model)
    return {ROLLOUT: EncodedFiles(recipe.folder(Path(config.data.encoded)))}


def kept_encoders(config: RunConfig) -> frozenset[Component]:
    """Returns the frozen encoders of whose work `data.encoded` holds something; whether it fits, a run finds out.

    A rollout stands for the work of the world encoder.
    """
    if config.data.encoded is None:
        return frozenset()
    directory = Path(config.data.encoded)
    kept = {c for c in frozen_encoders(config) if any(directory.glob(f"{c.value}-*/*{SUFFIX}"))}
    return frozenset(kept | ({Component.WORLD_ENCODER} if ROLLOUT in _read_kinds(config) else set()))


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:16]
