"""Reads a Hugging Face `config.json`: the model types that have a closed formula here, as architectures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from theworld_train.accounting.architectures import Architecture, Decoder, VisionTransformer, dimension_problems
from theworld_train.accounting.presets import gemma3, style_fields
from theworld_train.accounting.resources import table
from theworld_train.accounting.video_vae import VideoVae
from theworld_train.config.errors import ConfigError, Problem


def model_type(config: Mapping[str, Any], source: str) -> str:
    """Returns a transformers config's `model_type`, or a diffusers config's `_class_name`.

    Raises:
        ConfigError: If it has neither.
    """
    for key in ("model_type", "_class_name"):
        if isinstance(config.get(key), str) and config[key]:
            return str(config[key])
    hint = "is this the config.json of a model?"
    raise ConfigError(Problem("names no model: neither model_type nor _class_name is there", source, hint=hint))


def architecture_from_config(config: Mapping[str, Any], source: str) -> Architecture | None:
    """Returns what the `config.json` describes, or None if there is no closed formula for it.

    Args:
        config: The parsed file.
        source: Its path, for error messages.

    Raises:
        ConfigError: With every size in it that cannot be.
    """
    reader = _READERS.get(model_type(config, source))
    return reader(config, source) if reader else None


class _Keys:
    """The keys of a config with the defaults of its class, checked as they are read."""

    def __init__(self, config: Mapping[str, Any], kind: str, source: str, prefix: str = "") -> None:
        self._values = {**table("config_defaults")["defaults"][kind], **config}
        self._source = source
        self._prefix = prefix
        self._problems: list[Problem] = []
        self._sizes: dict[str, int | None] = {}
        self._keys: dict[str, str] = {}

    def size(self, key: str, name: str | None = None) -> int:
        """Returns a size; 1 in place of one that is wrong, which `finish` then reports."""
        value = self.optional_size(key, name)
        if value is None and not self._known_wrong(key):
            self._wrong("must be a positive whole number", key, None)
        return value if value is not None and value > 0 else 1

    def optional_size(self, key: str, name: str | None = None) -> int | None:
        """Returns a size that may be null; `name` is its standard name where the key is another."""
        value = self._values[key]
        size = value if isinstance(value, int) and not isinstance(value, bool) else None
        if value is not None and size is None:
            self._wrong("must be a positive whole number", key, value)
        self._sizes[name or key] = size
        self._keys[name or key] = key
        return size

    def flag(self, key: str) -> bool:
        """Returns a switch; null means off."""
        value = self._values[key]
        if value is not None and not isinstance(value, bool):
            self._wrong("must be true or false", key, value)
        return value is True

    def list_of(self, kind: type, key: str) -> tuple[Any, ...]:
        """Returns a list whose entries are all of one type."""
        values = self._values[key]
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            self._wrong(f"must be a list of {kind.__name__}", key, values)
            return ()
        return tuple(values)

    def finish(self) -> None:
        """Raises ConfigError: with every key read so far that is wrong."""
        self._problems += [
            replace(problem, source=self._source, key=self._prefix + self._keys[problem.key or ""])
            for problem in dimension_problems(self._sizes)
        ]
        if self._problems:
            raise ConfigError(self._problems)

    def _known_wrong(self, key: str) -> bool:
        return any(problem.key == self._prefix + key for problem in self._problems)

    def _wrong(self, message: str, key: str, value: object) -> None:
        self._problems.append(Problem(message, self._source, self._prefix + key, value))


def _gpt2(config: Mapping[str, Any], source: str) -> Decoder | None:
    keys = _Keys(config, "gpt2", source)
    if keys.flag("add_cross_attention"):
        return None
    width, heads = keys.size("n_embd", "hidden_size"), keys.size("n_head", "num_attention_heads")
    sizes: dict[str, Any] = {
        "num_hidden_layers": keys.size("n_layer"),
        "intermediate_size": keys.optional_size("n_inner") or 4 * width,
        "vocab_size": keys.size("vocab_size"),
        "num_learned_positions": keys.size("n_positions"),
    }
    tied = keys.flag("tie_word_embeddings")
    keys.finish()
    shared = {**style_fields("gpt2"), "tie_word_embeddings": tied}
    return Decoder(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        **sizes,
        **shared,
    )


def _rotary(config: Mapping[str, Any], source: str, kind: str, style: str, prefix: str = "") -> Decoder:
    """Reads what Llama, Mistral, Gemma and Gemma 3 have in common."""
    keys = _Keys(config, kind, source, prefix)
    width, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    head_dim = keys.optional_size("head_dim")
    sizes: dict[str, Any] = {
        "num_hidden_layers": keys.size("num_hidden_layers"),
        "num_key_value_heads": keys.optional_size("num_key_value_heads") or heads,
        "intermediate_size": keys.size("intermediate_size"),
        "vocab_size": keys.size("vocab_size"),
    }
    known = table("config_defaults")["defaults"][kind]
    biased = "attention_bias" in known and keys.flag("attention_bias")
    shared = {
        **style_fields(style),
        "tie_word_embeddings": keys.flag("tie_word_embeddings"),
        "qkv_bias": biased,
        "output_bias": biased,
        "mlp_bias": "mlp_bias" in known and keys.flag("mlp_bias"),
    }
    if "sliding_window" in known:
        shared["sliding_window"] = keys.optional_size("sliding_window")
    keys.finish()
    if head_dim is None:
        head_dim = width // heads
    return Decoder(hidden_size=width, num_attention_heads=heads, head_dim=head_dim, **sizes, **shared)


def _llama(config: Mapping[str, Any], source: str) -> Decoder:
    return _rotary(config, source, "llama", "llama")


def _mistral(config: Mapping[str, Any], source: str) -> Decoder:
    return _rotary(config, source, "mistral", "llama")


def _gemma(config: Mapping[str, Any], source: str) -> Decoder:
    return _rotary(config, source, "gemma", "gemma")


def _gemma3_text(config: Mapping[str, Any], source: str, prefix: str = "") -> Decoder:
    decoder = _rotary(config, source, "gemma3_text", "gemma3", prefix)
    kinds, every = config.get("layer_types"), config.get("sliding_window_pattern", 6)
    last: int | None
    if isinstance(kinds, list):
        full = kinds.count("full_attention")
        last = kinds[::-1].index("full_attention") if full else len(kinds)
    elif isinstance(every, int) and every > 0:
        full, last = decoder.num_hidden_layers // every, None  # every n-th
    else:
        key = f"{prefix}sliding_window_pattern"
        raise ConfigError(Problem("must be a positive whole number", source, key, every))
    return replace(decoder, num_full_attention_layers=full, num_last_windowed_layers=last)


def _siglip(config: Mapping[str, Any], source: str, prefix: str = "") -> VisionTransformer:
    keys = _Keys(config, "siglip_vision_model", source, prefix)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = {key: keys.size(key) for key in (*names, "image_size", "patch_size", "num_channels")}
    pooling_head = keys.flag("vision_use_head")
    keys.finish()
    return VisionTransformer(**sizes, pooling_head=pooling_head)


def _gemma3(config: Mapping[str, Any], source: str) -> Architecture | None:
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    for key, section in (("text_config", text), ("vision_config", vision)):
        if not isinstance(section, Mapping):
            raise ConfigError(Problem("must be a table", source, key, section))
    if vision.get("model_type", "siglip_vision_model") != "siglip_vision_model":
        return None
    tied = _Keys(config, "gemma3", source).flag("tie_word_embeddings")
    text = {**text, "tie_word_embeddings": tied}
    problems: list[Problem] = []
    parts: list[Any] = []
    for reader, section, prefix in ((_gemma3_text, text, "text_config."), (_siglip, vision, "vision_config.")):
        try:
            parts.append(reader(section, source, prefix))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return gemma3(parts[0], parts[1])


def _wan_vae(config: Mapping[str, Any], source: str) -> VideoVae | None:
    keys = _Keys(config, "AutoencoderKLWan", source)
    if keys.flag("is_residual") or config.get("attn_scales"):
        return None
    names = ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels")
    sizes = {key: keys.size(key) for key in names}
    decoder_base_dim = keys.optional_size("decoder_base_dim")
    mult, temporal = keys.list_of(int, "dim_mult"), keys.list_of(bool, "temperal_downsample")
    keys.finish()
    try:
        return VideoVae(**sizes, decoder_base_dim=decoder_base_dim, dim_mult=mult, temporal_downsample=temporal)
    except ConfigError as error:
        raise ConfigError(replace(problem, source=source) for problem in error.problems) from None


_READERS: dict[str, Callable[[Mapping[str, Any], str], Architecture | None]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "gemma": _gemma,
    "gemma3_text": _gemma3_text,
    "gemma3": _gemma3,
    "siglip_vision_model": _siglip,
    "AutoencoderKLWan": _wan_vae,
}
