"""Measures the fast step against the plain one, lever by lever, each pair in one process and taking turns.

    python benchmarks/step.py [step loss attention encoder batch length sliding rate] [--size 270m] [--repeats 3]

Without names, all of them run. On a GPU the size is that of Gemma 3 4B, with random weights; on a CPU that of Gemma 3
270M's text. Prints tables of ratios, and writes a record with hardware and versions into benchmarks/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from measuring import device, fastest, memory_peak, random_model, table, update_record
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from theworld_train.accounting.flops import StepModel, StepSettings, StepShape, step_work
from theworld_train.accounting.pieces import AttentionWork, attended_pairs
from theworld_train.assemble.model import attention_of, build_stage, describe_model
from theworld_train.config import parse_run_config
from theworld_train.config.schema import RunConfig
from theworld_train.model.attention import SequenceLayout, banded_attention
from theworld_train.model.configuration import TheWorldConfig
from theworld_train.model.world_encoder import WorldEncoder, vae_config
from theworld_train.plan.dry_run import sample_shape, synthetic_batch
from theworld_train.train.freeze import apply_trainable
from theworld_train.train.ledger import trainable_components
from theworld_train.train.loss import supervised_loss
from theworld_train.train.stage import StageModule

MIB = 2**20
#: World tokens of a sample, its text and supervised part. An image takes 256 tokens and two brackets.
WORLD_TOKENS, TEXT, SUPERVISED = 1024, 64, 32
#: Positions of the attention that is measured by itself.
POSITIONS = 4096
BATCHES = (1, 2, 4)
LENGTHS = (1024, 2304, 4096, 9216, 16384)
#: Side of the square matrices whose product is the measure of the machine.
MATRIX = 3072

_GEMMA_270M = {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4} | {
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262_208,
    "sliding_window": 512,
    "query_pre_attn_scalar": 256,
}
_100M = _GEMMA_270M | {"intermediate_size": 2560, "num_hidden_layers": 12, "vocab_size": 32_064}
_TINY = _GEMMA_270M | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "vocab_size": 1024,
}
_VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4} | {
    "model_type": "siglip_vision_model",
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}
_TEXTS: dict[str, dict[str, int] | None] = {"tiny": _TINY, "100m": _100M, "270m": _GEMMA_270M, "4b": None}

#: What the plain path takes, and the levers in the order in which they are added.
PLAIN = {"attention": "sdpa", "kernels": "plain", "last_layers": "whole"}
LEAN = {"attention": "banded", "kernels": "lean", "last_layers": "whole"}
OURS = LEAN | {"last_layers": "needed"}
LEVERS = {
    "loss at supervised positions": PLAIN,
    "+ attention in blocks": PLAIN | {"attention": "banded"},
    "+ lean kernels": LEAN,
    "+ last layers as needed": OURS,
    "+ compiled kernels": OURS | {"kernels": "compiled"},
}


@dataclass(frozen=True)
class Step:
    """A projection-only step: the stage, what its frozen encoders have made, and a batch."""

    config: RunConfig
    stage: StageModule
    batch: Any
    features: Any

    def ours(self) -> Tensor:
        """Forward and backward as the trainer takes them."""
        self.stage.zero_grad(set_to_none=True)
        loss = self.stage(self.batch, self.features, 1).loss_sum / self.batch.num_supervised
        loss.backward()
        return loss.detach()

    def parents(self) -> Tensor:
        """Forward with labels as transformers computes it, logits of all positions and masks over all pairs."""
        self.stage.zero_grad(set_to_none=True)
        model, batch, features = self.stage.model, self.batch, self.features
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            images = model.model.multi_modal_projector(features.image_states)
            embeds = model.embed(batch.input_ids, images, features.world_latents, (1,) * len(features.frame_counts))
            loss: Tensor = model(
                inputs_embeds=embeds.to(torch.bfloat16 if self.config.precision == "bf16" else torch.float32),
                attention_mask=batch.attention_mask,
                token_type_ids=batch.token_type_ids,
                labels=batch.labels,
                use_cache=False,
            ).loss
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Returns the gradients of the last pass."""
        return {name: p.grad.clone() for name, p in self.stage.model.named_parameters() if p.grad is not None}


