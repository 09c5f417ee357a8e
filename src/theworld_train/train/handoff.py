"""Hand-off: what a run takes from a checkpoint, its own or an earlier stage's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.model.components import component_parameters
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.model.pretrained import COMPONENTS_FILE, load_components
from theworld_train.train.checkpoint import STATE_FILE, Base, Carried, verify_checkpoint
from theworld_train.train.digest import combined_digest


@dataclass(frozen=True)
class Inheritance:
    """What a run has taken over.

    Attributes:
        source: The checkpoint, or None for a run that starts from its bases.
        components: Component files of the checkpoint by name.
        step: Optimizer steps done, above 0 only when a run is resumed.
        rng: Random state of each rank, when a run is resumed.
    """

    source: Path | None = None
    components: dict[str, Carried] = field(default_factory=dict)
    step: int = 0
    rng: tuple[dict[str, Any], ...] = ()


def inherit(
    model: TheWorldForConditionalGeneration,
    checkpoint: Path,
    *,
    base: Base,
    encoder: Base | None,
    digests: dict[str, str],
    resume: bool,
    trainable: tuple[Component, ...],
) -> Inheritance:
    """Copies a checkpoint's components into the model and says what came from where.

    Args:
        model: Prepared by `apply_trainable`, so that masters are copied unrounded.
        checkpoint: A sealed checkpoint.
        base: The run's own base, which must be the checkpoint's.
        encoder: The run's own world encoder, likewise.
        digests: What `base_digests` found in the run's bases.
        resume: Whether the run itself is continued, rather than a new stage begun.
        trainable: Components that the run trains.

    Raises:
        ConfigError: If the checkpoint is damaged, builds on other bases, or its model has another shape.
    """
    verify_checkpoint(checkpoint)
    record = json.loads((checkpoint / COMPONENTS_FILE).read_text())
    for kind, own in (("base", base), ("encoder", encoder)):
        theirs = record[kind]
        if own is not None and theirs is not None and (theirs["id"], theirs["revision"]) != (own.id, own.revision):
            raise ConfigError(
                f"{checkpoint} builds on the {kind} {theirs['id']!r} (revision {theirs['revision']}), but this run on "
                f"{own.id!r} (revision {own.revision})"
            )
    theirs = record["base_digests"]
    if changed := [name for name in digests if theirs.get(name, digests[name]) != digests[name]]:
        raise ConfigError(
            f"{checkpoint} was trained on other weights of {', '.join(changed)} than those that {base.id} holds now"
        )
    _adopt_scale(model, checkpoint)
    load_components(model, checkpoint)
    state = json.loads((checkpoint / STATE_FILE).read_text())
    carried = {
        name: Carried(checkpoint / entry["file"], entry["sha256"], entry["trained_by"])
        for name, entry in record["components"].items()
    }
    if resume and (missing := [component.value for component in trainable if component.value not in carried]):
        raise ConfigError(f"{checkpoint} was saved by a run that does not train {', '.join(missing)}; use init_from")
    return Inheritance(
        source=checkpoint,
        components=carried,
        step=state["step"] if resume else 0,
        rng=tuple(state["rng"]) if resume else (),
    )


def _adopt_scale(model: TheWorldForConditionalGeneration, checkpoint: Path) -> None:
    """Takes over the scale of world tokens, which stays constant along a chain, and compares the world path's shape."""
    if not model.config.enable_world:
        return
    theirs = json.loads((checkpoint / "config.json").read_text())
    fields = ("world_projection", "world_tokens", "world_resolution", "world_resize", "max_world_steps")
    different = [
        name for name in fields if theirs.get(name, getattr(model.config, name)) != getattr(model.config, name)
    ]
    if different:
        listed = ", ".join(
            f"{name} {theirs[name]!r} there and {getattr(model.config, name)!r} here" for name in different
        )
        raise ConfigError(f"the world path of {checkpoint} has another shape: {listed}")
    from theworld_train.model.pretrained import set_embedding_scale

    set_embedding_scale(model, theirs["world_embedding_rms"])


def base_digests(model: TheWorldForConditionalGeneration) -> dict[str, str]:
    """Returns the digest of each component as its base holds it; the world projector has no base."""
    return {
        component.value: combined_digest(dict(parameters))
        for component, parameters in component_parameters(model).items()
        if component is not Component.WORLD_PROJECTOR
    }
