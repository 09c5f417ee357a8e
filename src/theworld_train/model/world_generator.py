"""The world generator: Cosmos-Predict2's diffusion pipeline, from a picture and a prompt to normalised latents."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from diffusers import (
    AutoencoderKLWan,
    Cosmos2VideoToWorldPipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.transformers import transformer_cosmos as transformer_module
from diffusers.pipelines.cosmos import pipeline_cosmos2_video2world as pipeline_module
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from theworld_train.accounting.tokens import clip_frames
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.rollout import RolloutRules
from theworld_train.model.digest import combined_digest
from theworld_train.model.processing import fit_frame, frames_to_pixels
from theworld_train.model.world_encoder import WorldEncoder, difference_from_wan, vae_config

#: Modules of diffusers that hold more than they export.
_VIDEO2WORLD: Any = pipeline_module
_TRANSFORMER: Any = transformer_module
#: Configuration key that names the pipeline, for errors.
KEY = "data.world.rollout.pipeline"
#: The pipeline whose parts are described here, so that it can be planned without its files.
BUILT_IN = "nvidia/Cosmos-Predict2-2B-Video2World"
#: Its transformer: diffusers' conversion script, "Cosmos-2.0-Diffusion-2B-Video2World".
_PREDICT2_2B: dict[str, Any] = {
    "in_channels": 17,
    "out_channels": 16,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 28,
    "mlp_ratio": 4.0,
    "text_embed_dim": 1024,
    "adaln_lora_dim": 256,
    "max_size": (128, 240, 240),
    "patch_size": (1, 2, 2),
    "rope_scale": (1.0, 3.0, 3.0),
    "concat_padding_mask": True,
    "extra_pos_embed_type": None,
}
#: Its text encoder: the encoder of google-t5/t5-11b.
_T5_11B: dict[str, Any] = {
    "vocab_size": 32_128,
    "d_model": 1024,
    "d_kv": 128,
    "d_ff": 65_536,
    "num_layers": 24,
    "num_heads": 128,
}
#: A transformer with fewer parameters may go without a guardrail: none of NVIDIA's is that small.
TINY_PARAMETERS = 10_000_000
#: What fetches the guardrail's own models.
FETCH_GUARDRAIL = 'python -c "from cosmos_guardrail import CosmosSafetyChecker; CosmosSafetyChecker()"'
#: Tokens of a prompt at most; the pipeline's own default.
PROMPT_TOKENS = 512


class UnsafeRolloutError(Exception):
    """Raised when the guardrail refuses a prompt, or what was generated from it."""


class Guardrail(Protocol):
    """What checks prompts and frames; `CosmosSafetyChecker` of the package `cosmos_guardrail` has this form."""

    def check_text_safety(self, prompt: str) -> bool:
        """Whether a prompt may be used."""
        ...

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray | None:
        """Returns `(frames, height, width, 3)` uint8 as they may be kept, or None if they may not."""
        ...

    def to(self, device: torch.device) -> object:
        """Moves its models."""
        ...


class NoGuardrail:
    """Lets everything pass; for tiny pipelines alone."""

    def check_text_safety(self, prompt: str) -> bool:
        """Lets a prompt pass."""
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        """Returns the frames as they are."""
        return frames

    def to(self, device: torch.device) -> NoGuardrail:
        """Has nothing to move."""
        return self


@dataclass(frozen=True)
class Prompt:
    """A prompt as the transformer sees it: `(1, tokens, features)` of it and of the negative prompt, on the host."""

    positive: Tensor
    negative: Tensor


def noise_seed(seed: int, digest: str) -> int:
    """Returns the seed of one generation, 63 bits, from the run's and the digest of picture and prompt."""
    return xxhash.xxh3_64(f"{seed}:{digest}".encode()).intdigest() >> 1


@dataclass(frozen=True)
class Fit:
    """How a model's world frames are fitted: to a square of `side` pixels, by the rule `resize`."""

    side: int
    resize: str


