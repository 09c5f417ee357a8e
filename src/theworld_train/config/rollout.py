"""The settings of generated futures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from theworld_train.config.section import PositiveFloat, PositiveInt, Repository, Section, Seed

#: What stands for the user's first words in a prompt.
QUESTION = "{question}"


class RolloutRules(Section):
    """Which pipeline generates futures, and how it is asked; what was made by other rules is stale."""

    pipeline: Repository = "nvidia/Cosmos-Predict2-2B-Video2World"
    """Hub id or directory of a Cosmos-Predict2 Video2World pipeline in diffusers' layout."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the pipeline."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of its weights and of what it computes."""
    prompt: Annotated[str, Field(min_length=1)] = QUESTION
    """What is to happen; `{question}` stands for the first text of the user."""
    negative_prompt: str | None = None
    """What is not wanted; diffusers' own text if absent."""
    height: PositiveInt = 704
    """Pixels of a generated frame, a multiple of 16; other sizes than 704 x 1280 are not what the model knows."""
    width: PositiveInt = 1280
    """Pixels of a generated frame, a multiple of 16."""
    num_frames: PositiveInt = 93
    """Generated frames, 1 + 4k, the picture being the first; the model knows 93."""
    num_inference_steps: PositiveInt = 35
    """Denoising steps."""
    guidance_scale: PositiveFloat = 7.0
    """Weight of the prompt against the negative one; up to 1 the negative prompt is left out, and half of the time."""
    fps: PositiveInt = 16
    """Frames a second of what is generated."""
    seed: Seed = 0
    """Seed of the noise, together with picture and prompt."""

    @model_validator(mode="after")
    def _check_geometry(self) -> RolloutRules:
        if self.height % 16 or self.width % 16:
            raise ValueError(f"height and width must be multiples of 16, got {self.height} x {self.width}")
        if self.num_frames < 5 or (self.num_frames - 1) % 4:
            raise ValueError(
                f"num_frames must be 1 + 4k and at least 5, as the VAE compresses time by 4, got {self.num_frames}"
            )
        return self

    def prompt_for(self, question: str) -> str:
        """Returns the prompt of a picture about which a question is asked."""
        return self.prompt.replace(QUESTION, question)
