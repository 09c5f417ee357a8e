"""Loading: Gemma 3 fused with a VAE's encoder, a complete TheWorld directory, or a checkpoint of a run."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Gemma3ForConditionalGeneration, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from theworld_train.checkpoint_files import COMPONENTS_FILE, read_record, verify_components
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.model.adapters import ADAPTER_SUFFIX, base_parameters, load_adapter
from theworld_train.model.components import component_modules
from theworld_train.model.configuration import TheWorldConfig
from theworld_train.model.digest import base_digests
from theworld_train.model.world_encoder import read_vae_config

if TYPE_CHECKING:
    from theworld_train.model.modeling import TheWorldForConditionalGeneration

#: Repository of the video VAE that TheWorld uses unless told otherwise.
DEFAULT_ENCODER = "nvidia/Cosmos-Predict2-2B-Video2World"

_WORLD_PREFIXES = ("world_encoder.", "world_projector.")
_FREEZE_ARGUMENTS: dict[str, tuple[Component, ...]] = {
    "freeze_gemma_vision": (Component.VISION_TOWER, Component.MULTI_MODAL_PROJECTOR),
    "freeze_gemma_language": (Component.LANGUAGE_MODEL,),
    "freeze_cosmos_vae": (Component.WORLD_ENCODER,),
}
_WORLD_ARGUMENTS: dict[str, str] = {
    "projection": "world_projection",
    "tokens": "world_tokens",
    "resolution": "world_resolution",
    "resize": "world_resize",
    "pool": "world_pool",
    "max_world_steps": "max_world_steps",
}


def load_pretrained(
    cls: type[TheWorldForConditionalGeneration],
    source: str,
    *args: Any,
    config: TheWorldConfig | None = None,
    enable_world: bool | None = None,
    cosmos: str = DEFAULT_ENCODER,
    cosmos_revision: str | None = None,
    **kwargs: Any,
) -> TheWorldForConditionalGeneration:
    """Loads TheWorld; this is `TheWorld.from_pretrained`.

    Args:
        cls: The model class.
        source: Hub id or directory of a Gemma 3 checkpoint, a directory of `save_pretrained`, or a run's `step-N`.
        *args: Passed on to transformers.
        config: Used instead of the one in a TheWorld directory or a run's checkpoint, as the Auto classes do.
        enable_world: Whether the model has a world path; by default what the checkpoint says, and yes for Gemma 3.
        cosmos: Hub id or directory whose `vae` folder holds the video VAE; read only when Gemma 3 is loaded.
        cosmos_revision: Hub revision of `cosmos`.
        **kwargs: `freeze_gemma_vision`, `freeze_gemma_language`, `freeze_cosmos_vae` set `requires_grad` and are never
            saved; they default to true for a model with a world path, and to false for one without, which is Gemma 3
            as transformers loads it. For Gemma 3, `projection`, `tokens`, `resolution`, `resize`, `pool` and
            `max_world_steps` describe the world path to build; any other source has to agree with them. Everything
            else goes to transformers (`dtype`, `device_map`, `attn_implementation`, `revision`). A run's checkpoint
            names the revision of its base itself, and is loaded unquantised.

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: If the source is of another kind, or does not hold exactly the weights that the model needs.
    """
    freeze = {name: kwargs.pop(name) for name in _FREEZE_ARGUMENTS if name in kwargs}
    world = {field: kwargs.pop(name) for name, field in _WORLD_ARGUMENTS.items() if name in kwargs}
    _refuse_flash_attention(kwargs.get("attn_implementation"))
    if (Path(source) / COMPONENTS_FILE).is_file():
        config = _own_config(source, config, enable_world, kwargs.get("revision"))
        model = _load_checkpoint(cls, Path(source), config, *args, **kwargs)
    else:
        stated = read_config(source, kwargs.get("revision"))
        model_type = stated.get("model_type")
        if model_type == TheWorldConfig.model_type:
            config = _own_config(source, config, enable_world, kwargs.get("revision"))
            model = _load_weights(cls, source, config, *args, expect_world=config.enable_world, **kwargs)
        elif model_type == "gemma3":
            if config is not None:
                raise ConfigError(f"{source} holds a Gemma 3; describe the world path by {', '.join(_WORLD_ARGUMENTS)}")
            encoder = None if enable_world is False else read_vae_config(cosmos, cosmos_revision)
            config = _fused_config(source, stated, encoder, world)
            model = _fuse(cls, source, config, cosmos, cosmos_revision, *args, **kwargs)
        else:
            message = f"holds a model of type {model_type!r}; expected 'gemma3' or 'theworld'"
            raise ConfigError(Problem(message, key="model.base", value=source))
    if model.config.enable_world:
        _check_agreement(source, model.config, world)
    _apply_freezing(model, freeze)
    return model


def _refuse_flash_attention(attention: object) -> None:
    """Refuses backends that drop the bidirectional mask of image tokens without a word."""
    if isinstance(attention, str) and "flash" in attention:
        raise ConfigError(
            f"attn_implementation={attention!r} drops Gemma 3's bidirectional image mask; use 'sdpa' or 'eager'"
        )


def _apply_freezing(model: TheWorldForConditionalGeneration, freeze: dict[str, bool]) -> None:
    """Sets `requires_grad` by component.

    Weights that require a gradient may take another kernel in PyTorch's `matmul` and differ in the last bit, so a model
    without a world path keeps transformers' default: its logits are Gemma 3's.
    """
    default = model.config.enable_world
    frozen = {part for name, parts in _FREEZE_ARGUMENTS.items() if freeze.get(name, default) for part in parts}
    for component, module in component_modules(model).items():
        module.requires_grad_(component not in frozen)


def _check_agreement(source: str, config: TheWorldConfig, world: dict[str, Any]) -> None:
    """Refuses a description of the world path that is not the loaded model's."""
    names = {field: name for name, field in _WORLD_ARGUMENTS.items()}
    problems = [
        Problem(f"{source} was built with {names[field]}={getattr(config, field)!r}", value=value)
        for field, value in world.items()
        if value != getattr(config, field)
    ]
    if problems:
        raise ConfigError(problems)


