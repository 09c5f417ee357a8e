"""The names of the model's components: the one vocabulary that configs, freezing, the ledger and checkpoints share."""

from __future__ import annotations

from enum import StrEnum


class Component(StrEnum):
    """A part of TheWorld that a stage trains or freezes as a whole.

    Every parameter of the model belongs to exactly one component. The language model owns the token embedding; Gemma's
    `lm_head` is tied to it and is therefore no component of its own.
    """

    VISION_TOWER = "vision_tower"
    MULTI_MODAL_PROJECTOR = "multi_modal_projector"
    LANGUAGE_MODEL = "language_model"
    WORLD_ENCODER = "world_encoder"
    WORLD_PROJECTOR = "world_projector"


#: Names that users of related code bases reach for, and what to write instead.
COMPONENT_HINTS: dict[str, str] = {
    "lm_head": "Gemma's lm_head is tied to the token embedding and is trained with 'language_model'",
    "embed_tokens": "the token embedding is part of 'language_model'",
    "gemma": "name 'vision_tower', 'multi_modal_projector' and 'language_model' one by one",
    "vision": "the component is called 'vision_tower'",
    "vision_encoder": "the component is called 'vision_tower'",
    "llm": "the component is called 'language_model'",
    "projector": "name 'multi_modal_projector' (images) or 'world_projector' (world tokens)",
    "projection": "the projection of world latents is part of 'world_projector'",
    "temporal_embedding": "the temporal embedding is part of 'world_projector'",
    "vae": "the VAE's encoder is called 'world_encoder'; its decoder is not kept",
    "cosmos": "the VAE's encoder is called 'world_encoder'",
}
