"""The world projector: from latents to embeddings of the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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

    def forward(self, latents: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Projects the latent frames of world blocks, each of which ends in the present.

        Args:
            latents: `(frames of all blocks, channels, height, width)`, normalised.
            counts: Latent frames of each block.

        Returns:
            Embeddings `(frames, tokens, hidden)`, and those of the tokens that open and close a block, `(2, hidden)`.

        Raises:
            ValueError: If a block reaches further back than the temporal embedding.
        """
        longest = max(counts, default=1)
        if longest - 1 > self.max_world_steps:
            raise ValueError(
                f"a world block of {longest} latent frames reaches {longest - 1} steps from the present, but the model "
                f"was built with max_world_steps={self.max_world_steps}"
            )
        tokens = latents.flatten(2)
        if self.layout == "spatial":
            tokens = tokens.transpose(1, 2)
        projected = self.projection(tokens.to(self.temporal.dtype)).float()
        normed = projected * torch.rsqrt(projected.pow(2).mean(-1, keepdim=True) + 1e-6)
        index = [self.max_world_steps + 1 - count + frame for count in counts for frame in range(count)]
        temporal = self.temporal[torch.tensor(index, device=latents.device)].unsqueeze(1)
        return (normed + temporal) * self.scale, self.boundary * self.scale
