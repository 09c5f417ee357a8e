"""Built-in architectures by name, and descriptions as `key=value`; neither needs a framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from theworld_train.accounting.architectures import (
    Architecture,
    Composite,
    Decoder,
    Gemma3Projector,
    Linear,
    VisionTransformer,
    dimension_problems,
)
from theworld_train.accounting.resources import table
from theworld_train.accounting.video_vae import VideoVae
from theworld_train.config.errors import ConfigError, Problem, did_you_mean

#: Where `key=value` descriptions come from, in error messages.
COMMAND_LINE = "command line"

#: Other projects' words for the standard names.
ALIASES = {
    "d_model": "hidden_size",
    "n_embd": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_layer": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_head": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "d_ff": "intermediate_size",
    "n_inner": "intermediate_size",
    "n_positions": "num_learned_positions",
    "n_vocab": "vocab_size",
}
_REQUIRED = ("hidden_size", "num_hidden_layers", "vocab_size")
_SIZES = (
    *_REQUIRED,
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_learned_positions",
    "sliding_window",
    "full_attention_every",
)
_KEYS = (*_SIZES, "tie_word_embeddings", "style")
_ZERO_ALLOWED = ("vocab_size", "num_learned_positions")


@dataclass(frozen=True)
class Preset:
    """A built-in architecture.

    Attributes:
        name: Its name on the command line.
        family: The family it belongs to.
        architecture: What it is made of.
        source: Where its sizes are published.
        note: What to know about it, where there is something.
    """

    name: str
    family: str
    architecture: Architecture
    source: str
    note: str | None = None


@dataclass(frozen=True)
class Description:
    """An architecture given as `key=value`, and what was assumed about what was left out."""

    architecture: Decoder
    assumptions: tuple[str, ...]


def preset_names() -> tuple[str, ...]:
    """Returns the names of the built-in architectures, family by family."""
    return tuple(_entries())


@cache
def preset(name: str) -> Preset:
    """Returns the built-in architecture `name`.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in _entries():
        hint = did_you_mean(name, preset_names()) or "`theworld-train size` alone lists them"
        raise ConfigError(Problem("no built-in architecture has this name", COMMAND_LINE, value=name, hint=hint))
    entry = _entries()[name]
    return Preset(name, entry["family"], _BUILDERS[entry["kind"]](entry), entry["source"], entry.get("note"))


def variant(name: str, changes: Mapping[str, int]) -> Architecture:
    """Returns the built-in architecture `name` with some sizes changed (the language model's, if it is composite)."""
    architecture = preset(name).architecture
    if isinstance(architecture, Composite) and architecture.language_model:
        decoder = architecture.members[architecture.language_model]
        assert isinstance(decoder, Decoder)
        changed = replace(decoder, **changes)  # type: ignore[arg-type]  # sizes are ints
        return replace(architecture, members={**architecture.members, architecture.language_model: changed})
    assert isinstance(architecture, Decoder)
    return replace(architecture, **changes)  # type: ignore[arg-type]  # sizes are ints


def style_fields(style: str) -> dict[str, Any]:
    """Returns what decoders of the style `gpt2`, `llama`, `gemma` or `gemma3` have in common."""
    shared: dict[str, Any] = table("presets")["styles"][style]["fields"]
    return dict(shared)


def styles() -> dict[str, str]:
    """Returns the styles of decoders, each with what it stands for."""
    return {name: entry["about"] for name, entry in table("presets")["styles"].items()}


def describe(pairs: Sequence[str]) -> Description:
    """Builds a decoder from `key=value` pairs, such as `d_model=2048 n_layers=24 vocab_size=32000`.

    What is left out is assumed: style `llama`; heads of 128 features (64 where 128 does not divide the width); as many
    key and value heads as query heads; an MLP four times as wide as the model where it has two matrices, and eight
    thirds of it, rounded up to a multiple of 256, where it has three (Touvron et al. 2023, section 2.2).

    Raises:
        ConfigError: With every key that is unknown, given twice or missing, and every size that cannot be.
    """
    texts, problems = _split(pairs)
    style, tie, sizes, more = _parse(texts)
    problems += more
    problems += [Problem("must be stated", COMMAND_LINE, key) for key in _REQUIRED if key not in texts]
    if "full_attention_every" in texts and "sliding_window" not in texts:
        problems.append(Problem("must be stated with full_attention_every", COMMAND_LINE, "sliding_window"))
    if "num_attention_heads" not in texts and "head_dim" not in texts and (width := sizes["hidden_size"] or 0) > 0:
        sizes["head_dim"] = next((dim for dim in (128, 64) if width % dim == 0), None)
        if sizes["head_dim"] is None:
            problems.append(Problem("must be stated: neither 128 nor 64 divides the width", COMMAND_LINE, "head_dim"))
    problems += [replace(problem, source=COMMAND_LINE) for problem in dimension_problems(sizes, _ZERO_ALLOWED)]
    if problems:
        raise ConfigError(problems)
    return _complete(style, tie, {key: value for key, value in sizes.items() if value is not None}, texts)


def _entries() -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in table("presets")["presets"]}


def _decoder(entry: Mapping[str, Any]) -> Decoder:
    return Decoder(**style_fields(entry["style"]), **entry["fields"])


