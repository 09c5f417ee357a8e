"""What `accelerate launch` has been told about engines, compared field by field with the run config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.data import accumulation_steps
from theworld_train.train.engine import deepspeed_settings

#: Variables by which `accelerate launch` asks for an engine, for precision or for compilation, and that Accelerate,
#: transformers and DeepSpeed read later.
PREFIXES = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_DEEPSPEED_",
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_GRADIENT_",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_FP8_",
    "FSDP_",
    "MEGATRON_LM_",
    "PARALLELISM_CONFIG_",
)
#: What problems call the place that the variables come from.
SOURCE = "accelerate launch"
#: Values that leave a field of DeepSpeed's to the trainer.
UNSET = ("auto", "none", None)
#: Devices of optimizer state and weights for each `runtime.offload`.
OFFLOAD_DEVICES = {"none": ("none", "none"), "optimizer": ("cpu", "none"), "all": ("cpu", "cpu")}
#: What Accelerate calls sharding layer by layer, as the engine does.
LAYERWISE = "TRANSFORMER_BASED_WRAP"


def take_over(config: RunConfig, environment: MutableMapping[str, str]) -> None:
    """Checks what `accelerate launch` has been told against a run config, and takes it out of the environment.

    What agrees is ours to carry out: the trainer makes its engine from the run config, and nothing may make another.

    Args:
        config: The run config.
        environment: The variables of this process; those of engines are removed.

    Raises:
        ConfigError: With every contradiction, each with both values.
    """
    problems = list(_contradictions(config, environment))
    if problems:
        raise ConfigError(problems)
    for name in [name for name in environment if name.startswith(PREFIXES)]:
        del environment[name]


def _contradictions(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    deepspeed, fsdp = _is_set(environment, "ACCELERATE_USE_DEEPSPEED"), _is_set(environment, "ACCELERATE_USE_FSDP")
    if _is_set(environment, "ACCELERATE_USE_MEGATRON_LM"):
        yield _problem("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM", "runtime.strategy", config.runtime.strategy)
    if deepspeed:
        yield from _deepspeed(config, environment)
    elif fsdp:
        yield from _fsdp(config, environment)
    if _is_set(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        yield from _parallelism(config, environment)
    yield from _steps(config, environment)


def _deepspeed(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Compares DeepSpeed's fields, and those of the JSON file that may be named in their place."""
    runtime = config.runtime
    named = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if named not in UNSET:
        yield from _deepspeed_file(config, named, environment)
        return
    # What is not passed, Accelerate sets to this.
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    asked = "ddp" if stage == "0" else f"zero{stage}"
    if asked != runtime.strategy:
        yield _problem("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage, "runtime.strategy", runtime.strategy)
    for part, expected in zip(("OPTIMIZER", "PARAM"), OFFLOAD_DEVICES[runtime.offload], strict=True):
        variable = f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE"
        if (device := environment.get(variable, "none")) != expected:
            yield _problem(variable, device, "runtime.offload", runtime.offload)


def _deepspeed_file(config: RunConfig, named: str, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Compares every field of a DeepSpeed config with the one that the trainer makes."""
    try:
        asked = json.loads(Path(named).read_text())
        assert isinstance(asked, dict)
    except (OSError, ValueError, AssertionError) as error:
        yield Problem(f"cannot be read as DeepSpeed's config: {error}", source=named)
        return
    if not config.runtime.strategy.startswith("zero"):
        yield _problem("ACCELERATE_DEEPSPEED_CONFIG_FILE", named, "runtime.strategy", config.runtime.strategy)
        return
    ours = _flat(deepspeed_settings(config, _accumulation(config, environment)))
    for key, value in _flat(asked).items():
        if value in UNSET or value == ours.get(key, False):
            continue
        made = f"asks for {ours[key]!r}" if key in ours else "has no such setting"
        yield Problem(f"the run config {made}", named, key, value, "leave the field, or the whole file, out")


def _fsdp(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Compares FSDP's fields; what concerns loading and saving is none of the engine's here, and only removed."""
    runtime, version = config.runtime, environment.get("FSDP_VERSION", "1")
    if version != "2" or runtime.strategy != "fsdp2":
        yield _problem("FSDP_VERSION", version, "runtime.strategy", runtime.strategy)
        return
    if (offload := environment.get("FSDP_OFFLOAD_PARAMS", "false")) != str(runtime.offload == "all").lower():
        yield _problem("FSDP_OFFLOAD_PARAMS", offload, "runtime.offload", runtime.offload)
    for variable, expected in (("FSDP_RESHARD_AFTER_FORWARD", "true"), ("FSDP_AUTO_WRAP_POLICY", LAYERWISE)):
        if (asked := environment.get(variable, expected)).lower() != expected.lower():
            yield _problem(variable, asked, "runtime.strategy", f"fsdp2, which is {expected}")
    checkpointing = config.training.gradient_checkpointing.language_model
    if environment.get("FSDP_ACTIVATION_CHECKPOINTING", "false") == "true" and checkpointing == "none":
        yield _problem("FSDP_ACTIVATION_CHECKPOINTING", "true", "training.gradient_checkpointing", checkpointing)


def _parallelism(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Compares the sizes of the mesh of ranks: replicas and shards, and nothing else."""
    world, local = int(environment.get("WORLD_SIZE", "1")), int(environment.get("LOCAL_WORLD_SIZE", "0"))
    replicas = world // (local or world) if config.runtime.hybrid else 1
    for name, expected in {"DP_REPLICATE": replicas, "DP_SHARD": world // replicas, "TP": 1, "CP": 1, "SP": 1}.items():
        variable = f"PARALLELISM_CONFIG_{name}_SIZE"
        if (size := environment.get(variable, str(expected))) != str(expected):
            key = "runtime.hybrid" if name.startswith("DP") else "runtime.strategy"
            ours = config.runtime.hybrid if name.startswith("DP") else config.runtime.strategy
            yield _problem(variable, size, key, ours)


def _steps(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Problem]:
    """Compares what holds for any engine; for precision, "no" is what Accelerate writes where nothing is said."""
    for variable, key, ours in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "accumulation by training.global_batch_size", _accumulation),
        ("ACCELERATE_GRADIENT_CLIPPING", "training.gradient_clip_norm", _clip_norm),
    ):
        value = environment.get(variable)
        if value not in UNSET and _number(value) != (own := ours(config, environment)):
            yield _problem(variable, value, key, own)
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", config.precision):
        yield _problem("ACCELERATE_MIXED_PRECISION", asked, "precision", config.precision)
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        yield Problem("the trainer compiles nothing", SOURCE, "ACCELERATE_DYNAMO_BACKEND", backend)


def _problem(variable: str, asked: object, key: str, ours: object) -> Problem:
    hint = "set it in the run config, and leave it out of Accelerate's or say the same there"
    return Problem(f"{asked!r} contradicts {key}: {ours!r} of the run config", SOURCE, variable, hint=hint)


def _accumulation(config: RunConfig, environment: Mapping[str, str]) -> int:
    training = config.training
    ranks = int(environment.get("WORLD_SIZE", "1"))
    return accumulation_steps(training.global_batch_size, training.micro_batch_size, ranks)


def _clip_norm(config: RunConfig, _: Mapping[str, str]) -> float:
    return config.training.gradient_clip_norm or 0.0


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _is_set(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "false").lower() in ("1", "true", "yes")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