def read_config(source: str, revision: str | None) -> dict[str, Any]:
    """Returns the `config.json` of a model.

    Args:
        source: Hub id or directory.
        revision: Hub revision.

    Raises:
        ConfigError: If there is none.
    """
    hint = "name a directory that has one, or run `theworld-train fetch CONFIG` first"
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision or "main")
    except (OSError, ValueError) as error:  # the hub refuses a name that is no repository with a ValueError
        message = f"its config.json cannot be read: {error}"
        raise ConfigError(Problem(message, key="model.base", value=source, hint=hint)) from error
    if not config:
        raise ConfigError(Problem("it has no config.json", key="model.base", value=source, hint=hint))
    return config


def _own_config(
    source: str, config: TheWorldConfig | None, enable_world: bool | None, revision: str | None
) -> TheWorldConfig:
    """Returns the directory's config, or a copy of the one given instead; `enable_world` can only take away."""
    config = deepcopy(config) if config else TheWorldConfig.from_pretrained(source, revision=revision or "main")
    if enable_world and not config.enable_world:
        raise ConfigError(f"{source} was saved without a world path, so enable_world=True cannot be had from it")
    if enable_world is not None:
        config.enable_world = enable_world
    return config


def _fused_config(
    source: str, stated: dict[str, Any], encoder: dict[str, Any] | None, world: dict[str, Any]
) -> TheWorldConfig:
    """Returns Gemma 3's config with the world path's fields added; without a VAE's config there is no world path."""
    config = {
        name: value
        for name, value in stated.items()
        if name not in ("model_type", "architectures", "transformers_version")
    }
    result = TheWorldConfig(**config, enable_world=encoder is not None, world_encoder_config=encoder, **world)
    text: Any = result.text_config
    if encoder is not None and result.end_of_world_token_id >= text.vocab_size:
        raise ConfigError(
            f"{source} has no spare embedding rows for the three world tokens: they would be ids "
            f"{result.world_token_ids}, but its vocabulary has {text.vocab_size} rows"
        )
    return result


