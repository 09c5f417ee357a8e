"""What engines gather, in which precision, and what they are told; that they train alike is shown in `numerics/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.assemble.model import build_stage
from theworld_train.config.schema import RunConfig
from theworld_train.train.engine import MAX_LIVE, PREFETCH_BUCKET, REUSE_DISTANCE, ShardedEngine, deepspeed_settings
from theworld_train.train.freeze import apply_trainable
from theworld_train.train.groups import build_optimizer
from theworld_train.train.ledger import trainable_components
from theworld_train.train.stage import StageModule

Config = Callable[..., RunConfig]
FULL = ("world_projector", "vision_tower", "multi_modal_projector", "language_model", "world_encoder")


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    """A process group of two ranks whose collectives exchange nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def shard(tiny: TinyCheckpoint, run_config: Config, fake_ranks: None) -> Callable[..., StageModule]:
    """Shards a stage over two ranks."""

    def make(precision: str, *components: str) -> StageModule:
        config = run_config(*components, precision=precision, runtime={"strategy": "fsdp2"})
        model = tiny.theworld(dtype="auto")
        apply_trainable(model, trainable_components(config), config.precision)
        stage = build_stage(model, config)
        ShardedEngine(stage, lambda: build_optimizer(model, config), config, init_device_mesh("cpu", (2,)))
        return stage

    return make


def gathered_dtypes(stage: StageModule) -> dict[str, torch.dtype]:
    """Returns the dtype of each parameter inside of the stage as it is computed with."""
    units = [module for module in stage.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    dtypes = {name: parameter.dtype for name, parameter in stage.named_parameters()}
    assert not any(isinstance(parameter, DTensor) for parameter in stage.parameters())
    for unit in units:
        unit.reshard()
    return dtypes


def test_only_the_world_encoder_is_gathered_in_fp32_under_bf16(shard: Callable[..., StageModule]):
    stage = shard("bf16", *FULL)
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.float32}, "masters are kept in fp32"
    dtypes = gathered_dtypes(stage)
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert exact == {name for name in dtypes if name.startswith("parts.world_encoder.")}
    assert exact, "the encoder is inside, as it trains"
    assert dtypes["parts.language_model.embed_tokens.weight"] == torch.bfloat16


def test_everything_is_gathered_in_fp32_under_fp32(shard: Callable[..., StageModule]):
    assert set(gathered_dtypes(shard("fp32", *FULL)).values()) == {torch.float32}


def test_frozen_weights_beside_masters_are_gathered_alike(shard: Callable[..., StageModule]):
    stage = shard("bf16", "world_projector", "multi_modal_projector")
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.float32, torch.bfloat16}
    assert set(gathered_dtypes(stage).values()) == {torch.bfloat16}
    assert not any("world_encoder" in name for name, _ in stage.named_parameters())


def test_tied_head_stays_tied_sharded_and_gathered(shard: Callable[..., StageModule]):
    stage = shard("bf16", *FULL)
    embedding, head = stage.model.get_input_embeddings(), stage.parts["lm_head"]
    assert isinstance(embedding.weight, DTensor)
    assert head.weight is embedding.weight
    assert isinstance(stage, FSDPModule)
    stage.unshard()
    assert not isinstance(head.weight, DTensor)
    assert head.weight is embedding.weight


def test_zero3_gathers_a_bounded_number_of_weights(run_config: Config):
    zero = deepspeed_settings(run_config(runtime={"strategy": "zero3"}), 1)["zero_optimization"]
    assert (zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"]) == (MAX_LIVE, REUSE_DISTANCE)
    assert zero["stage3_prefetch_bucket_size"] == PREFETCH_BUCKET
    assert PREFETCH_BUCKET < REUSE_DISTANCE < MAX_LIVE < 1e9, "DeepSpeed's own limit is a billion: 4 GB"
    zero2 = deepspeed_settings(run_config(runtime={"strategy": "zero2"}), 1)["zero_optimization"]
    assert not [key for key in zero2 if key.startswith("stage3")]
