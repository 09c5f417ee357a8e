"""Engines: how ranks share weights, gradients and optimizer state; one class for each way, one face for all.

A run's strategy chooses the engine. Whatever it is, the trainer takes the same steps, checkpoints hold the same files,
and a checkpoint of one strategy goes on under another.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from theworld_train.config.components import Component
from theworld_train.config.schema import RunConfig
from theworld_train.model.world_encoder import WorldEncoder
from theworld_train.train.groups import restore_slots, saved_slots, step_counter
from theworld_train.train.norms import component_norms, parameters_by_component
from theworld_train.train.stage import StageModule

#: Slots of AdamW's state that are as large as their parameter.
MOMENTS = ("exp_avg", "exp_avg_sq")

#: Elements in which ZeRO collects gradients before it reduces them; the buffer holds so many in fp32.
REDUCE_BUCKET = 200_000_000
#: Elements that ZeRO-3 gathers ahead of the layer at work, and how many it may hold before it gathers no more ahead.
#: What trains is gathered as it is stored, in fp32, and what is frozen in bf16.
PREFETCH_BUCKET = 50_000_000
MAX_LIVE = 300_000_000
#: Elements until whose use a weight stays gathered: a layer of 94 million is recomputed and then goes backward.
REUSE_DISTANCE = 200_000_000

MakeOptimizer = Callable[[], torch.optim.Optimizer]


class Engine(Protocol):
    """One rank's share of a stage, wrapped, with its optimizer."""

    wrapped: nn.Module
    optimizer: torch.optim.Optimizer

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Returns a context for one micro-batch; after the window's last one, gradients are those of all ranks."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's share of the global mean loss."""
        ...

    def gradient_norms(self) -> dict[str, Tensor]:
        """Returns the gradient's norm by component, between a window's last micro-batch and its step."""
        ...

    def weight_norms(self) -> dict[str, Tensor]:
        """Returns the norm of what trains, by component."""
        ...

    def step(self, max_norm: float | None) -> Tensor:
        """Clips, steps and drops the gradient; returns its norm before clipping, the same on all ranks.

        If the norm is not finite, no rank steps: weights and optimizer stay as they are.
        """
        ...

    def held(self, parameter: nn.Parameter) -> Tensor:
        """Returns what this rank holds of a parameter."""
        ...

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Returns a whole parameter; every rank calls it."""
        ...

    def slots(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Returns the optimizer's whole state of a parameter, nothing before the first step; every rank calls it."""
        ...

    def load_slots(self, parameter: nn.Parameter, slots: dict[str, Tensor]) -> None:
        """Restores what `slots` returned; every rank calls it."""
        ...


class ReplicatedEngine:
    """Every rank holds everything; gradients are averaged by DDP, if there is more than one rank."""

    def __init__(
        self, stage: StageModule, make_optimizer: MakeOptimizer, wrap: Callable[[nn.Module], nn.Module] | None = None
    ) -> None:
        """Wraps a stage.

        Args:
            stage: On its device.
            make_optimizer: Makes the optimizer over the stage's parameters.
            wrap: Puts a module into DDP, where there are several ranks.
        """
        self.optimizer = make_optimizer()
        self.wrapped: nn.Module = wrap(stage) if wrap else stage
        self._parameters = parameters_of(self.optimizer)
        self._components = parameters_by_component(self.optimizer)
        self._ranks = torch.distributed.get_world_size() if wrap else 1

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """See `Engine`."""
        no_sync = getattr(self.wrapped, "no_sync", None)
        return nullcontext() if last or no_sync is None else cast(AbstractContextManager[Any], no_sync())

    def backward(self, loss: Tensor) -> None:
        """See `Engine`; DDP averages over ranks, and the factor turns that average into the sum."""
        (loss * self._ranks).backward()

    def gradient_norms(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return component_norms(self._components, lambda parameter: parameter.grad, sharded=False)

    def weight_norms(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return component_norms(self._components, lambda parameter: parameter, sharded=False)

    def step(self, max_norm: float | None) -> Tensor:
        """See `Engine`."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, torch.inf if max_norm is None else max_norm)
        step_if_finite(self.optimizer, norm)
        return norm

    def held(self, parameter: nn.Parameter) -> Tensor:
        """See `Engine`."""
        return parameter

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """See `Engine`."""
        return parameter.detach()

    def slots(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See `Engine`."""
        return saved_slots(self.optimizer.state.get(parameter, {}))

    def load_slots(self, parameter: nn.Parameter, slots: dict[str, Tensor]) -> None:
        """See `Engine`."""
        restore_slots(self.optimizer, parameter, slots)


class ShardedEngine:
    """FSDP2: weights, gradients and optimizer state are sharded; a unit's weights are gathered while it computes."""

    def __init__(self, stage: StageModule, make_optimizer: MakeOptimizer, config: RunConfig, mesh: DeviceMesh) -> None:
        """Shards a stage in place, unit by unit as `wrap_units` names them, the rest as one unit.

        Args:
            stage: On its device.
            make_optimizer: Makes the optimizer over the sharded parameters.
            config: The run config.
            mesh: Of the ranks; if it has two dimensions, weights are replicated over the first one.
        """
        stage.lockstep = True
        compute = torch.float32 if config.precision == "fp32" else torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # The world encoder computes in the precision in which it is stored.
        stored = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = OffloadPolicy()
        if config.runtime.offload == "all":
            offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        for unit in wrap_units(stage):
            own = stored if isinstance(unit, WorldEncoder) else policy
            fully_shard(unit, mesh=mesh, mp_policy=own, offload_policy=offload)
        fully_shard(stage, mesh=mesh, mp_policy=policy, offload_policy=offload)
        register_fsdp_forward_method(stage, "generate")
        self.wrapped: nn.Module = stage
        self._ranks = torch.distributed.get_world_size()
        self.optimizer = make_optimizer()
        self._parameters = parameters_of(self.optimizer)
        self._components = parameters_by_component(self.optimizer)
        self._copies = mesh.size(0) if mesh.ndim > 1 else 1

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """See `Engine`."""
        assert isinstance(self.wrapped, FSDPModule)
        # Gradients are reduced in every micro-batch: those that wait for the last one would be whole, on every rank.
        self.wrapped.set_is_last_backward(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Engine`; FSDP averages over ranks, and the factor turns that average into the sum."""
        (loss * self._ranks).backward()

    def gradient_norms(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return component_norms(
            self._components,
            lambda parameter: None if parameter.grad is None else _local(parameter.grad),
            sharded=True,
            copies=self._copies,
        )

    def weight_norms(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return component_norms(self._components, self.held, sharded=True, copies=self._copies)

    def step(self, max_norm: float | None) -> Tensor:
        """See `Engine`."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, torch.inf if max_norm is None else max_norm)
        norm = _whole(norm)
        step_if_finite(self.optimizer, norm)
        return norm

    def held(self, parameter: nn.Parameter) -> Tensor:
        """See `Engine`."""
        return _local(parameter)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """See `Engine`."""
        return _whole(parameter.detach())

    def slots(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: _whole(value) for name, value in self.optimizer.state.get(parameter, {}).items()}

    def load_slots(self, parameter: nn.Parameter, slots: dict[str, Tensor]) -> None:
        """See `Engine`."""
        state: dict[str, Tensor] = {}
        for name, value in slots.items():
            if name in MOMENTS and isinstance(parameter, DTensor):
                part = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
                kept = torch.zeros_like(parameter.detach())  # where the shard is, on the host if it is offloaded
                assert isinstance(kept, DTensor)
                kept.to_local().copy_(part.to_local())
                value = kept
            elif name == "step":
                value = step_counter(self.optimizer, value, self.held(parameter).device)
            state[name] = value
        self.optimizer.state[parameter] = state


class DeepSpeedEngine:
    """ZeRO 1 to 3: the optimizer state, then the gradients, then the weights too are sharded."""

    def __init__(self, stage: StageModule, make_optimizer: MakeOptimizer, settings: dict[str, Any]) -> None:
        """Hands a stage to DeepSpeed.

        Args:
            stage: On its device.
            make_optimizer: Makes the optimizer; DeepSpeed puts flat shards in the place of its parameters.
            settings: DeepSpeed's config, as `deepspeed_settings` makes it.
        """
        _quieten_deepspeed()
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        self._stage = int(settings["zero_optimization"]["stage"])
        if self._stage == 3:
            stage.lockstep = True
            # Ranks call its modules as often as their clips are long; as a leaf it is gathered as a whole.
            if any(isinstance(module, WorldEncoder) for module in stage.modules()):
                set_z3_leaf_modules(stage, [WorldEncoder])
        self.optimizer = make_optimizer()
        self._components = parameters_by_component(self.optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=stage, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        self.wrapped: nn.Module = self._engine
        self._ranks = torch.distributed.get_world_size()
        # ZeRO-2 puts gradients into its buckets as they come. Those of the world encoder come in an order that depends
        # on the clips, which differ from rank to rank; a window's gradients are then reduced at its end, by parameter.
        trains_encoder = Component.WORLD_ENCODER in stage.trainable
        self._reduces_last = self._stage == 2 and trains_encoder
        self._window: ExitStack | None = None
        self._make_state()

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """See `Engine`."""
        if self._reduces_last and self._window is None:
            self._window = ExitStack()
            self._window.enter_context(self._engine.coalesce_grad_reduction())
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Engine`; DeepSpeed averages over ranks, and is told not to divide by accumulated micro-batches."""
        self._engine.backward(loss * self._ranks, scale_wrt_gas=False)

    def gradient_norms(self) -> dict[str, Tensor]:
        """See `Engine`."""
        self._reduce()
        return component_norms(self._components, self._gradient_part, sharded=True)

    def weight_norms(self) -> dict[str, Tensor]:
        """See `Engine`; up to ZeRO-2 every rank holds all weights."""
        if self._stage < 3:
            return component_norms(self._components, lambda parameter: parameter, sharded=False)
        return component_norms(self._components, lambda p: _without_padding(p, self.held(p)), sharded=True)

    def _gradient_part(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns what this rank holds of a gradient; several ranks may hold it, but only one a number of its own."""
        if self._stage == 3:
            from deepspeed.utils import safe_get_local_grad

            return _without_padding(parameter, safe_get_local_grad(parameter))
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        part: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
        own = mapping.lp_fragment_address
        return part.narrow(0, own.start, own.numel) if part.numel() == parameter.numel() else part

    def _reduce(self) -> None:
        """Ends a window whose gradients are reduced at its end."""
        if self._window is not None:
            self._window.close()
            self._window = None
            self._engine.set_gradient_accumulation_boundary(True)

    def step(self, max_norm: float | None) -> Tensor:
        """See `Engine`; DeepSpeed clips by its own config, which holds the same limit, and skips by itself."""
        assert self._engine.gradient_clipping() == (max_norm or 0.0)
        self._reduce()
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self._engine.device)

    def held(self, parameter: nn.Parameter) -> Tensor:
        """See `Engine`."""
        return cast(Tensor, getattr(parameter, "ds_tensor", parameter))

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """See `Engine`."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone() if self._stage == 3 else parameter.detach()

    def slots(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See `Engine`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
        return moments | {"step": next(iter(self.optimizer.state.values()))["step"].clone()}

    def load_slots(self, parameter: nn.Parameter, slots: dict[str, Tensor]) -> None:
        """See `Engine`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for name in MOMENTS:
            if self._stage < 3:
                safe_set_full_optimizer_state(parameter, slots[name].to(self._engine.device), name)
                continue
            # A shard is padded where the ranks do not divide a parameter, which the setter of whole ones forgets.
            shard: Any = parameter.ds_tensor  # type: ignore[attr-defined]
            size, rank = int(shard.ds_numel), torch.distributed.get_rank()
            own = slots[name].flatten()[size * rank : size * (rank + 1)]
            padded = torch.zeros(size, device=self._engine.device)
            padded[: own.numel()].copy_(own)
            safe_set_local_optimizer_state(parameter, padded, name)
        for state in self.optimizer.state.values():
            state["step"].copy_(slots["step"])

    def _make_state(self) -> None:
        """Makes the state that AdamW makes in its first step, all of it before DeepSpeed looks.

        ZeRO 1 and 2 note where it is after the step of the first group, when the others have none yet.
        """
        zero = self._engine.optimizer
        for shard in zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups:
            moments = {name: torch.zeros_like(shard) for name in MOMENTS}
            step = step_counter(self.optimizer, torch.tensor(0.0), shard.device)
            self.optimizer.state[shard] = {"step": step, **moments}
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()


def deepspeed_settings(config: RunConfig, accumulation: int) -> dict[str, Any]:
    """Returns DeepSpeed's config for a run.

    Precision stays ours, autocast over fp32 masters: DeepSpeed's bf16 mode would round what it makes masters from.
    """
    offload = config.runtime.offload
    zero: dict[str, Any] = {
        "stage": int(config.runtime.strategy.removeprefix("zero")),
        "overlap_comm": False,
        "reduce_bucket_size": REDUCE_BUCKET,
    }
    if config.runtime.strategy == "zero3":
        zero |= {
            "stage3_prefetch_bucket_size": PREFETCH_BUCKET,
            "stage3_max_live_parameters": MAX_LIVE,
            "stage3_max_reuse_distance": REUSE_DISTANCE,
        }
    if offload in ("optimizer", "all"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    training = config.training
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.gradient_clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns all parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def wrap_units(stage: StageModule) -> list[nn.Module]:
    """Returns what is gathered one at a time: layers that transformers can checkpoint, and a world encoder inside."""
    return [module for module in stage.modules() if isinstance(module, GradientCheckpointingLayer | WorldEncoder)]


def _quieten_deepspeed() -> None:
    """Leaves out what DeepSpeed says of itself at every start, and that is no news to a user."""
    if not torch.cuda.is_available():
        logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    deprecated = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Steps unless the gradient's norm is NaN or infinite, and drops the gradient."""
    if math.isfinite(norm.item()):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _without_padding(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """Returns a rank's shard under ZeRO-3 without what fills up the last one where ranks do not divide a parameter."""
    whole: Any = parameter
    before = torch.distributed.get_rank() * shard.numel()
    return shard.flatten()[: max(0, min(shard.numel(), int(whole.ds_numel) - before))]


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
