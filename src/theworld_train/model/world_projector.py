"""The world projector: from latents to embeddings of the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from theworld_train.model.configuration import TheWorldConfig


class WorldProjector(nn.Module):
    """Projection, temporal embedding and the two brackets of a world block.

    `projection` is followed by a parameter-free RMS norm, so that world tokens enter with the RMS of text embeddings
    (`config.world_embedding_rms`) whatever the projection's weights are. `temporal` and `boundary` are stored in units
    of that RMS, which makes their learning rate independent of the base.
    """

    def __init__(self, config: TheWorldConfig) -> None:
        """Args: config: decides layout, features, hidden size and the scale."""
        super().__init__()
        text: Any = config.text_config
        hidden = int(text.hidden_size)
        features = config.world_features
        self.layout = config.world_tokens
        self.pool = config.world_pool
        self.max_world_steps = config.max_world_steps
        self.scale = config.world_embedding_rms
        self.projection: nn.Module
        if config.world_projection == "linear":
            self.projection = nn.Linear(features, hidden)
        else:
            self.projection = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.temporal = nn.Parameter(torch.empty(2 * config.max_world_steps + 1, hidden))
        self.boundary = nn.Parameter(torch.empty(2, hidden))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws fresh values: PyTorch's defaults for the projection, a small temporal embedding, brackets like text."""
        for module in self.projection.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        nn.init.normal_(self.temporal, std=0.1)
        nn.init.normal_(self.boundary, std=1.0)

    def forward(self, latents: Tensor, counts: tuple[int, ...], offsets: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Projects the latent frames of world blocks, averaged over `pool` x `pool` cells each.

        Args:
            latents: `(frames of all blocks, channels, height, width)`, normalised.
            counts: Latent frames of each block.
            offsets: Of the first frame of each block from the present, in latent frames; if absent, every block ends
                in the present.

        Returns:
            Embeddings `(frames, tokens, hidden)`, and those of the tokens that open and close a block, `(2, hidden)`.

        Raises:
            ValueError: If a block reaches further from the present than the temporal embedding, or some lack an offset.
        """
        offsets = offsets or tuple(1 - count for count in counts)
        if len(offsets) != len(counts):
            raise ValueError(f"{len(offsets)} offsets were given for {len(counts)} world blocks")
        for count, first in zip(counts, offsets, strict=True):
            reach = max(-first, first + count - 1)
            if reach > self.max_world_steps:
                raise ValueError(
                    f"a world block of {count} latent frames reaches {reach} steps from the present, but the model was "
                    f"built with max_world_steps={self.max_world_steps}"
                )
        tokens = (latents if self.pool == 1 else functional.avg_pool2d(latents, self.pool)).flatten(2)
        if self.layout == "spatial":
            tokens = tokens.transpose(1, 2)
        projected = self.projection(tokens.to(self.temporal.dtype)).float()
        normed = projected * torch.rsqrt(projected.pow(2).mean(-1, keepdim=True) + 1e-6)
        index = [
            self.max_world_steps + first + frame
            for count, first in zip(counts, offsets, strict=True)
            for frame in range(count)
        ]
        temporal = self.temporal[torch.tensor(index, device=latents.device)].unsqueeze(1)
        return (normed + temporal) * self.scale, self.boundary * self.scale