def make_step(
    size: str,
    levers: dict[str, str],
    *,
    world_tokens: int = WORLD_TOKENS,
    precision: str = "bf16",
    kinds: str = "",
    batch: int = 1,
    text: int = TEXT,
    supervised: int = SUPERVISED,
    checkpointing: str = "none",
) -> Step:
    """Returns a step of random weights, the same whatever the levers are.

    Args:
        size: Of the model.
        levers: Keys of the config's `model`.
        world_tokens: Of a sample.
        precision: Of the run.
        kinds: A letter for each layer, `s` for a sliding and `g` for a global one; those of the size if empty.
        batch: Samples.
        text: Positions of a sample that are neither world nor image.
        supervised: The last ones of them.
        checkpointing: As in `training.gradient_checkpointing`.
    """
    config = _step_config(world_tokens, levers, precision, batch, text=text, checkpointing=checkpointing)
    architecture = _architecture(size, config, kinds)
    model = random_model(architecture, torch.float32 if precision == "fp32" else torch.bfloat16)
    apply_trainable(model, trainable_components(config), config.precision)
    torch.nn.Module.to(model, device())
    stage = build_stage(model, config)
    stage.set_training_modes()
    sample = sample_shape(config, architecture, supervised=supervised)
    inputs = synthetic_batch(architecture, sample, batch).to(device())
    return Step(config, stage, inputs, stage.encode(inputs))


def _step_config(
    world_tokens: int,
    levers: dict[str, str],
    precision: str,
    batch: int,
    *,
    text: int = TEXT,
    checkpointing: str = "none",
) -> RunConfig:
    resolution = 8 * round(world_tokens**0.5)
    return parse_run_config(
        {
            "name": "step",
            "output_dir": "unused",
            "precision": precision,
            "model": {"world": {"resolution": resolution}, **levers},
            "trainable": {"world_projector": {}},
            "data": {
                "train": {"source": "moving_digits", "split": "train", "samples": 8, "frames": 1},
                "max_sequence_length": world_tokens + 2 + 256 + 2 + text,
            },
            "training": {
                "max_steps": 1,
                "global_batch_size": batch,
                "micro_batch_size": batch,
                "gradient_checkpointing": checkpointing,
            },
        }
    )


def _architecture(size: str, config: RunConfig, kinds: str) -> TheWorldConfig:
    text = _TEXTS[size]
    names = {"s": "sliding_attention", "g": "full_attention"}
    layers: dict[str, Any] = {"num_hidden_layers": len(kinds), "layer_types": [names[kind] for kind in kinds]}
    if text is None:
        full = describe_model(config)
        if kinds:
            full.text_config.update(layers)
        return full
    last = text["vocab_size"] - 64
    architecture = TheWorldConfig(
        text_config=text | (layers if kinds else {}),
        vision_config=_VISION,
        world_encoder_config=vae_config({"base_dim": 16}),
        world_resolution=config.model.world.resolution,
        mm_tokens_per_image=256,
        boi_token_index=last,
        eoi_token_index=last + 1,
        image_token_index=last + 2,
    )
    architecture._attn_implementation = attention_of(config)
    return architecture


# -- what is measured -------------------------------------------------------------------------------------------------


def measure_step(size: str, repeats: int) -> dict[str, Any]:
    """Times the step lever by lever, and holds loss and gradients against the parent's in fp32."""
    rows = []
    plain = make_step(size, PLAIN)
    steps = {name: make_step(size, levers) for name, levers in LEVERS.items()}
    functions = {"transformers, with labels": plain.parents} | {name: step.ours for name, step in steps.items()}
    times = fastest(functions, repeats)
    for name, function in functions.items():
        rows.append({"path": name, "seconds": times[name], "memory": memory_peak(function)})
    first = rows[0]
    shown = [
        [
            row["path"],
            f"{row['seconds']:.2f}",
            f"x{first['seconds'] / row['seconds']:.1f}",
            f"{row['memory'] / MIB:,.0f}",
            f"1/{first['memory'] / row['memory']:.1f}",
        ]
        for row in rows
    ]
    print(table(["path", "step (s)", "faster", "peak above weights (MiB)", "of the memory"], shown))
    del plain, steps, functions
    agreement = measure_agreement(size)
    print(f"\nin fp32: loss differs by {agreement['loss']:.1e}, gradients by {agreement['gradients']:.1e} at most\n")
    return {"rows": rows, "agreement": agreement}


def measure_agreement(size: str) -> dict[str, float]:
    """Returns the relative differences of loss and gradients to the parent's path, in fp32."""
    step = make_step(size, PLAIN, precision="fp32")
    expected, expected_gradients = step.parents(), step.gradients()
    del step
    step = make_step(size, OURS, precision="fp32")
    loss, gradients = step.ours(), step.gradients()
    return {
        "loss": float((loss - expected).abs() / expected),
        "gradients": max(
            float((gradients[name] - gradient).norm() / gradient.norm())
            for name, gradient in expected_gradients.items()
        ),
    }


