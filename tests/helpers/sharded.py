"""A rank of FSDP2 in a fake process group, over fake tensors: what the plan's sharding is held against."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from theworld_train.assemble.model import build_stage
from theworld_train.config.schema import RunConfig
from theworld_train.memory.following import PhasedEngine
from theworld_train.memory.timeline import CUDA_BLOCK, Peak, Timeline, spans
from theworld_train.memory.tracker import MemoryTracker
from theworld_train.model.build import build_on_meta
from theworld_train.model.configuration import TheWorldConfig
from theworld_train.plan import dry_run as planned
from theworld_train.plan.cuda import cuda_semantics
from theworld_train.plan.known_values import KnowingFakeMode
from theworld_train.train.freeze import apply_trainable
from theworld_train.train.groups import build_optimizer
from theworld_train.train.ledger import build_ledger, trainable_components
from theworld_train.train.quarantine import Quarantine
from theworld_train.train.trainer import Trainer, Window


class ShardedTracker(MemoryTracker):
    """Also follows storages that an engine empties and fills again, and looks inside of sharded tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the sharded tensor calls again with its local part
        return super().__torch_dispatch__(func, types, args, kwargs)

    @contextmanager
    def following_resizes(self):
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            result = original(storage, size)
            if size != before:
                known = self._live.get(storage._cdata)
                if known is not None:
                    self._lose(storage._cdata, known[0])
                self._see(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), "resize_")
            return result

        torch.UntypedStorage.resize_ = resize
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original


class ShardedRuntime(planned.PlannedRuntime):
    """Reads no values: those of sharded tensors would have to be gathered first."""

    def read(self, *scalars: torch.Tensor) -> list[float]:
        return [float("nan")] * len(scalars)


def fsdp2_peak(config: RunConfig, architecture: TheWorldConfig, ranks: int, device: planned.DeviceKind) -> Peak:
    """Returns the peak of one rank's second step, each layer and the rest of the stage a unit."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        return _peak(config, architecture, ranks, device)
    finally:
        dist.destroy_process_group()


def _peak(config: RunConfig, architecture: TheWorldConfig, ranks: int, device: planned.DeviceKind) -> Peak:
    mesh = init_device_mesh("cpu", (ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    stored = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    model = build_on_meta(architecture)
    tracker = ShardedTracker()
    with KnowingFakeMode():
        planned.materialise(model, torch.bfloat16)
        apply_trainable(model, trainable_components(config), config.precision)
        ledger = build_ledger(model, config)
        stage = build_stage(model, config)
        stage.lockstep = True
        units = planned._units(stage, model)
        with tracker, tracker.following_resizes():
            for unit in units:
                own = stored if unit == "world_encoder" else policy
                fully_shard(model.get_submodule(unit), mesh=mesh, mp_policy=own)
            fully_shard(stage, mesh=mesh, mp_policy=policy)
            for tensor in [*model.parameters(), *model.buffers()]:
                tracker._see(tensor.to_local() if hasattr(tensor, "to_local") else tensor, "")
        optimizer = build_optimizer(model, config)
        if device == "cuda":
            for group in optimizer.param_groups:
                group["foreach"] = True
        shape = planned.sample_shape(config, architecture)
        batch = planned.synthetic_batch(architecture, shape, config.training.micro_batch_size)
        trainer = Trainer(
            config=config,
            ledger=ledger,
            runtime=ShardedRuntime(),
            stage=stage,
            engine=PhasedEngine(planned.PlannedEngine(stage, lambda: optimizer), tracker.enter_phase),
            max_steps=2,
            first_step=0,
            windows=None,
            quarantine=Quarantine(),
        )
        stage.set_training_modes()
        with tracker.following_resizes(), tracker, tracker.watching(model, {}, ()):
            for step in range(2):
                tracker.begin_step(step)
                if device == "cuda":
                    with cuda_semantics():
                        trainer.step(Window(step, (batch,), ()))
                else:
                    trainer.step(Window(step, (batch,), ()))
            trace = tracker.finish()
    return Timeline(trace.events, spans(trace), CUDA_BLOCK if device == "cuda" else 1).peak(1)
