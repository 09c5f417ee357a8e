"""Counts the parameters of any model that transformers or diffusers can build, from its config, on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from theworld_train.accounting.architectures import AttentionShape, Counted, Part, Stack
from theworld_train.config.errors import ConfigError, Problem, did_you_mean

#: What a parameter's name says about what it does, tried in order; a name that says nothing is `other`.
_KINDS = (
    ("norms", ("norm", "ln_", "layer_norm")),
    ("head", ("lm_head", "embed_out")),
    ("position", ("position", "wpe")),
    ("embedding", ("embed", "wte")),
    ("attention", ("attn", "attention")),
    ("mlp", ("mlp", "feed_forward", "ffn", "experts", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")),
)


def census(config: Mapping[str, Any], source: str) -> Counted:
    """Builds the model of a `config.json` without memory for its weights and counts its parameters, ties once.

    Args:
        config: The parsed file, of transformers (`model_type`) or diffusers (`_class_name`).
        source: Its path, for error messages.

    Raises:
        ConfigError: If neither library knows the model, or its sizes do not fit together.
    """
    if "model_type" in config:
        return _census_of_transformers(config, source)
    return _census_of_diffusers(config, source)


def _census_of_transformers(values: Mapping[str, Any], source: str) -> Counted:
    kind = values["model_type"]
    known = tuple(CONFIG_MAPPING.keys())
    if kind not in known:
        hint = did_you_mean(str(kind), known)
        raise ConfigError(Problem("transformers knows no such model type", source, "model_type", kind, hint))
    try:
        config = transformers.AutoConfig.for_model(**values)
        with torch.device("meta"):
            model, decodes = _build(config)
    except Exception as error:
        # Every model type has checks and exceptions of its own.
        message = f"transformers cannot build a '{kind}' of these sizes: {error}"
        raise ConfigError(Problem(message, source)) from error
    text, composite = config.get_text_config(), hasattr(config, "text_config")
    stacks = () if composite else tuple(_stacks(config))
    return Counted(_parts(model, composite), stacks, _shape(text) if decodes else None)


def _census_of_diffusers(values: Mapping[str, Any], source: str) -> Counted:
    import diffusers

    kind = str(values["_class_name"])
    found = getattr(diffusers, kind, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        known = [
            name for name in dir(diffusers) if name.endswith(("Model", "2D", "3D")) or name.startswith("Autoencoder")
        ]
        problem = Problem("diffusers knows no such model", source, "_class_name", kind, did_you_mean(kind, known))
        raise ConfigError(problem)
    try:
        with torch.device("meta"):
            model = found.from_config(dict(values))
    except Exception as error:
        raise ConfigError(Problem(f"diffusers cannot build a '{kind}' of these sizes: {error}", source)) from error
    return Counted(_parts(model, composite=True))


def _build(config: transformers.PreTrainedConfig) -> tuple[nn.Module, bool]:
    """Returns the model that the config names, or the one that transformers would take, and whether it decodes."""
    decoders = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        decodes = any(type(config) in auto._model_mapping for auto in decoders)
        return named._from_config(config), decodes and named.__name__.endswith(
            ("LMHeadModel", "CausalLM", "Generation")
        )
    for auto in decoders:
        if type(config) in auto._model_mapping:
            return auto.from_config(config), True
    return transformers.AutoModel.from_config(config), False


def _parts(model: nn.Module, composite: bool) -> tuple[Part, ...]:
    """Returns the model's parameters by what their names say, and by top-level module if it has several parts."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, parameter in model.named_parameters():
        component = name.removeprefix("model.").split(".")[0] if composite else ""
        counts[component, _kind(name)] += parameter.numel()
    return tuple(
        Part(component, kind, parameters, "counted on the built model")
        for (component, kind), parameters in counts.items()
    )


def _kind(name: str) -> str:
    for kind, words in _KINDS:
        if any(word in name.lower() for word in words):
            return kind
    return "other"


def _stacks(config: transformers.PreTrainedConfig) -> Iterator[Stack]:
    layers, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if isinstance(layers, int) and isinstance(width, int):
        yield Stack(layers, width)


def _shape(text: transformers.PreTrainedConfig) -> AttentionShape | None:
    """Returns the shape of a cache of keys and values; None where some layers keep no such cache."""
    layers, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    heads = getattr(text, "num_attention_heads", None)
    kinds = getattr(text, "layer_types", None) or []
    plain = set(kinds) <= {"full_attention", "sliding_attention"} and not hasattr(text, "kv_lora_rank")
    if not (plain and isinstance(layers, int) and isinstance(width, int) and isinstance(heads, int)):
        return None
    keys = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    window = getattr(text, "sliding_window", None)
    windowed = kinds.count("sliding_attention") if isinstance(window, int) else 0
    return AttentionShape(layers, heads, keys, head_dim, window if windowed else None, windowed)
