"""Hand-off: what a run takes from a checkpoint, its own or an earlier stage's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from theworld_train.checkpoint_files import (
    COMPONENTS_FILE,
    STATE_FILE,
    Origin,
    origin_of,
    read_record,
    recorded_origin,
    verify_checkpoint,
)
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.model.configuration import TheWorldConfig
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.model.pretrained import load_components, set_embedding_scale
from theworld_train.train.checkpoint import Base, Carried

_WORLD_SHAPE = ("world_projection", "world_tokens", "world_resolution", "world_resize", "world_pool", "max_world_steps")


@dataclass(frozen=True)
class Inheritance:
    """What a run has taken over.

    Attributes:
        source: The checkpoint, or None for a run that starts from its bases.
        origin: The checkpoint that the run's first weights came from: `source`, unless the run is resumed.
        components: Component files of the checkpoint by name.
        encoder: The world encoder that the checkpoint builds on; a stage without a world path hands it on.
        digests: The checkpoint's digests of the bases, likewise.
        step: Optimizer steps done, above 0 only when a run is resumed.
        rng: Random state of each rank, when a run is resumed.
        gates: What the run's gates had seen, likewise.
    """

    source: Path | None = None
    origin: Origin | None = None
    components: dict[str, Carried] = field(default_factory=dict)
    encoder: Base | None = None
    digests: dict[str, str] = field(default_factory=dict)
    step: int = 0
    rng: tuple[dict[str, Any], ...] = ()
    gates: dict[str, Any] = field(default_factory=dict)


def inherit(
    model: TheWorldForConditionalGeneration,
    checkpoint: Path,
    *,
    base: Base,
    encoder: Base | None,
    digests: dict[str, str],
    resume: bool,
    trained: tuple[str, ...],
) -> Inheritance:
    """Copies a checkpoint's components into the model and says what came from where.

    Args:
        model: Prepared by `apply_trainable`, so that masters are copied unrounded.
        checkpoint: A sealed checkpoint.
        base: The run's own base, which must be the checkpoint's.
        encoder: The run's own world encoder, likewise.
        digests: What `base_digests` found in the run's bases.
        resume: Whether the run itself is continued, rather than a new stage begun.
        trained: Components, and adapters of components, that the run trains.

    Raises:
        ConfigError: If the checkpoint is damaged, builds on other bases, or its model has another shape.
    """
    verify_checkpoint(checkpoint)
    record, state = read_record(checkpoint / COMPONENTS_FILE), read_record(checkpoint / STATE_FILE)
    recorded = record["base_digests"]
    if changed := [name for name in digests if recorded.get(name, digests[name]) != digests[name]]:
        # Names do not matter: a base may have moved, or have changed where it is.
        theirs, ours = (
            " and ".join(str(part) for part in parts if part)
            for parts in (
                [Base(**record[kind]) for kind in ("base", "encoder") if record[kind]],
                (base, encoder),
            )
        )
        raise ConfigError(
            f"{checkpoint} was trained on other weights of {', '.join(changed)}, those of {theirs}, "
            f"than this run loads from {ours}"
        )
    if Component.WORLD_PROJECTOR in record["components"]:
        _adopt_world(model, checkpoint)
    load_components(model, checkpoint)
    carried = {
        name: Carried(checkpoint / entry["file"], entry["sha256"], entry["trained_by"])
        for name, entry in record["components"].items()
    }
    if resume and (missing := [name for name in trained if name not in carried]):
        raise ConfigError(f"{checkpoint} was saved by a run that does not train {', '.join(missing)}; use init_from")
    return Inheritance(
        source=checkpoint,
        origin=recorded_origin(record) if resume else origin_of(checkpoint),
        components=carried,
        encoder=Base(**record["encoder"]) if record["encoder"] else None,
        digests=recorded,
        step=state["step"] if resume else 0,
        rng=tuple(state["rng"]) if resume else (),
        # Those of an earlier version hold none: its gates begin anew.
        gates=state.get("gates", {}) if resume else {},
    )


def _adopt_world(model: TheWorldForConditionalGeneration, checkpoint: Path) -> None:
    """Takes over the scale of world tokens, which stays constant along a chain, and compares the world path's shape.

    A model without a world path takes over both, and so hands them on with the files of the world projector.
    """
    theirs = TheWorldConfig.from_pretrained(checkpoint)
    if not model.config.enable_world:
        for name in (*_WORLD_SHAPE, "world_embedding_rms"):
            setattr(model.config, name, getattr(theirs, name))
        return
    different = [
        f"{name} {getattr(theirs, name)!r} there and {getattr(model.config, name)!r} here"
        for name in _WORLD_SHAPE
        if getattr(theirs, name) != getattr(model.config, name)
    ]
    if different:
        raise ConfigError(f"the world path of {checkpoint} has another shape: {', '.join(different)}")
    set_embedding_scale(model, theirs.world_embedding_rms)
