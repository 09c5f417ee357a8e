"""The plan of a rollout says what the parts of a pipeline hold and compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5EncoderModel

from tests.helpers.tiny import RESOLUTION, TinyCheckpoint, write_run
from theworld_train.accounting.gpus import gpu_spec
from theworld_train.config import load_run_config
from theworld_train.config.schema import RunConfig
from theworld_train.model.world_generator import PROMPT_TOKENS, without_torchvision
from theworld_train.plan.rollout import PartCost, RolloutPlan, plan_rollout

CONFIGS = Path(__file__).parents[3] / "configs" / "stages"
FRAMES = 9


@pytest.fixture
def config(tiny: TinyCheckpoint, tmp_path: Path) -> RunConfig:
    size = {"height": RESOLUTION, "width": 2 * RESOLUTION, "num_frames": FRAMES}
    rules = {"pipeline": tiny.cosmos, "num_inference_steps": 3, "dtype": "float32"} | size
    data = {
        "train": {"source": "moving_digits", "split": "train", "samples": 6},
        "encoded": str(tmp_path),
        "world": {"frames": "rollout", "steps": 1, "rollout": rules},
    }
    return load_run_config(write_run(tiny, tmp_path, steps=1, batch=1, data=data))


def part(plan: RolloutPlan, name: str) -> PartCost:
    return next(each for each in plan.parts if each.name == name)


def test_parts_hold_and_compute_what_the_real_ones_do(tiny: TinyCheckpoint, config: RunConfig):
    plan = plan_rollout(config)
    cells = (RESOLUTION // 8, 2 * RESOLUTION // 8)
    latents = 1 + FRAMES // 4
    transformer = CosmosTransformer3DModel.from_pretrained(tiny.cosmos, subfolder="transformer")
    text_encoder = T5EncoderModel.from_pretrained(tiny.cosmos, subfolder="text_encoder")
    vae = AutoencoderKLWan.from_pretrained(tiny.cosmos, subfolder="vae")

    def denoise() -> object:
        with without_torchvision():
            return transformer(
                hidden_states=torch.zeros(1, 16, latents, *cells),
                timestep=torch.zeros(1, 1, latents, 1, 1),
                encoder_hidden_states=torch.zeros(1, PROMPT_TOKENS, 32),
                fps=16,
                condition_mask=torch.zeros(1, 1, latents, *cells),
                padding_mask=torch.zeros(1, 1, RESOLUTION, 2 * RESOLUTION),
            )

    pixels = torch.zeros(1, 3, FRAMES, RESOLUTION, 2 * RESOLUTION)
    real: dict[str, tuple[Any, Callable[[], object]]] = {
        "text encoder": (text_encoder, lambda: text_encoder(torch.zeros(1, PROMPT_TOKENS, dtype=torch.long))),
        "transformer, a step": (transformer, denoise),
        "VAE, conditioning": (vae, lambda: vae.encode(pixels)),
        "VAE, decoding": (vae, lambda: vae.decode(torch.zeros(1, 16, plan.kept, *cells))),
    }
    for name, (module, call) in real.items():
        planned = part(plan, name)
        assert planned.parameters == sum(parameter.numel() for parameter in module.parameters()), name
        assert planned.weights == 4 * planned.parameters
        # In its parts, as torch counts no fused attention of a CPU's.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        assert sum(planned.flops.values()) == counter.get_total_flops(), name
        assert plan.peak(planned) > planned.weights
    assert part(plan, "transformer, a step").calls == 6, "three steps, each with the negative prompt"
    assert plan.kept == 1 + config.model.world.max_world_steps


def test_without_guidance_the_transformer_works_half(config: RunConfig):
    rules = config.data.world.rollout.model_copy(update={"guidance_scale": 1.0})
    world = config.data.world.model_copy(update={"rollout": rules})
    changed = config.model_copy(update={"data": config.data.model_copy(update={"world": world})})
    plan, guided = plan_rollout(changed), plan_rollout(config)
    assert part(plan, "transformer, a step").calls == 3
    h100 = gpu_spec("h100-80gb")
    assert plan.seconds(h100).expected < guided.seconds(h100).expected


def test_nvidias_pipeline_needs_no_files():
    overrides = ["data.world.frames=rollout", "data.world.steps=1", "data.encoded=encoded"]
    plan = plan_rollout(load_run_config(CONFIGS / "projection.yaml", overrides))
    assert part(plan, "transformer, a step").parameters == 1_956_413_440
    assert part(plan, "text encoder").parameters == 4_864_791_552
    assert part(plan, "transformer, a step").calls == 70
    assert {name: plan.fits(gpu_spec(name)) for name in ("l4", "a100-40gb", "h100-80gb")} == {
        "l4": True,
        "a100-40gb": True,
        "h100-80gb": True,
    }
    l4, h100 = (plan.seconds(gpu_spec(name)) for name in ("l4", "h100-80gb"))
    assert l4.best > h100.best > 60
