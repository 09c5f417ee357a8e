"""Fail when DeepSpeed moves a seam that the ZeRO engine is built on, few of which it promises."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from theworld_train.config import parse_run_config
from theworld_train.train.engine import MAX_LIVE, PREFETCH_BUCKET, REDUCE_BUCKET, REUSE_DISTANCE, deepspeed_settings

logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
deepspeed = pytest.importorskip("deepspeed")

from deepspeed.accelerator import real_accelerator  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: E402
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3, stage_1_and_2  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402


def settings(strategy: str, offload: str = "none") -> dict[str, Any]:
    config = parse_run_config(
        {
            "name": "run",
            "output_dir": "unused",
            "trainable": {"world_projector": {}},
            "data": {"train": {"source": "moving_digits", "split": "train", "samples": 8}},
            "training": {"max_steps": 1},
            "runtime": {"strategy": strategy, "offload": offload},
        }
    )
    return deepspeed_settings(config, 8)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (deepspeed.initialize, "model optimizer config dist_init_required"),
        (DeepSpeedEngine.set_gradient_accumulation_boundary, "is_boundary"),
        (DeepSpeedEngine.coalesce_grad_reduction, ""),
        (DeepSpeedEngine.gradient_clipping, ""),
        (DeepSpeedEngine.get_global_grad_norm, ""),
        (deepspeed.utils.set_z3_leaf_modules, "model leaf_module_classes"),
        (deepspeed.utils.safe_get_full_optimizer_state, "param optim_state_key"),
        (deepspeed.utils.safe_set_full_optimizer_state, "param value optim_state_key"),
        (deepspeed.utils.safe_set_local_optimizer_state, "param value optim_state_key"),
        (deepspeed.zero.GatheredParameters.__init__, "params"),
        (stage_1_and_2.DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state, ""),
    ],
)
def test_what_we_call_takes_what_we_pass(function: Callable[..., Any], names: str):
    assert set(names.split()) <= inspect.signature(function).parameters.keys()


def test_a_loss_need_not_be_divided_by_micro_batches():
    assert "scale_wrt_gas" in inspect.getsource(DeepSpeedEngine), "its signature hides behind a wrapper"


def test_shards_are_kept_where_we_make_the_optimizers_state():
    assert "self.fp32_partitioned_groups_flat.append(" in inspect.getsource(stage3.DeepSpeedZeroOptimizer_Stage3)
    assert "self.single_partition_of_fp32_groups.append(" in inspect.getsource(stage_1_and_2.DeepSpeedZeroOptimizer)


def test_limits_of_zero3_are_read_by_their_names():
    zero = DeepSpeedZeroConfig(**settings("zero3", "all")["zero_optimization"])
    assert (zero.max_live_parameters, zero.max_reuse_distance) == (MAX_LIVE, REUSE_DISTANCE)
    assert (zero.prefetch_bucket_size, zero.reduce_bucket_size) == (PREFETCH_BUCKET, REDUCE_BUCKET)
    assert (zero.offload_optimizer.device, zero.offload_param.device) == ("cpu", "cpu")
    with pytest.raises(ValueError, match="stage3_max_life"):
        DeepSpeedZeroConfig(stage=3, stage3_max_life=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero3_gathers_weights_as_they_are_stored(dtype: torch.dtype):
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    assert partition_parameters.get_allgather_dtype(parameter, parameter.data) == dtype


def test_recomputed_layers_of_frozen_weights_are_gathered_again():
    """Without it, ZeRO-3 with checkpointing and frozen weights fails in the backward pass (DeepSpeed#8130)."""
    assert hasattr(partitioned_param_coordinator, "update_recompute_parameters")


def test_what_it_says_at_every_start_is_what_we_leave_out():
    assert "Setting accelerator to CPU" in inspect.getsource(real_accelerator)
    assert logging.getLogger("DeepSpeed") is deepspeed.utils.logger