def _vision(entry: Mapping[str, Any]) -> VisionTransformer:
    return VisionTransformer(**entry["fields"])


def _video_vae(entry: Mapping[str, Any]) -> VideoVae:
    return VideoVae(**entry["fields"])


def gemma3(text: Decoder, vision: VisionTransformer) -> Composite:
    """Returns a Gemma 3 that sees: vision tower, projector and language model."""
    members = {
        "vision_tower": vision,
        "multi_modal_projector": Gemma3Projector(vision.hidden_size, text.hidden_size),
        "language_model": text,
    }
    return Composite(members, "language_model")


def _gemma3(entry: Mapping[str, Any]) -> Composite:
    vision = preset(entry["vision_tower"]).architecture
    assert isinstance(vision, VisionTransformer)
    return gemma3(Decoder(**style_fields("gemma3"), **entry["fields"]), vision)


def _pi0(entry: Mapping[str, Any]) -> Composite:
    """Returns pi0: the flow-matching time is mixed in by an MLP, and the state is one token (openpi, `pi0.py`)."""
    vision = preset(entry["vision_tower"]).architecture
    language = preset(entry["language_model"]).architecture
    expert = preset(entry["action_expert"]).architecture
    assert isinstance(vision, VisionTransformer)
    assert isinstance(language, Decoder)
    assert isinstance(expert, Decoder)
    actions, width = entry["fields"]["action_dim"], expert.hidden_size
    members = {
        "vision_tower": vision,
        "multi_modal_projector": Linear(vision.hidden_size, language.hidden_size),
        "language_model": language,
        "action_expert": expert,
        "state_proj": Linear(actions, width),
        "action_in_proj": Linear(actions, width),
        "action_time_mlp_in": Linear(2 * width, width),
        "action_time_mlp_out": Linear(width, width),
        "action_out_proj": Linear(width, actions),
    }
    return Composite(members, "language_model")


_BUILDERS: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    "decoder": _decoder,
    "vision": _vision,
    "video_vae": _video_vae,
    "gemma3": _gemma3,
    "pi0": _pi0,
}


def _split(pairs: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """Returns the pairs by standard name, and what is wrong with the names."""
    texts: dict[str, str] = {}
    problems = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        key = ALIASES.get(name, name)
        if not equals:
            problems.append(Problem("expected key=value", COMMAND_LINE, value=pair))
        elif key not in _KEYS:
            hint = did_you_mean(name, (*_KEYS, *ALIASES)) or "known: " + ", ".join(_KEYS)
            problems.append(Problem("unknown key", COMMAND_LINE, name, hint=hint))
        elif key in texts:
            problems.append(Problem("was given twice", COMMAND_LINE, key, value=value))
        else:
            texts[key] = value
    return texts, problems


def _parse(texts: Mapping[str, str]) -> tuple[str, bool | None, dict[str, int | None], list[Problem]]:
    """Returns style, tie, sizes (None where one was not stated or is no number) and what is wrong with the values."""
    problems = []
    sizes: dict[str, int | None] = dict.fromkeys(_SIZES)
    for key in (key for key in _SIZES if key in texts):
        try:
            sizes[key] = int(texts[key].replace(",", "").replace("_", ""))
        except ValueError:
            problems.append(Problem("must be a whole number", COMMAND_LINE, key, texts[key]))
    style = texts.get("style", "llama")
    if style not in styles():
        hint = did_you_mean(style, tuple(styles()))
        problems.append(Problem("unknown style", COMMAND_LINE, "style", style, hint))
    tie = {"true": True, "false": False}.get(texts.get("tie_word_embeddings", "").lower())
    if tie is None and "tie_word_embeddings" in texts:
        value = texts["tie_word_embeddings"]
        problems.append(Problem("must be true or false", COMMAND_LINE, "tie_word_embeddings", value))
    return style, tie, sizes, problems


def _complete(style: str, tie: bool | None, stated: dict[str, int], texts: Mapping[str, str]) -> Description:
    """Adds what was left out to the stated sizes and builds the decoder."""
    shared = style_fields(style)
    if tie is not None:
        shared["tie_word_embeddings"] = tie
    sizes = dict(stated)
    width = sizes["hidden_size"]
    if "num_attention_heads" not in sizes:
        sizes["num_attention_heads"] = max(width // sizes["head_dim"], 1)
    heads = sizes["num_attention_heads"]
    sizes.setdefault("num_key_value_heads", heads)
    sizes.setdefault("head_dim", width // heads)
    gated = shared.get("gated_mlp", True)
    sizes.setdefault("intermediate_size", -(-(8 * width // 3) // 256) * 256 if gated else 4 * width)
    if style == "gpt2":
        sizes.setdefault("num_learned_positions", 1024)
    assumed_sizes = {key: value for key, value in sizes.items() if key not in texts}
    if every := sizes.pop("full_attention_every", None):
        sizes["num_full_attention_layers"] = sizes["num_hidden_layers"] // every
    decoder = Decoder(**{**shared, **sizes})
    assumed = {key: str(value) for key, value in assumed_sizes.items()}
    if "tie_word_embeddings" not in texts:
        assumed["tie_word_embeddings"] = str(decoder.tie_word_embeddings).lower()
    if "style" not in texts:
        assumed = {"style": style, **assumed}
    return Description(decoder, tuple(f"{key}={value}" for key, value in assumed.items()))
