"""What generating a rollout takes: each part of the pipeline on fake tensors, its memory, its operations, its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import T5EncoderModel

from theworld_train.accounting.gpus import GpuSpec, Range, efficiencies
from theworld_train.accounting.tokens import latent_frames
from theworld_train.assemble.model import describe_model
from theworld_train.config.rollout import RolloutRules
from theworld_train.config.schema import RunConfig
from theworld_train.memory.tracker import MemoryTracker
from theworld_train.model.world_encoder import WorldEncoder
from theworld_train.model.world_generator import PROMPT_TOKENS, generator_configs, without_torchvision
from theworld_train.plan.cuda import cuda_semantics
from theworld_train.plan.dry_run import materialise
from theworld_train.plan.known_values import KnowingFakeMode

Kind = Literal["matmul", "convolution", "sdpa"]

#: What the efficiencies of a GPU call an operation, by a part of its name; all other counted ones are matrix products.
_KINDS: dict[str, Kind] = {"convolution": "convolution", "attention": "sdpa"}
#: Share of a GPU's memory that has to stay free for workspaces and fragments.
_FREE_SHARE = 0.03


@dataclass(frozen=True)
class PartCost:
    """One part of the pipeline at work, once.

    Attributes:
        name: Which part, and what it does.
        parameters: Its parameters.
        weights: Bytes of its weights.
        peak: Bytes at its peak, weights included.
        flops: Floating-point operations of each kind.
        moved: Bytes that its operators read and write.
        kernels: Operators that compute.
        calls: How often it works for one sample.
        stays: Whether its weights stay on the device while other parts work.
        precision: Of its matrix products.
    """

    name: str
    parameters: int
    weights: int
    peak: int
    flops: Mapping[Kind, int]
    moved: int
    kernels: int
    calls: int
    stays: bool
    precision: Literal["bf16", "fp32"]

    def seconds(self, gpu: GpuSpec) -> Range:
        """Returns the time of one call: arithmetic, or memory traffic where that takes longer, and launches."""
        shares = efficiencies(gpu)
        peak = gpu.peak_flops(self.precision)
        worst, expected, best = (
            max(
                sum(count / (peak * getattr(shares, kind)[case]) for kind, count in self.flops.items()),
                self.moved / (gpu.memory_gb_per_s * 1e9 * shares.memory[case]),
            )
            + self.kernels * shares.launch_us[case] * 1e-6
            for case in range(3)
        )
        return Range(worst, expected, best)


@dataclass(frozen=True)
class RolloutPlan:
    """What a rollout of one sample takes, without the guardrail's own models.

    Attributes:
        parts: The parts in the order of their work.
        samples: Latent frames that are kept of each sample, the present included.
    """

    parts: tuple[PartCost, ...]
    kept: int

    def peak(self, part: PartCost) -> int:
        """Returns the bytes on the device while a part works: its own peak, and the weights that stay."""
        return part.peak + sum(other.weights for other in self.parts if other.stays and other is not part)

    @property
    def largest(self) -> PartCost:
        """The part that needs the most memory."""
        return max(self.parts, key=self.peak)

    def fits(self, gpu: GpuSpec) -> bool:
        """Whether it fits a GPU, some of it left free."""
        return self.peak(self.largest) <= gpu.usable_gib * 2**30 * (1 - _FREE_SHARE)

    def seconds(self, gpu: GpuSpec) -> Range:
        """Returns the time of one sample."""
        times = [part.seconds(gpu).times(part.calls) for part in self.parts]
        return Range(*(sum(time[case] for time in times) for case in range(3)))


def plan_rollout(config: RunConfig) -> RolloutPlan:
    """Runs each part of the pipeline that a config names once, over fake tensors; no weights are read.

    Raises:
        ConfigError: If the pipeline's configs cannot be read.
    """
    rules = config.data.world.rollout
    world = config.model.world
    kept = 1 + world.max_world_steps
    configs = generator_configs(rules)
    dtype = getattr(torch, rules.dtype)
    precision: Literal["bf16", "fp32"] = "bf16" if rules.dtype == "bfloat16" else "fp32"
    vae = dict(configs.vae)
    channels, cells = int(vae["z_dim"]), (rules.height // 8, rules.width // 8)
    guided = rules.guidance_scale > 1
    own: Any = describe_model(config).world_encoder_config
    own_dtype = getattr(torch, world.encoder_dtype)

    def decode(model: Any) -> object:  # noqa: ANN401
        return model.decode(torch.zeros(1, channels, kept, *cells, dtype=dtype), return_dict=False)

    def condition(model: Any) -> object:  # noqa: ANN401
        return model.encode(
            torch.zeros(1, 3, rules.num_frames, rules.height, rules.width, dtype=dtype), return_dict=False
        )

    def read_prompt(model: Any) -> object:  # noqa: ANN401
        ids = torch.zeros(1, PROMPT_TOKENS, dtype=torch.long)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids, dtype=torch.bool))

    def encode(model: Any) -> object:  # noqa: ANN401
        return model.encode(torch.zeros(1, 3, 4 * kept - 3, world.resolution, world.resolution))

    def denoise(model: Any) -> object:  # noqa: ANN401
        return _denoise(model, rules, channels, cells, int(configs.text_encoder.d_model), dtype)

    with without_torchvision():
        parts = (
            _measure("text encoder", lambda: T5EncoderModel(configs.text_encoder), read_prompt, dtype, 1, precision),
            _measure("VAE, conditioning", lambda: _vae(vae), condition, dtype, 1, precision, stays=True),
            _measure(
                "transformer, a step",
                lambda: CosmosTransformer3DModel.from_config(dict(configs.transformer)),
                denoise,
                dtype,
                rules.num_inference_steps * (2 if guided else 1),
                precision,
            ),
            _measure("VAE, decoding", lambda: _vae(vae), decode, dtype, 1, precision),
            _measure(
                "world encoder",
                lambda: WorldEncoder(own),
                encode,
                own_dtype,
                1,
                "fp32" if world.encoder_dtype == "float32" else "bf16",
                stays=True,
            ),
        )
    return RolloutPlan(parts, kept)


def _vae(config: dict[str, Any]) -> nn.Module:
    vae: nn.Module = AutoencoderKLWan.from_config(config)
    return vae


def _denoise(
    model: Any,  # noqa: ANN401 (diffusers is not typed)
    rules: RolloutRules,
    channels: int,
    cells: tuple[int, int],
    text: int,
    dtype: torch.dtype,
) -> object:
    frames = latent_frames(rules.num_frames)
    return model(
        hidden_states=torch.zeros(1, channels, frames, *cells, dtype=dtype),
        timestep=torch.zeros(1, 1, frames, 1, 1, dtype=dtype),
        encoder_hidden_states=torch.zeros(1, PROMPT_TOKENS, text, dtype=dtype),
        fps=rules.fps,
        condition_mask=torch.zeros(1, 1, frames, *cells, dtype=dtype),
        padding_mask=torch.zeros(1, 1, rules.height, rules.width, dtype=dtype),
        return_dict=False,
    )


def _measure(
    name: str,
    make: Callable[[], nn.Module],
    call: Callable[[Any], object],
    dtype: torch.dtype,
    calls: int,
    precision: Literal["bf16", "fp32"],
    *,
    stays: bool = False,
) -> PartCost:
    """Runs one call of a module over fake tensors, and follows every storage and operator."""
    with torch.device("meta"):
        module = make()
    tracker, counter = MemoryTracker(), _Counter()
    with KnowingFakeMode(), torch.no_grad(), cuda_semantics():
        materialise(module, dtype)
        with tracker:
            for parameter in module.parameters():
                tracker.adopt(parameter, "weights", name)
            with counter:
                call(module)
    live = peak = 0
    for event in tracker.finish().events:
        live += event.allocation.size if event.is_birth else -event.allocation.size
        peak = max(peak, live)
    return PartCost(
        name=name,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        weights=sum(parameter.nbytes for parameter in module.parameters()),
        peak=peak,
        flops=counter.flops,
        moved=counter.moved,
        kernels=counter.kernels,
        calls=calls,
        stays=stays,
        precision=precision,
    )


class _Counter(TorchDispatchMode):
    """Counts what operators compute and move; views do neither."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[Kind, int] = {}
        self.moved = self.kernels = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 (an operator)
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        packet = func.overloadpacket
        if packet in flop_registry:
            kind: Kind = next((kind for part, kind in _KINDS.items() if part in packet.__name__), "matmul")
            counted = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
            self.flops[kind] = self.flops.get(kind, 0) + counted
        leaves = tree_leaves((args, kwargs, result))
        self.moved += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        self.kernels += 1
        return result