def _load_weights(
    cls: type[TheWorldForConditionalGeneration],
    source: str,
    config: TheWorldConfig,
    *args: Any,
    expect_world: bool,
    **kwargs: Any,
) -> TheWorldForConditionalGeneration:
    """Loads through transformers and refuses keys that are missing or unexpected, but for the world path's own."""
    load = Gemma3ForConditionalGeneration.from_pretrained.__func__  # type: ignore[attr-defined]
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report warns of the world path's keys, which are checked below
    try:
        checked = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported, and refused below
        model, info = load(cls, source, *args, **kwargs | checked | {"config": config, "use_safetensors": True})
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            Problem(f"its weights cannot be read as safetensors: {error}", key="model.base", value=source)
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = {key for key in info["missing_keys"] if expect_world or not key.startswith(_WORLD_PREFIXES)}
    unexpected = {key for key in info["unexpected_keys"] if expect_world or not key.startswith(_WORLD_PREFIXES)}
    if missing or unexpected or info["mismatched_keys"]:
        raise ConfigError(
            f"the weights of {source} do not fit: missing {sorted(missing)[:5]}, unexpected {sorted(unexpected)[:5]}, "
            f"of another shape {sorted(info['mismatched_keys'])[:5]}"
        )
    return model  # type: ignore[no-any-return]


def _fuse(
    cls: type[TheWorldForConditionalGeneration],
    source: str,
    config: TheWorldConfig,
    cosmos: str,
    cosmos_revision: str | None,
    *args: Any,
    **kwargs: Any,
) -> TheWorldForConditionalGeneration:
    """Loads Gemma 3 through transformers and the VAE's encoder through diffusers; measures the embedding's scale."""
    model = _load_weights(cls, source, config, *args, expect_world=False, **kwargs)
    if config.enable_world:
        vae = _load_vae(cosmos, cosmos_revision)
        # transformers keeps in fp32 what it loads, but not what it creates.
        model.world_encoder.to(torch.float32)
        model.world_encoder.encoder.load_state_dict(vae.encoder.state_dict())
        model.world_encoder.quant_conv.load_state_dict(vae.quant_conv.state_dict())
        model.world_projector.reset_parameters()
        set_embedding_scale(model, measure_embedding_rms(model))
    return model


def _load_vae(source: str, revision: str | None) -> AutoencoderKLWan:
    """Loads the whole VAE in fp32."""
    try:
        vae: AutoencoderKLWan = AutoencoderKLWan.from_pretrained(
            source, subfolder="vae", revision=revision, torch_dtype=torch.float32, use_safetensors=True
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            Problem(f"its VAE cannot be read as safetensors: {error}", key="model.world.encoder", value=source)
        ) from error
    return vae


@torch.no_grad()
def measure_embedding_rms(model: TheWorldForConditionalGeneration) -> float:
    """Returns the RMS of the base's text embeddings, scaled as Gemma scales them, over the rows that tokens use."""
    embedding: Any = model.get_input_embeddings()
    used = embedding.weight[: model.config.image_token_index]
    squares = sum(float(part.float().pow(2).sum(dtype=torch.float64)) for part in used.split(16384))
    return float((squares / used.numel()) ** 0.5) * float(embedding.scalar_embed_scale)


def set_embedding_scale(model: TheWorldForConditionalGeneration, rms: float) -> None:
    """Sets the RMS that world tokens are scaled to, in the config and in the projector."""
    model.config.world_embedding_rms = rms
    model.world_projector.scale = rms