def measure_loss(size: str, repeats: int) -> dict[str, Any]:
    """Times the loss over a frozen head, forward and backward, with logits of all positions and of the supervised."""
    text = _TEXTS[size] or describe_model(_step_config(WORLD_TOKENS, {}, "bf16", 1)).text_config.to_dict()
    head = torch.nn.Linear(text["hidden_size"], text["vocab_size"], bias=False).to(device(), torch.bfloat16)
    head.requires_grad_(False)
    positions = WORLD_TOKENS + 260 + TEXT
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, positions, text["hidden_size"], generator=generator)
    hidden = hidden.to(device(), torch.bfloat16).requires_grad_()
    labels = torch.full((1, positions), -100, device=device())
    labels[:, -SUPERVISED:] = 7

    def whole() -> Tensor:
        logits = head(hidden)[:, :-1].float()
        return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    def supervised() -> Tensor:
        return supervised_loss(hidden, labels, head, chunk_size=1024, chunks=1, frozen_head=True).loss_sum

    functions = {name: _with_gradient(loss, hidden) for name, loss in (("whole", whole), ("ours", supervised))}
    times = fastest(functions, repeats)
    rows = [{"path": name, "seconds": times[name], "memory": memory_peak(functions[name])} for name in functions]
    shown = [
        [
            row["path"],
            f"{row['seconds']:.3f}",
            f"x{rows[0]['seconds'] / row['seconds']:.0f}",
            f"{row['memory'] / MIB:,.0f}",
        ]
        for row in rows
    ]
    print(f"the loss alone, {positions:,} positions, {SUPERVISED} of them supervised")
    print(table(["logits", "forward and backward (s)", "faster", "peak (MiB)"], shown), "\n")
    return {"rows": rows}


def _with_gradient(loss: Callable[[], Tensor], inputs: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return torch.autograd.grad(loss(), inputs)[0]

    return run


def measure_batch(size: str, repeats: int) -> dict[str, Any]:
    """Times the step against the samples of a micro-batch."""
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        step = make_step(size, OURS, batch=batch)
        seconds = fastest({"ours": step.ours}, repeats)["ours"]
        rows.append({"batch": batch, "seconds": seconds, "memory": memory_peak(step.ours)})
    shown = [
        [row["batch"], f"{row['seconds']:.2f}", f"{row['seconds'] / row['batch']:.2f}", f"{row['memory'] / MIB:,.0f}"]
        for row in rows
    ]
    print("the step against the samples of a micro-batch")
    print(table(["samples", "step (s)", "of a sample (s)", "peak above weights (MiB)"], shown), "\n")
    return {"rows": rows}


def measure_attention(repeats: int) -> dict[str, Any]:
    """Times a sliding layer's attention of Gemma 3 4B, forward and backward, dense and in blocks."""
    rows = [_compare_attention(dtype, repeats) for dtype in (torch.float32, torch.bfloat16)]
    shown = [
        [
            row["dtype"],
            f"{row['dense']:.2f}",
            f"{row['banded']:.2f}",
            f"x{row['dense'] / row['banded']:.1f}",
            f"{row['difference']:.1e}",
        ]
        for row in rows
    ]
    print(f"a sliding layer's attention, {POSITIONS:,} positions, forward and backward")
    print(table(["dtype", "dense (s)", "blocks (s)", "faster", "largest relative difference"], shown), "\n")
    return {"rows": rows}


def _compare_attention(dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    layout = SequenceLayout.of(torch.ones(1, POSITIONS, device=device()))
    mask = layout.allowed((0, POSITIONS), (0, POSITIONS), 1024)[:, None]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, POSITIONS, 256, generator=generator).to(device(), dtype).requires_grad_()
        for heads in (8, 4, 4)
    )

    def with_gradients(output: Tensor) -> tuple[Tensor, ...]:
        return output.detach(), *torch.autograd.grad(output.square().sum(), (query, key, value))

    def dense() -> tuple[Tensor, ...]:
        keys, values = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
        output = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1 / 16)
        return with_gradients(output.transpose(1, 2))

    def banded() -> tuple[Tensor, ...]:
        return with_gradients(banded_attention(query, key, value, layout, window=1024, scale=1 / 16))

    times = fastest({"dense": dense, "banded": banded}, repeats)
    pairs = zip(dense(), banded(), strict=True)
    difference = max(float((actual - expected).abs().max() / expected.abs().max()) for expected, actual in pairs)
    return {"dtype": str(dtype).removeprefix("torch."), **times, "difference": difference}


