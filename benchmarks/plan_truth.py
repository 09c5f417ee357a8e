"""Compares planned with real memory on this machine: real weights, real steps, the tracker and the process's own peak.

    python benchmarks/plan_truth.py [tiny] [100m] [full]

Each size runs in a process of its own. `full` is Gemma 3 4B with the video VAE in random bf16 weights: it takes about
13 GiB and several minutes. The exit code says whether all errors are within their bounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from measuring import RETURNING_MEMORY, high_water, random_model, reset_high_water

if TYPE_CHECKING:
    from theworld_train.config.schema import RunConfig
    from theworld_train.model.configuration import TheWorldConfig
    from theworld_train.plan.dry_run import DryRun

#: Largest error of the tracked peak, and of the rise of the process's high-water mark where it is compared.
TRACKED_BOUND, PROCESS_BOUND = 0.01, 0.05
GIB = 2**30

_TINY_IDS = {"boi_token_index": 506, "eoi_token_index": 507, "image_token_index": 508}
_SMALL_IDS = {"boi_token_index": 31_998, "eoi_token_index": 31_999, "image_token_index": 32_000}
_EVERYTHING = ["world_projector", "vision_tower", "multi_modal_projector", "language_model", "world_encoder"]

#: Architecture (None for the built-in 4B model), what trains, samples, positions, resolution and steps of each size.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "text": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "head_dim": 24, "vocab_size": 576, "sliding_window": 128},
        "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 64, "patch_size": 16, "vision_use_head": False},
        "tokens": {"mm_tokens_per_image": 16, **_TINY_IDS},
        "vae": {"base_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
        "trainable": _EVERYTHING,
        "shape": {"batch": 2, "positions": 128, "resolution": 32, "steps": 2},
    },
    "100m": {
        "text": {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "head_dim": 160, "vocab_size": 32_064, "sliding_window": 512},
        "vision": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
        | {"image_size": 224, "patch_size": 14, "vision_use_head": False},
        "tokens": {"mm_tokens_per_image": 64, **_SMALL_IDS},
        "vae": {"base_dim": 32},
        "trainable": _EVERYTHING,
        "shape": {"batch": 2, "positions": 1024, "resolution": 128, "steps": 2},
    },
    "full": {
        "trainable": ["world_projector"],
        "shape": {"batch": 1, "positions": 1200, "resolution": 224, "steps": 1},
    },
}


def main() -> int:
    names = sys.argv[1:] or list(SIZES)
    failed = False
    for name in names:
        command = [sys.executable, __file__, "--measure", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | RETURNING_MEMORY)
        result = json.loads(output.stdout.splitlines()[-1])
        tracked = result["tracked"] / result["planned"] - 1
        process = result["rise"] / result["planned"] - 1
        compared = name != "tiny"  # a few megabytes drown in what the libraries load
        failed |= abs(tracked) > TRACKED_BOUND or (compared and abs(process) > PROCESS_BOUND)
        print(
            f"{name}: {result['parameters'] / 1e6:,.0f}M parameters; planned {result['planned'] / GIB:.4f} GiB, tracked"
            f" {result['tracked'] / GIB:.4f} GiB ({tracked:+.2%}), process {result['rise'] / GIB:.4f} GiB"
            f" ({process:+.2%}); plan {result['plan_s']:.1f} s, step {result['run_s']:.1f} s",
            flush=True,
        )
    return int(failed)


def measure(name: str) -> dict[str, float]:
    """Plans and runs the steps of one size in this process."""
    from theworld_train.plan.dry_run import dry_run

    config, architecture = describe(name)
    steps = SIZES[name]["shape"]["steps"]
    started = time.perf_counter()
    plan = dry_run(config, device="cpu", architecture=architecture, steps=steps)
    planned = plan.timeline().peak().total
    plan_s = time.perf_counter() - started

    run_steps("tiny")  # libraries load, and compile, what they need at the first step: no memory of the model
    before = reset_high_water()
    started = time.perf_counter()
    run, parameters = run_steps(name)
    return {
        "parameters": parameters,
        "planned": planned,
        "tracked": run.timeline().peak().total,
        "rise": high_water() - before,
        "plan_s": plan_s,
        "run_s": time.perf_counter() - started,
    }


def describe(name: str) -> tuple[RunConfig, TheWorldConfig]:
    """Returns the run config and the architecture of a size."""
    from theworld_train.assemble.model import attention_of, describe_model
    from theworld_train.config import parse_run_config
    from theworld_train.model.configuration import TheWorldConfig
    from theworld_train.model.world_encoder import vae_config

    size, shape = SIZES[name], SIZES[name]["shape"]
    config = parse_run_config(
        {
            "name": name,
            "output_dir": "unused",
            "model": {"world": {"resolution": shape["resolution"]}},
            "trainable": {component: {} for component in size["trainable"]},
            "data": {
                "train": {"source": "moving_digits", "split": "train", "samples": 8, "frames": 1},
                "max_sequence_length": shape["positions"],
            },
            "training": {"max_steps": 2, "global_batch_size": shape["batch"], "micro_batch_size": shape["batch"]},
        }
    )
    if "text" not in size:
        return config, describe_model(config)
    architecture = TheWorldConfig(
        text_config=size["text"],
        vision_config={"model_type": "siglip_vision_model"} | size["vision"],
        world_encoder_config=vae_config(size["vae"]),
        world_resolution=shape["resolution"],
        **size["tokens"],
    )
    architecture._attn_implementation = attention_of(config)
    return config, architecture


def run_steps(name: str) -> tuple[DryRun, int]:
    """Runs the steps of a size with random weights; returns what was tracked and the number of parameters."""
    import torch

    from theworld_train.plan.dry_run import sample_shape, synthetic_batch, trace_steps

    config, architecture = describe(name)
    shape = SIZES[name]["shape"]
    model = random_model(architecture, torch.bfloat16)
    sample = sample_shape(config, architecture)
    batch = synthetic_batch(architecture, sample, shape["batch"])
    run = trace_steps(config, model, (batch,), sample, steps=shape["steps"], device="cpu")
    return run, sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        sys.exit(main())