def _load_checkpoint(
    cls: type[TheWorldForConditionalGeneration],
    directory: Path,
    config: TheWorldConfig,
    *args: Any,
    **kwargs: Any,
) -> TheWorldForConditionalGeneration:
    """Loads a run's checkpoint: its bases first, then the components that its chain has trained.

    The bases are compared with what the run built on in their own dtypes; another dtype takes a second load, as what
    transformers computes at loading (scaled embeddings, positions) is not what a cast would leave.
    """
    record = read_record(directory / COMPONENTS_FILE)
    base, encoder = record["base"], record["encoder"] or {"id": DEFAULT_ENCODER, "revision": None}
    for part in (base, encoder):
        if Path(part["id"]).is_absolute() and not Path(part["id"]).is_dir():
            raise ConfigError(f"{directory} builds on the weights in {part['id']}, which is no longer there")
    _refuse_arguments(directory, base, kwargs)
    arguments = kwargs | {"revision": base["revision"] or "main"}
    dtype: Any = arguments.pop("dtype", None) or arguments.pop("torch_dtype", None) or "auto"
    build = partial(_fuse, cls, base["id"], config, encoder["id"], encoder["revision"], *args, **arguments)
    left_out = () if config.enable_world else (Component.WORLD_ENCODER, Component.WORLD_PROJECTOR)
    verify_components(directory, set(record["components"]) - set(left_out))
    rms = config.world_embedding_rms
    model = build(dtype="auto")
    _refuse_changed_bases(model, directory, record)
    if dtype not in ("auto", model.dtype, str(model.dtype).removeprefix("torch.")):
        del model  # one model at a time in memory
        model = build(dtype=dtype)
    if config.enable_world:
        set_embedding_scale(model, rms)
    load_components(model, directory)
    return model


def _refuse_arguments(directory: Path, base: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Refuses what would load other weights than those that the components were trained with."""
    if kwargs.get("revision", base["revision"]) not in (None, base["revision"]):
        raise ConfigError(
            f"{directory} builds on revision {base['revision']} of {base['id']} and loads no other; leave revision="
            f"{kwargs['revision']!r} out"
        )
    if kwargs.get("quantization_config") is not None:
        raise ConfigError(
            f"{directory} holds parts of a model, which are put together unquantised; write the whole with "
            "save_pretrained and quantise that"
        )


def _refuse_changed_bases(model: TheWorldForConditionalGeneration, directory: Path, record: dict[str, Any]) -> None:
    """Refuses bases whose weights are not those that the run built on; components with a file of their own aside."""
    recorded = record["base_digests"]
    own = base_digests(model, without=record["components"])
    if changed := [name for name, digest in own.items() if recorded.get(name, digest) != digest]:
        bases = " or ".join(part["id"] for part in (record["base"], record["encoder"]) if part)
        raise ConfigError(
            f"{directory} was trained on other weights of {', '.join(changed)} than those that {bases} holds now"
        )


def load_components(model: TheWorldForConditionalGeneration, directory: Path) -> None:
    """Copies the components that a checkpoint holds into the model, cast to the model's dtypes.

    An adapter goes into the component's own one, or, if it has none, is merged into its weights.

    Args:
        model: The model; components that it does not have (the world path, when disabled) are passed over.
        directory: The checkpoint, whose files the caller has verified.

    Raises:
        ConfigError: If a component's tensors are not exactly the model's.
    """
    record = read_record(directory / COMPONENTS_FILE)
    modules = {component.value: module for component, module in component_modules(model).items()}
    for name, entry in record["components"].items():
        if name not in modules:
            continue
        tensors = load_file(directory / entry["file"])
        own = base_parameters(modules[name])
        if tensors.keys() != own.keys():
            different = sorted(tensors.keys() ^ own.keys())[:5]
            raise ConfigError(f"{directory / entry['file']} does not fit the model's {name}: {different}")
        with torch.no_grad():
            for key, parameter in own.items():
                if tensors[key].shape != parameter.shape:
                    raise ConfigError(
                        f"{directory / entry['file']}: {key} has shape {tuple(tensors[key].shape)}, the model's "
                        f"{tuple(parameter.shape)}"
                    )
                if parameter.is_meta:
                    raise ConfigError(
                        f"{key} of {name} is not in memory, so {directory} cannot be put together; load it without "
                        "device_map, or write the whole with save_pretrained"
                    )
                parameter.copy_(tensors[key])
    for component, module in modules.items():
        if entry := record["components"].get(f"{component}{ADAPTER_SUFFIX}"):
            load_adapter(module, directory / entry["file"])