def measure_encoder(repeats: int) -> dict[str, Any]:
    """Times the encoding of a single frame at 512 pixels by the full-size VAE."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        vae = AutoencoderKLWan().to(device(), dtype).eval()
        encoder = WorldEncoder.from_vae(vae)
        frame = (torch.rand(1, 3, 1, 512, 512) * 2 - 1).to(device(), dtype)
        functions: dict[str, Callable[[], Tensor]] = {
            "diffusers": lambda vae=vae, frame=frame: vae.encode(frame).latent_dist.mode(),
            "ours": lambda encoder=encoder, frame=frame: encoder.denormalise(encoder.encode(frame)),
        }
        with torch.no_grad():
            times = fastest(functions, repeats)
            difference = float((functions["diffusers"]() - functions["ours"]()).abs().max())
        rows.append({"dtype": str(dtype).removeprefix("torch."), **times, "difference": difference})
    shown = [
        [
            row["dtype"],
            f"{row['diffusers']:.2f}",
            f"{row['ours']:.2f}",
            f"x{row['diffusers'] / row['ours']:.1f}",
            f"{row['difference']:.1e}",
        ]
        for row in rows
    ]
    print("a single frame at 512 x 512 through the full-size VAE")
    print(table(["dtype", "diffusers (s)", "ours (s)", "faster", "max difference"], shown), "\n")
    return {"rows": rows}


def measure_length(size: str, repeats: int, kinds: str) -> dict[str, Any]:
    """Times a few layers against the number of world tokens; all of them compute all positions."""
    rows: list[dict[str, Any]] = []
    for tokens in LENGTHS:
        step = make_step(size, LEAN, world_tokens=tokens, kinds=kinds)
        seconds = fastest({"ours": step.ours}, repeats)["ours"]
        length, window = int(step.batch.input_ids.shape[1]), step.stage.model.config.text_config.sliding_window
        windows = {"sliding": window, "global": None}
        pairs = {kind: attended_pairs(length, seen, AttentionWork("banded")) for kind, seen in windows.items()}
        rows.append({"world_tokens": tokens, "positions": length, "seconds": seconds, "pairs": pairs})
    first = rows[0]
    shown = [
        [
            f"{row['world_tokens']:,}",
            f"{row['positions']:,}",
            f"{row['seconds']:.2f}",
            f"x{row['positions'] / first['positions']:.1f}",
            f"x{row['seconds'] / first['seconds']:.1f}",
            *(f"x{row['pairs'][kind] / first['pairs'][kind]:.1f}" for kind in ("sliding", "global")),
        ]
        for row in rows
    ]
    header = ["world tokens", "positions", "step (s)", "positions", "step", "pairs, sliding", "pairs, global"]
    print(f"layers {kinds} (s: sliding, g: global) against the number of world tokens")
    print(table(header, shown), "\n")
    return {"layers": kinds, "rows": rows}


def measure_rate(repeats: int) -> dict[str, Any]:
    """Returns the share of the machine's own bf16 matrix rate that the projection-only step reaches on useful work."""
    rows = []
    for size in ("100m", "270m") if device().type == "cpu" else ("4b",):
        step = make_step(size, OURS)
        matrix = torch.randn(MATRIX, MATRIX).to(device(), torch.bfloat16)
        times = fastest({"product": lambda matrix=matrix: matrix @ matrix, "step": step.ours}, repeats)
        batch = step.batch
        work = step_work(
            StepModel.from_config(step.stage.model.config.to_dict()),
            StepShape(1, batch.input_ids.shape[1], batch.num_supervised),
            StepSettings(
                trainable=frozenset(step.config.trainable),
                gradient_checkpointing=False,
                trims=True,
                cached=frozenset({"world_encoder", "vision_tower"}),
            ),
        )
        machine = 2 * MATRIX**3 / times["product"]
        rate = work.useful_flops / times["step"]
        rows.append(
            {"size": size, "seconds": times["step"], "flops": work.useful_flops, "rate": rate, "machine": machine}
        )
    shown = [
        [
            row["size"],
            f"{row['seconds']:.2f}",
            f"{row['flops'] / 1e9:,.0f}",
            f"{row['rate'] / 1e9:,.0f}",
            f"{row['machine'] / 1e9:,.0f}",
            f"{row['rate'] / row['machine']:.0%}",
        ]
        for row in rows
    ]
    print("useful work of the projection-only step against a bf16 matrix product in the same run")
    print(table(["size", "step (s)", "GFLOP", "GFLOP/s", "matrix product", "share"], shown), "\n")
    return {"rows": rows}


#: What is measured, by name, of a size and with so many repeats.
MEASURES: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "step": measure_step,
    "loss": measure_loss,
    "attention": lambda _size, repeats: measure_attention(repeats),
    "encoder": lambda _size, repeats: measure_encoder(repeats),
    "batch": measure_batch,
    "length": lambda size, repeats: measure_length(size, repeats, "sssssg"),
    "sliding": lambda size, repeats: measure_length(size, repeats, "sssss"),
    "rate": lambda _size, repeats: measure_rate(repeats),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*MEASURES, []], help="what is measured; everything by default")
    parser.add_argument("--size", choices=list(_TEXTS), default="270m" if device().type == "cpu" else "4b")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    chosen = options.parts or list(MEASURES)
    for name in chosen:
        command = f"python benchmarks/step.py {name} --size {options.size} --repeats {options.repeats}"
        print(f"written to {update_record('step', command, {name: MEASURES[name](options.size, options.repeats)})}")


if __name__ == "__main__":
    main()