class WorldGenerator:
    """Continues pictures; on a GPU its text encoder and its transformer take turns, so that it holds one at a time."""

    def __init__(
        self,
        pipeline: Any,  # noqa: ANN401 (a Cosmos2VideoToWorldPipeline; diffusers sets its parts when it runs)
        rules: RolloutRules,
        device: torch.device,
    ) -> None:
        """Takes a loaded pipeline.

        Args:
            pipeline: A `Cosmos2VideoToWorldPipeline` with its guardrail, on the host.
            rules: How it is asked.
            device: Where it computes.
        """
        pipeline.set_progress_bar_config(disable=True)
        if device.type != "cpu":
            pipeline.enable_model_cpu_offload(device=device)
        self._pipeline, self._rules, self._device = pipeline, rules, device
        self._guardrail: Guardrail = pipeline.safety_checker
        self._negative: Tensor | None = None
        self._compared: tuple[WorldEncoder, bool] | None = None

    def weights_digest(self) -> str:
        """Returns a digest of the pipeline's parts: weights and configs, scheduler and tokenizer; not of its name."""
        parts = {name: getattr(self._pipeline, name) for name in ("text_encoder", "transformer", "vae")}
        tensors = {f"{p}.{n}": t for p, module in parts.items() for n, t in module.state_dict().items()}
        configs = {name: _stated(getattr(self._pipeline, name).config) for name in ("transformer", "vae", "scheduler")}
        configs["text_encoder"] = _stated(parts["text_encoder"].config.to_diff_dict())
        configs["tokenizer"] = json.loads(self._pipeline.tokenizer.backend_tokenizer.to_str())
        written = json.dumps(configs, sort_keys=True, default=list)
        return str(xxhash.xxh3_128(f"{combined_digest(tensors)} {written}".encode()).hexdigest())

    def encode_prompts(self, prompts: Iterable[str]) -> dict[str, Prompt | None]:
        """Encodes each distinct prompt once; None where the guardrail refuses it."""
        wanted = dict.fromkeys(prompts)
        if not wanted:
            return {}
        negative = self._rules.negative_prompt
        texts = [_VIDEO2WORLD.DEFAULT_NEGATIVE_PROMPT if negative is None else negative, *wanted]
        self._guardrail.to(self._device)
        safe = [self._guardrail.check_text_safety(text) for text in texts]
        self._guardrail.to(torch.device("cpu"))
        if not safe[0]:
            raise ConfigError(
                Problem("the guardrail refuses it", key="data.world.rollout.negative_prompt", value=texts[0])
            )
        if self._negative is None:
            self._negative = self._embed(texts[0])
        encoded = {
            text: Prompt(self._embed(text), self._negative) if passed else None
            for text, passed in zip(texts[1:], safe[1:], strict=True)
        }
        self._pipeline.maybe_free_model_hooks()  # the text encoder leaves the device, before the VAE comes
        return encoded

    @torch.no_grad()
    def latents(
        self, picture: Image.Image, prompt: Prompt, seed: int, steps: int, encoder: WorldEncoder, fit: Fit
    ) -> Tensor:
        """Returns the latents of a picture and of what follows it.

        Args:
            picture: The present.
            prompt: What is to happen.
            seed: Of the noise; it is drawn on the host, so that it is the same on every device.
            steps: Latent frames to keep besides the present.
            encoder: The world encoder of the model that the latents are for, on the device.
            fit: How the model's frames are fitted.

        Returns:
            `(1 + steps, channels, side / 8, side / 8)` in the encoder's dtype, normalised. The first is the
            encoder's own of the picture.

        Raises:
            UnsafeRolloutError: If the guardrail refuses what was generated.
        """
        own = fit_frame(picture, fit.side, fit.resize)
        alike = self._rules.height == self._rules.width == fit.side and self._encodes_as(encoder)
        latents = self._denoise(own if alike else picture, prompt, seed)[:, :, : 1 + steps]
        frames = self._decode(latents)
        allowed = self._allowed(frames)
        present = self._encode([own], encoder)
        if alike and np.array_equal(allowed, frames):
            later = latents[:, :, 1:].to(present)
        else:
            shaped = _images(allowed[1:], own.size if alike else picture.size)
            clip = [own, *(fit_frame(frame, fit.side, fit.resize) for frame in shaped)]
            later = self._encode(clip, encoder)[:, :, 1:]
        return torch.cat([present, later], dim=2)[0].transpose(0, 1)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _encodes_as(self, encoder: WorldEncoder) -> bool:
        """Whether a world encoder has the weights and statistics of the pipeline's VAE, but for rounding to a dtype."""
        if self._compared is None or self._compared[0] is not encoder:
            theirs = WorldEncoder.from_vae(self._pipeline.vae)
            self._compared = encoder, encoder.is_alike(theirs)
        return self._compared[1]

    @torch.no_grad()
    def _embed(self, text: str) -> Tensor:
        embeddings, _ = self._pipeline.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
        )
        embedded: Tensor = embeddings.cpu()
        return embedded

    def _denoise(self, picture: Image.Image, prompt: Prompt, seed: int) -> Tensor:
        """Returns normalised latents `(1, channels, latent frames, height / 8, width / 8)` on the device."""
        rules = self._rules
        with without_torchvision():
            latents: Tensor = self._pipeline(
                image=picture,
                prompt_embeds=prompt.positive.to(self._device),
                negative_prompt_embeds=prompt.negative.to(self._device),
                height=rules.height,
                width=rules.width,
                num_frames=rules.num_frames,
                num_inference_steps=rules.num_inference_steps,
                guidance_scale=rules.guidance_scale,
                fps=rules.fps,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
            ).frames
        return latents / float(self._pipeline.scheduler.config.sigma_data)

    def _decode(self, latents: Tensor) -> np.ndarray:
        """Returns frames `(1 + 4k, height, width, 3)` uint8: the VAE is causal, the first need no later ones."""
        vae = self._pipeline.vae
        mean, std = (
            torch.tensor(values, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        pixels = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        assert pixels.shape[2] == clip_frames(latents.shape[2])
        scaled = pixels[0].float().clamp(-1, 1).add(1).mul(127.5).round()
        frames: np.ndarray = scaled.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
        return frames

    def _allowed(self, frames: np.ndarray) -> np.ndarray:
        self._guardrail.to(self._device)
        allowed = self._guardrail.check_video_safety(frames)
        self._guardrail.to(torch.device("cpu"))
        if allowed is None:
            raise UnsafeRolloutError("the guardrail refuses what was generated")
        return allowed

    def _encode(self, frames: list[Image.Image], encoder: WorldEncoder) -> Tensor:
        return encoder.encode(frames_to_pixels(frames).transpose(0, 1)[None].to(self._device))


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the config of a part states, without what libraries note in it and without their defaults."""
    noted = {"transformers_version", "dtype", "architectures", *config.get("_use_default_values", ())}
    return {name: value for name, value in config.items() if name not in noted and not name.startswith("_")}


def _images(frames: np.ndarray, size: tuple[int, int]) -> list[Image.Image]:
    images = [Image.fromarray(frame) for frame in frames]
    return [image if image.size == size else image.resize(size, Image.Resampling.BICUBIC) for image in images]


def load_generator(rules: RolloutRules, device: torch.device, guardrail: Guardrail | None = None) -> WorldGenerator:
    """Loads the pipeline that a config names.

    Args:
        rules: Name it.
        device: Where it will compute.
        guardrail: Checks prompts and frames instead of NVIDIA's; tiny pipelines take `NoGuardrail`.

    Raises:
        ConfigError: If it cannot be loaded, is of another kind, or needs a guardrail that is not installed.
    """
    configs = generator_configs(rules)
    if guardrail is None:
        tiny = _parameters(configs.transformer) < TINY_PARAMETERS
        guardrail = NoGuardrail() if tiny else _nvidia_guardrail(rules)
    try:
        pipeline = _assemble(rules, guardrail)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(Problem(f"the pipeline cannot be loaded: {error}", key=KEY, value=rules.pipeline)) from error
    return WorldGenerator(pipeline, rules, device)


def _assemble(rules: RolloutRules, guardrail: Guardrail) -> Cosmos2VideoToWorldPipeline:
    """Loads the parts of a pipeline, and puts them together with a guardrail, which no repository holds."""

    def load(kind: Any, name: str, **settings: Any) -> Any:  # noqa: ANN401 (classes of two libraries)
        return kind.from_pretrained(rules.pipeline, subfolder=name, revision=rules.revision or "main", **settings)

    dtype = getattr(torch, rules.dtype)
    return Cosmos2VideoToWorldPipeline(
        text_encoder=load(T5EncoderModel, "text_encoder", dtype=dtype, use_safetensors=True).eval(),
        tokenizer=load(T5Tokenizer, "tokenizer"),
        transformer=load(CosmosTransformer3DModel, "transformer", torch_dtype=dtype, use_safetensors=True).eval(),
        vae=load(AutoencoderKLWan, "vae", torch_dtype=dtype, use_safetensors=True).eval(),
        scheduler=load(FlowMatchEulerDiscreteScheduler, "scheduler"),
        safety_checker=guardrail,
    )


@dataclass(frozen=True)
class GeneratorConfigs:
    """What the parts of a pipeline look like, as diffusers and transformers write it."""

    transformer: Mapping[str, Any]
    text_encoder: T5Config
    vae: Mapping[str, Any]


def generator_configs(rules: RolloutRules) -> GeneratorConfigs:
    """Reads the configs of a pipeline's parts, without any weights; NVIDIA's 2B pipeline needs no files.

    Raises:
        ConfigError: If there are none, or the pipeline is of another kind.
    """
    if rules.pipeline == BUILT_IN and not _is_here(rules):
        return GeneratorConfigs(_PREDICT2_2B, T5Config(**_T5_11B), vae_config())
    where = {"revision": rules.revision}
    try:
        index = dict(Cosmos2VideoToWorldPipeline.load_config(rules.pipeline, **where))
        configs = GeneratorConfigs(
            dict(CosmosTransformer3DModel.load_config(rules.pipeline, subfolder="transformer", **where)),
            T5Config.from_pretrained(rules.pipeline, subfolder="text_encoder", revision=rules.revision or "main"),
            dict(AutoencoderKLWan.load_config(rules.pipeline, subfolder="vae", **where)),
        )
    except (OSError, ValueError) as error:  # the hub refuses a name that is no repository with a ValueError
        hint = "name a pipeline in the hub's layout, or run `theworld-train fetch CONFIG` first"
        message = f"the configs of its parts cannot be read: {error}"
        raise ConfigError(Problem(message, key=KEY, value=rules.pipeline, hint=hint)) from error
    kind, expected = index.get("_class_name"), Cosmos2VideoToWorldPipeline.__name__
    difference = f"is a {kind}, expected a {expected}" if kind != expected else None
    if difference is None and (found := difference_from_wan(configs.vae)):
        difference = f"its VAE is not the one of Wan 2.1 that Cosmos-Predict2 uses: {found}"
    if difference is not None:
        raise ConfigError(Problem(difference, key=KEY, value=rules.pipeline))
    return configs


def _is_here(rules: RolloutRules) -> bool:
    found = try_to_load_from_cache(rules.pipeline, "model_index.json", revision=rules.revision)
    return Path(rules.pipeline).is_dir() or isinstance(found, str)


def _parameters(config: Mapping[str, Any]) -> int:
    with torch.device("meta"):
        transformer = CosmosTransformer3DModel.from_config(dict(config))
    return sum(parameter.numel() for parameter in transformer.parameters())


def _nvidia_guardrail(rules: RolloutRules) -> Guardrail:
    """Loads NVIDIA's guardrail.

    Raises:
        ConfigError: If its package is not installed, or its models are not there.
    """
    if importlib.util.find_spec("cosmos_guardrail") is None:
        message = "its licence asks for NVIDIA's guardrail, and the package cosmos_guardrail is not installed"
        raise ConfigError(Problem(message, key=KEY, value=rules.pipeline, hint="pip install cosmos_guardrail"))
    try:
        checker: Guardrail = _VIDEO2WORLD.CosmosSafetyChecker()
    except (OSError, ValueError, ImportError) as error:
        message = f"NVIDIA's guardrail cannot be loaded: {error}"
        hint = f"it fetches models of its own: run once with network: {FETCH_GUARDRAIL}"
        raise ConfigError(Problem(message, key=KEY, value=rules.pipeline, hint=hint)) from error
    return checker


@contextmanager
def without_torchvision() -> Generator[None]:
    """Stands in for torchvision, where it is missing, while the context is open.

    Diffusers' transformer asks it for one thing: to resize its padding mask to the next neighbours.
    """
    if hasattr(_TRANSFORMER, "transforms"):
        yield
        return
    _TRANSFORMER.transforms = _RESIZING
    try:
        yield
    finally:
        del _TRANSFORMER.transforms


def _resize_nearest(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
    return functional.interpolate(mask, size=size, mode=interpolation)


_RESIZING = SimpleNamespace(
    functional=SimpleNamespace(resize=_resize_nearest), InterpolationMode=SimpleNamespace(NEAREST="nearest")
)
