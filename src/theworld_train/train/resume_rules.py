"""What may differ between a run and its resumption."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from theworld_train.config import load_run_config
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig

Rule = Literal["safe", "allowed", "forbidden"]

#: `safe`: nothing changes but rounding. `allowed`: it may differ if the key is listed under
#: `allow_changed`. `forbidden`: the checkpoint does not fit. The longest prefix of a key decides.
RULES: dict[str, Rule] = {
    "name": "safe",
    "output_dir": "safe",
    "seed": "forbidden",
    "precision": "allowed",
    "deterministic": "safe",
    # Weights are compared by their digests, wherever they are.
    "model": "safe",
    "model.attention": "allowed",
    "model.world": "forbidden",
    "model.world.encoder": "safe",
    "model.world.encoder_revision": "safe",
    "model.world.encoder_dtype": "allowed",
    "trainable": "forbidden",
    "trainable.*.lr": "allowed",
    "trainable.*.weight_decay": "allowed",
    "trainable.*.dropout": "allowed",
    "trainable.*.alpha": "allowed",
    "expect_trainable": "safe",
    "data": "safe",
    "data.train": "forbidden",
    "data.train.path": "allowed",
    "data.train.media_root": "allowed",
    "data.train.id": "allowed",
    "data.train.revision": "allowed",
    "data.world": "forbidden",
    "data.max_sequence_length": "allowed",
    "data.too_long": "allowed",
    "data.exclude": "allowed",
    "optimizer": "allowed",
    "optimizer.name": "forbidden",
    "schedule": "allowed",
    "training": "allowed",
    # Where the run ends: the steps up to there stay as they are.
    "training.advance_when": "safe",
    "training.stop_when": "safe",
    "training.global_batch_size": "forbidden",
    "training.micro_batch_size": "safe",
    "training.batching": "safe",
    "training.gradient_checkpointing": "safe",
    "training.activation_offload": "safe",
    "training.loss_chunk_size": "safe",
    "training.max_skipped_steps": "safe",
    "training.verify_freezing": "safe",
    "evaluation": "safe",
    "checkpoint": "safe",
    "tracking": "safe",
    "runtime": "safe",
    "resume": "safe",
    "init_from": "safe",
    "allow_changed": "safe",
}

_ABSENT = "absent"


def rule_of(key: str) -> Rule:
    """Returns the rule of a dotted key; `*` stands for a component.

    Raises:
        KeyError: If no rule covers it.
    """
    # A part of a mixture holds a source as `data.train` does.
    parts = re.sub(r"^data\.train\.parts\..+?\.data\.", "data.train.", key).split(".")
    for number in range(len(parts), 0, -1):
        exact, general = ".".join(parts[:number]), ".".join([*parts[:1], "*", *parts[2:number]])
        if exact in RULES:
            return RULES[exact]
        if number > 1 and general in RULES:
            return RULES[general]
    raise KeyError(key)


@dataclass(frozen=True)
class Change:
    """A key of a config that has another value now.

    Attributes:
        key: Dotted key.
        then: Its value when the run directory was written.
        now: Its value now.
        rule: Whether it may differ.
    """

    key: str
    then: object
    now: object
    rule: Rule


def changed_keys(now: RunConfig, then: RunConfig) -> list[Change]:
    """Returns the keys in which two configs of a run differ."""
    ours, theirs = _flat(now.model_dump(mode="json")), _flat(then.model_dump(mode="json"))
    return [
        Change(key, theirs.get(key, _ABSENT), ours.get(key, _ABSENT), rule_of(key))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key, _ABSENT) != theirs.get(key, _ABSENT)
    ]


def check_changes(config: RunConfig, checkpoint: Path) -> None:
    """Compares a run's config with the one that its checkpoint was written under.

    Args:
        config: The run config now.
        checkpoint: The run's checkpoint.

    Raises:
        ConfigError: With every key that may not differ, or only if it is allowed by name, and both values.
    """
    problems = []
    for change in changed_keys(config, load_run_config(checkpoint / "config.yaml")):
        if change.rule == "safe" or (change.rule == "allowed" and change.key in config.allow_changed):
            continue
        hint = (
            f"list {change.key} under allow_changed to go on with the new value"
            if change.rule == "allowed"
            else "put the value back, or begin a new run with init_from"
        )
        message = f"was {change.then!r} up to {checkpoint.name} and is {change.now!r} now"
        problems.append(Problem(message, key=change.key, hint=hint))
    if problems:
        raise ConfigError(problems)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{prefix}{key}": {}} if not value else _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
