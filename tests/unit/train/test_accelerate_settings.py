"""Protects decision 12: what `accelerate launch` passes agrees with the run config or is refused, with both values.

The variables are those that the installed Accelerate really exports, for the files that ship and for others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from theworld_train.config import ConfigError, RunConfig, parse_run_config
from theworld_train.train.accelerate_settings import take_over

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "launch/accelerate").rglob("*.yaml"))
OPTIMIZER_DEVICE = "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"
PARAM_DEVICE = "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")

Export = Callable[..., dict[str, str]]


def config(strategy: str = "ddp", precision: str = "bf16", training: Any = None, **runtime: Any) -> RunConfig:
    return parse_run_config(
        {
            "name": "run",
            "output_dir": "runs/run",
            "precision": precision,
            "trainable": {"world_projector": {}},
            "data": {"train": {"source": "jsonl", "path": "train.jsonl"}},
            "training": {"max_steps": 1, "global_batch_size": 32, "micro_batch_size": 1} | (training or {}),
            "runtime": {"strategy": strategy} | runtime,
        }
    )


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Export:
    """Returns what `accelerate launch` adds to the environment of the ranks, by Accelerate's own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def variables(file: Path, *flags: str) -> dict[str, str]:
        words = ["--config_file", str(file), "--main_process_port", "0", *flags, "-m", "theworld_train", "train", "c"]
        args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            _, environment = prepare_deepspeed_cmd_env(args)
        else:
            environment = prepare_multi_gpu_env(args)
        # What torchrun adds: 32 samples on 8 ranks are 4 micro-batches.
        return environment | {"WORLD_SIZE": str(args.num_processes), "LOCAL_WORLD_SIZE": "8"}

    return variables


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Writes an Accelerate file for one machine of 8 GPUs."""

    def write(distributed_type: str, **fields: Any) -> Path:
        path = tmp_path / "accelerate.yaml"
        topology = {"num_machines": 1, "num_processes": 8}
        path.write_text(yaml.safe_dump({"distributed_type": distributed_type} | topology | fields))
        return path

    return write


def problems(settings: RunConfig, environment: dict[str, str]) -> dict[str | None, str]:
    with pytest.raises(ConfigError) as error:
        take_over(settings, environment)
    return {problem.key: str(problem) for problem in error.value.problems}


# -- the files that ship ----------------------------------------------------------------------------------------------


def test_every_strategy_has_its_files_for_one_machine_and_for_several():
    assert {path.stem for path in FILES} == {f"{name}{nodes}" for name in STRATEGIES for nodes in ("", "-multi-node")}
    for name in STRATEGIES:
        one, several = (yaml.safe_load((FILES[0].parent / f"{name}{s}.yaml").read_text()) for s in ("", "-multi-node"))
        assert one["num_processes"] * several["num_machines"] == several["num_processes"]
        topology = {"num_machines", "num_processes", "machine_rank", "main_process_ip", "main_process_port"}
        topology |= {"rdzv_backend", "same_network"}
        assert {key: value for key, value in several.items() if key not in topology} == {
            key: value for key, value in one.items() if key not in topology
        }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_file_is_taken_for_its_own_strategy_and_refused_for_another(path: Path, strategy: str, export: Export):
    environment = export(path)
    own = path.stem.removesuffix("-multi-node")
    # A file of MULTI_GPU names no engine, so it serves every strategy.
    if own in (strategy, "ddp"):
        take_over(config(strategy), environment)
        left = [
            name for name in environment if name.startswith(("ACCELERATE_", "FSDP_")) and "CPU_AFFINITY" not in name
        ]
        assert left == [], "Accelerate would make an engine of these"
        return
    found = problems(config(strategy), environment)
    key = "FSDP_VERSION" if own == "fsdp2" else "ACCELERATE_DEEPSPEED_ZERO_STAGE"
    value = "2" if own == "fsdp2" else own.removeprefix("zero")
    assert list(found) == [key]
    assert f"'{value}' contradicts runtime.strategy: '{strategy}' of the run config" in found[key]


# -- single fields ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "settings", "variable", "values"),
    [
        ({"offload_optimizer_device": "cpu"}, {}, OPTIMIZER_DEVICE, ("'cpu'", "'none'")),
        ({"offload_optimizer_device": "nvme"}, {"offload": "optimizer"}, OPTIMIZER_DEVICE, ("'nvme'", "'optimizer'")),
        ({"offload_optimizer_device": "cpu"}, {"offload": "all"}, PARAM_DEVICE, ("'none'", "'all'")),
        ({"gradient_accumulation_steps": 2}, {}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("'2'", "4")),
        ({"gradient_clipping": 0.5}, {}, "ACCELERATE_GRADIENT_CLIPPING", ("'0.5'", "1.0")),
    ],
)
def test_field_of_deepspeed_that_contradicts(
    fields: dict[str, Any], settings: dict[str, Any], variable: str, values: tuple[str, str], export: Export, file: Any
):
    environment = export(file("DEEPSPEED", deepspeed_config={"zero_stage": 3} | fields))
    before = dict(environment)
    found = problems(config("zero3", **settings), environment)
    assert list(found) == [variable]
    assert all(value in found[variable] for value in values)
    assert environment == before, "nothing is taken out of an environment that is refused"


def test_fields_of_deepspeed_that_agree(export: Export, file: Any):
    fields = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "cpu"}
    fields |= {"gradient_accumulation_steps": 4, "gradient_clipping": 1.0}
    environment = export(file("DEEPSPEED", deepspeed_config=fields, mixed_precision="bf16"))
    take_over(config("zero3", offload="all"), environment)


def deepspeed_file(directory: Path, **fields: Any) -> dict[str, Any]:
    path = directory / "deepspeed.json"
    path.write_text(json.dumps(fields))
    return {"deepspeed_config_file": str(path)}


def test_deepspeed_config_is_compared_field_by_field(export: Export, file: Any, tmp_path: Path):
    fields = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "fp16": {"enabled": False},
        "amp": {"enabled": False},
        "bf16": {"enabled": True},
    }
    environment = export(file("DEEPSPEED", deepspeed_config=deepspeed_file(tmp_path, **fields)))
    found = problems(config("zero2"), environment)
    assert set(found) == {"gradient_accumulation_steps", "zero_optimization.offload_optimizer.device", "bf16.enabled"}
    assert "asks for 4 (got 2)" in found["gradient_accumulation_steps"]
    assert "has no such setting (got 'cpu')" in found["zero_optimization.offload_optimizer.device"]


def test_deepspeed_config_that_agrees(export: Export, file: Any, tmp_path: Path):
    fields = {"gradient_accumulation_steps": 4, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}
    environment = export(file("DEEPSPEED", deepspeed_config=deepspeed_file(tmp_path, **fields)))
    take_over(config("zero2"), environment)
    environment = export(file("DEEPSPEED", deepspeed_config=deepspeed_file(tmp_path, **fields)))
    assert list(problems(config("fsdp2"), environment)) == ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_deepspeed_config_that_cannot_be_read(text: str | None, export: Export, file: Any, tmp_path: Path):
    named = deepspeed_file(tmp_path)
    environment = export(file("DEEPSPEED", deepspeed_config=named))
    path = Path(named["deepspeed_config_file"])
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert "cannot be read as DeepSpeed's config" in problems(config("zero2"), environment)[None]


@pytest.mark.parametrize(
    ("fields", "settings", "variable", "values"),
    [
        ({"fsdp_version": 1}, {}, "FSDP_VERSION", ("'1'", "'fsdp2'")),
        ({"fsdp_offload_params": True}, {}, "FSDP_OFFLOAD_PARAMS", ("'true'", "'none'")),
        ({}, {"offload": "all"}, "FSDP_OFFLOAD_PARAMS", ("'false'", "'all'")),
        ({"fsdp_reshard_after_forward": False}, {}, "FSDP_RESHARD_AFTER_FORWARD", ("'false'", "true")),
        ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, {}, "FSDP_AUTO_WRAP_POLICY", ("SIZE_BASED_WRAP", "TRANSFORMER")),
        (
            {"fsdp_activation_checkpointing": True},
            {"training": {"gradient_checkpointing": "none"}},
            "FSDP_ACTIVATION_CHECKPOINTING",
            ("'true'", "'none'"),
        ),
    ],
)
def test_field_of_fsdp_that_contradicts(
    fields: dict[str, Any], settings: dict[str, Any], variable: str, values: tuple[str, str], export: Export, file: Any
):
    found = problems(config("fsdp2", **settings), export(file("FSDP", fsdp_config={"fsdp_version": 2} | fields)))
    assert list(found) == [variable]
    assert all(value in found[variable] for value in values)


def test_mesh_of_fsdp(export: Export, file: Any):
    mesh = {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 8}
    fields = {"num_machines": 2, "num_processes": 16, "main_process_ip": "n0", "fsdp_config": {"fsdp_version": 2}}
    path = file("FSDP", parallelism_config=mesh, **fields)
    take_over(config("fsdp2", hybrid=True), export(path))
    found = problems(config("fsdp2"), export(path))
    assert set(found) == {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE"}
    assert "'2' contradicts runtime.hybrid: False" in found["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"]
    path = file("FSDP", parallelism_config={"parallelism_config_tp_size": 2}, **fields)
    assert "PARALLELISM_CONFIG_TP_SIZE" in problems(config("fsdp2"), export(path))


@pytest.mark.parametrize(("asked", "precision"), [("bf16", "fp32"), ("fp16", "bf16"), ("fp16", "fp32")])
def test_other_precision(asked: str, precision: str, export: Export, file: Any):
    found = problems(config(precision=precision), export(file("MULTI_GPU", mixed_precision=asked)))
    assert list(found) == ["ACCELERATE_MIXED_PRECISION"]
    assert f"'{asked}' contradicts precision: '{precision}'" in found["ACCELERATE_MIXED_PRECISION"]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_that_agrees_or_is_not_said(precision: str, export: Export, file: Any):
    take_over(config(precision=precision), export(file("MULTI_GPU")))
    if precision == "bf16":
        take_over(config(precision=precision), export(file("MULTI_GPU", mixed_precision="bf16")))


def test_compilation_and_megatron(export: Export, file: Any):
    environment = export(file("MULTI_GPU", dynamo_config={"dynamo_backend": "INDUCTOR"}))
    environment["ACCELERATE_USE_MEGATRON_LM"] = "true"
    assert set(problems(config(), environment)) == {"ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_MEGATRON_LM"}


@pytest.mark.parametrize(("steps", "wrong"), [("4", False), ("2", True), ("four", True)])
def test_accumulation_without_deepspeed(steps: str, wrong: bool):
    environment = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": steps, "WORLD_SIZE": "8"}
    if wrong:
        found = problems(config(), environment)["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"]
        assert f"'{steps}' contradicts accumulation by training.global_batch_size: 4" in found
    else:
        take_over(config(), environment)
        assert environment == {"WORLD_SIZE": "8"}


def test_environment_without_accelerate_stays_as_it_is():
    environment = {"PATH": "/bin", "WORLD_SIZE": "2", "MASTER_ADDR": "n0"}
    take_over(config("zero3"), environment)
    assert environment == {"PATH": "/bin", "WORLD_SIZE": "2", "MASTER_ADDR": "n0"}
