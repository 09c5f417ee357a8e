"""The configuration of TheWorld: Gemma 3's, and how the world path is built onto it."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Gemma3Config

from theworld_train.accounting.tokens import SPATIAL_COMPRESSION, world_features, world_tokens_per_frame


@strict
class TheWorldConfig(Gemma3Config):
    """Configuration of `TheWorldForConditionalGeneration`.

    The ids of the three world tokens are spare rows of Gemma's embedding, directly behind the image placeholder, which
    is the last token of its tokenizer: nothing is resized and no tie is broken.

    Attributes:
        enable_world: Whether the model has a world path; without it the model is plain Gemma 3.
        world_encoder_config: The VAE's own config (`AutoencoderKLWan`), without its decoder's weights.
        world_projection: `linear` or `mlp`.
        world_tokens: `spatial` (a token for each latent cell) or `channel` (a token for each latent channel).
        world_resolution: Side in pixels of the square that frames are fitted to.
        world_resize: `pad`, `crop` or `stretch`.
        world_pool: Latents are averaged over squares of so many cells a side before projection; 1, 2 or 4.
        max_world_steps: Largest distance from the present in latent frames.
        world_embedding_rms: RMS that projected tokens are scaled to: that of the base's text embeddings, measured once.
    """

    model_type = "theworld"

    enable_world: bool = True
    world_encoder_config: dict[str, Any] | None = None
    world_projection: str = "mlp"
    world_tokens: str = "spatial"
    world_resolution: int = 512
    world_resize: str = "pad"
    world_pool: int = 1
    max_world_steps: int = 4
    world_embedding_rms: float = 1.0

    @property
    def start_of_world_token_id(self) -> int:
        """Id of the token that opens a world block."""
        assert self.image_token_index is not None, "Gemma 3 reads images, so its config names their placeholder"
        return self.image_token_index + 1

    @property
    def world_token_id(self) -> int:
        """Id of the placeholder that a projected latent replaces."""
        return self.start_of_world_token_id + 1

    @property
    def end_of_world_token_id(self) -> int:
        """Id of the token that closes a world block."""
        return self.start_of_world_token_id + 2

    @property
    def world_token_ids(self) -> tuple[int, int, int]:
        """The three ids that exist only on the input side and are never generated."""
        return self.start_of_world_token_id, self.world_token_id, self.end_of_world_token_id

    @property
    def world_latent_channels(self) -> int:
        """Channels of the VAE's latents, 16 for Wan 2.1."""
        return int((self.world_encoder_config or {}).get("z_dim", 16))

    @property
    def world_tokens_per_frame(self) -> int:
        """World tokens of one latent frame."""
        layout: Any = self.world_tokens
        return world_tokens_per_frame(layout, self.world_resolution, self.world_latent_channels, pool=self.world_pool)

    @property
    def world_features(self) -> int:
        """Input features of the projection."""
        layout: Any = self.world_tokens
        return world_features(layout, self.world_resolution, self.world_latent_channels, pool=self.world_pool)

    def validate_world(self) -> None:
        """Checks the world path's fields; called on construction by the strict dataclass.

        Raises:
            ValueError: If a field has no meaning.
        """
        for name, value, known in (
            ("world_projection", self.world_projection, ("linear", "mlp")),
            ("world_tokens", self.world_tokens, ("spatial", "channel")),
            ("world_resize", self.world_resize, ("pad", "crop", "stretch")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        check_pool(self.world_pool, self.world_resolution)
        if self.world_resolution <= 0 or self.world_resolution % SPATIAL_COMPRESSION:
            raise ValueError(
                f"world_resolution must be a multiple of {SPATIAL_COMPRESSION}, got {self.world_resolution}"
            )


def check_pool(pool: int, resolution: int) -> None:
    """Refuses squares of other sides than 1, 2 and 4 cells, or that do not fill a frame.

    Raises:
        ValueError: If so.
    """
    if pool not in (1, 2, 4) or resolution // SPATIAL_COMPRESSION % pool:
        cells = resolution // SPATIAL_COMPRESSION
        raise ValueError(f"world_pool must be 1, 2 or 4 and divide {cells} latent cells a side, got {pool}")


__all__ = ["TheWorldConfig"]
