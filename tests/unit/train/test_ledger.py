"""The ledger counts every parameter once and holds a run to what its config expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.accounting.ledger import LedgerRow, ParameterLedger, lines
from theworld_train.assemble.model import ledger_of
from theworld_train.config import load_run_config
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig
from theworld_train.model.adapters import Adapter
from theworld_train.model.build import gemma_4b_config
from theworld_train.model.components import component_parameters
from theworld_train.train.checkpoint import take_snapshot
from theworld_train.train.engine import ReplicatedEngine
from theworld_train.train.freeze import apply_trainable
from theworld_train.train.groups import build_optimizer, parameter_groups
from theworld_train.train.ledger import (
    adapters,
    add_adapters,
    build_ledger,
    check_expectation,
    check_wrapped,
    count_parameters,
    global_size,
    saved_names,
    trainable_components,
)

Config = Callable[..., RunConfig]
SHIPPED = Path(__file__).parents[3] / "configs" / "stages"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("number", range(len(Component) + 1))
def test_rows_add_up_to_the_model(tiny: TinyCheckpoint, run_config: Config, precision: Any, number: int):
    """Whatever trains, in whatever precision: every parameter and every byte is in exactly one row and column."""
    model = tiny.theworld()
    unique = {id(parameter): parameter for parameter in model.parameters()}.values()
    for trainable in combinations(Component, number):
        apply_trainable(model, trainable, precision)
        ledger = build_ledger(model, run_config(*trainable, precision=precision))
        assert [row.component for row in ledger.rows] == [component.value for component in Component]
        assert ledger.total == sum(row.total for row in ledger.rows) == sum(p.numel() for p in unique)
        assert ledger.trainable == sum(p.numel() for p in unique if p.requires_grad)
        stored = sum(row.weight_bytes + row.master_bytes for row in ledger.rows)
        assert stored == sum(p.numel() * p.element_size() for p in unique)
        for row in ledger.rows:
            trains = Component(row.component) in trainable
            assert row.trainable == (row.total if trains else 0)
            assert row.master_bytes == (4 * row.trainable if precision == "bf16" else 0)
            assert row.gradient_bytes == 4 * row.trainable
            assert (row.lr is not None) is (row.weight_decay is not None) is trains
            in_fp32 = trains or precision == "fp32" or row.component == "world_encoder"
            assert row.dtypes == {"float32" if in_fp32 else "bfloat16": row.total}


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_optimizer_bytes_are_those_of_its_state(
    tiny: TinyCheckpoint, run_config: Config, trainable: tuple[Component, ...], name: str, precision: Any
):
    model, config = tiny.theworld(), run_config(*trainable, optimizer={"name": name}, precision=precision)
    apply_trainable(model, trainable, precision)
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    owners = {name: c.value for c, group in component_parameters(model).items() for name in group}
    held = dict.fromkeys((component.value for component in Component), 0)
    kept = take_snapshot(model, ReplicatedEngine(model, lambda: optimizer), (), keep=True).optimizer
    for key, tensor in kept.items():
        held[owners[key.split("::")[0]]] += tensor.numel() * tensor.element_size()
    assert {row.component: row.optimizer_bytes for row in build_ledger(model, config).rows} == held
    if name == "adamw_8bit":
        assert {tensor.dtype for key, tensor in kept.items() if key.endswith("::state1")} == {
            torch.uint8,
            torch.float32,
        }


def test_an_adapter_is_a_part_of_its_component(tiny: TinyCheckpoint, run_config: Config):
    plain = build_ledger(tiny.theworld(), run_config())
    config = run_config(
        trainable={"language_model": {"adapter": "lora", "r": 2, "lr": 0.1}, "world_projector": {}}, precision="bf16"
    )
    model = tiny.theworld()
    add_adapters(model, config)
    apply_trainable(model, trainable_components(config), config.precision)
    ledger = build_ledger(model, config)
    _, _, before, _, _ = plain.rows
    _, _, row, _, _ = ledger.rows
    factors = row.parts["adapter"]
    assert factors == 2 * sum(
        sum(layer.weight.shape)
        for layer in tiny.theworld().model.language_model.modules()
        if isinstance(layer, nn.Linear)
    )
    assert (row.total, row.trainable) == (before.total + factors, factors)
    assert row.parts == {**before.parts, "adapter": factors}
    assert row.dtypes == {"bfloat16": before.total, "float32": factors}
    assert row.dtype == "bfloat16+float32"
    assert (row.weight_bytes, row.master_bytes, row.gradient_bytes) == (2 * before.total, 4 * factors, 4 * factors)
    assert row.ties == before.ties
    assert row.lr == 0.1
    assert ledger.total == plain.total + factors
    check_expectation(ledger, config.model_copy(update={"expect_trainable": factors + 12_000}))


def test_adapters_have_the_configs_shape_or_the_defaults(run_config: Config):
    stated = {"adapter": "lora", "r": 3, "alpha": 1.5, "dropout": 0.25, "target_modules": ["q_proj", "v_proj"]}
    config = run_config(
        trainable={"language_model": stated, "vision_tower": {"adapter": "lora"}, "world_projector": {}}
    )
    assert adapters(config) == {
        Component.LANGUAGE_MODEL: Adapter(3, 1.5, 0.25, ("q_proj", "v_proj")),
        Component.VISION_TOWER: Adapter(16, 32.0, 0.0, None),
    }
    assert saved_names(config) == ("language_model.adapter", "vision_tower.adapter", "world_projector")


def test_tied_head_counts_once_and_is_named(tiny: TinyCheckpoint, run_config: Config):
    model = tiny.theworld()
    ledger = build_ledger(model, run_config())
    ties = {row.component: row.ties for row in ledger.rows}
    assert ties.pop("language_model") == (("model.language_model.embed_tokens.weight", "lm_head.weight"),)
    assert set(ties.values()) == {()}


def test_equal_weights_that_are_not_shared_are_no_tie():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    model["b"].load_state_dict(model["a"].state_dict())
    assert [row.ties for row in count_parameters(model, dict(model.items())).rows] == [(), ()]


def test_a_component_map_with_gaps_or_overlaps_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)})
    with pytest.raises(AssertionError, match=r"without a component: \['b.weight', 'b.bias'\]"):
        count_parameters(model, {"a": model["a"]})
    with pytest.raises(AssertionError, match="of another component"):
        count_parameters(model, {"a": model["a"], "b": model["b"], "both": model})


def test_a_ledger_that_does_not_add_up_cannot_be_made(tiny: TinyCheckpoint, run_config: Config):
    ledger = build_ledger(tiny.theworld(), run_config())
    row = ledger.rows[0]
    with pytest.raises(AssertionError, match="the model has"):
        ParameterLedger(ledger.rows[1:], ledger.total)
    with pytest.raises(AssertionError, match="two rows"):
        ParameterLedger((*ledger.rows, row), ledger.total + row.total)
    for wrong in ({"total": row.total + 1}, {"trainable": row.total + 1}, {"decayed": 1}, {"dtypes": {}}):
        with pytest.raises(AssertionError):
            LedgerRow(**vars(row) | wrong)


def test_rates_are_those_of_the_config(tiny: TinyCheckpoint, run_config: Config):
    config = run_config(
        trainable={"world_projector": {"lr": 1e-2}, "vision_tower": {"weight_decay": 0.5}},
        optimizer={"lr": 1e-4, "weight_decay": 0.1},
    )
    model = tiny.theworld()
    apply_trainable(model, trainable_components(config), "fp32")
    rows = {row.component: (row.lr, row.weight_decay) for row in build_ledger(model, config).rows if row.trainable}
    assert rows == {"world_projector": (1e-2, 0.1), "vision_tower": (1e-4, 0.5)}


def test_decay_is_that_of_the_optimizers_groups(tiny: TinyCheckpoint, run_config: Config):
    config = run_config("world_projector", "vision_tower", optimizer={"weight_decay": 0.1})
    model = tiny.theworld()
    apply_trainable(model, trainable_components(config), "fp32")
    decayed = {
        group["name"].split("/")[0]: sum(parameter.numel() for parameter in group["params"])
        for group in parameter_groups(model, config)
        if group["weight_decay"]
    }
    rows = {row.component: row.decayed for row in build_ledger(model, config).rows}
    assert rows == dict.fromkeys(rows, 0) | decayed
    assert 0 < rows["world_projector"] < 12_000
    apart = run_config("world_projector", optimizer={"weight_decay": 0.0})
    assert {row.decayed for row in build_ledger(model, apart).rows} == {0}


def test_unexpected_number_is_printed(tiny: TinyCheckpoint, run_config: Config):
    model = tiny.theworld()
    apply_trainable(model, [Component.WORLD_PROJECTOR], "fp32")
    config = run_config(expect_trainable=12_001)
    ledger = build_ledger(model, config)
    with pytest.raises(ConfigError) as caught:
        check_expectation(ledger, config)
    (problem,) = caught.value.problems
    assert problem.key == "expect_trainable"
    assert "12000" in problem.message
    assert "12001" in problem.message
    assert "expect_trainable: 12000" in str(problem.hint)
    check_expectation(ledger, run_config(expect_trainable=12_000))
    check_expectation(ledger, run_config())


# -- wrapped models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """A process group of four ranks, of which only the first exists."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("four_ranks")
def test_shards_count_by_their_global_size(tiny: TinyCheckpoint, run_config: Config):
    config = run_config("world_projector", "vision_tower")
    model = tiny.theworld()
    apply_trainable(model, trainable_components(config), "fp32")
    whole = build_ledger(model, config)
    mesh = init_device_mesh("cpu", (4,))
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                shard = nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)]), parameter.requires_grad)
                module.register_parameter(name, shard)
    model.tie_weights()
    projection = model.world_projector.projection[0].weight
    assert 4 * projection.to_local().numel() == projection.numel() == global_size(projection)
    assert build_ledger(model, config) == whole
    check_wrapped(whole, model, model)


def test_a_parameter_that_zero_has_emptied_counts_in_full():
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_numel = 12
    assert global_size(parameter) == 12


def test_an_engine_that_changes_the_model_is_refused(tiny: TinyCheckpoint, run_config: Config):
    config = run_config("world_projector")
    model = tiny.theworld()
    apply_trainable(model, trainable_components(config), "fp32")
    ledger = build_ledger(model, config)
    check_wrapped(ledger, model, model)
    with pytest.raises(ConfigError, match="the engine wraps 0 of them"):
        check_wrapped(ledger, model.model.vision_tower, model)
    model.model.vision_tower.requires_grad_(True)
    with pytest.raises(ConfigError) as caught:
        check_wrapped(ledger, model, model)
    assert caught.value.problems[0].key == "vision_tower"
    assert "0 trainable of 117312 parameters, the wrapped model has 117312 of 117312" in str(caught.value)
    apply_trainable(model, trainable_components(config), "fp32")
    model.model.language_model.norm.weight = nn.Parameter(torch.ones(1), requires_grad=False)
    with pytest.raises(ConfigError, match="language_model"):
        check_wrapped(ledger, model, model)


# -- at full size -----------------------------------------------------------------------------------------------------


class Predecessor(nn.Module):
    """The first implementation of TheWorld: Gemma 3 4B with a shrunk embedding, a whole video VAE and a projection."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        config = gemma_4b_config()
        # Adding two tokens resized the embedding to the tokenizer's 262,145 tokens, from 262,208 rows.
        text = config.text_config.to_dict() | {"vocab_size": 262_147}
        vision = config.vision_config.to_dict()
        self.gemma = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
        self.gemma.tie_weights()
        self.vae = AutoencoderKLWan()
        self.projection = projection

    @property
    def components(self) -> dict[str, nn.Module]:
        return {
            "vision_tower": self.gemma.model.vision_tower,
            "multi_modal_projector": self.gemma.model.multi_modal_projector,
            "language_model": self.gemma.model.language_model,
            "vae_encoder": self.vae.encoder,
            "vae_quant_conv": self.vae.quant_conv,
            "vae_post_quant_conv": self.vae.post_quant_conv,
            "vae_decoder": self.vae.decoder,
            "projection": self.projection,
        }


def test_the_predecessors_default_trained_what_it_called_temporal_embeddings():
    with torch.device("meta"):
        model = Predecessor(nn.Linear(16, 2560))
    for frozen in (model.gemma.model.vision_tower, model.gemma.model.language_model, model.vae.encoder):
        frozen.requires_grad_(False)
    ledger = count_parameters(model, model.components)
    assert (ledger.total, ledger.trainable) == (4_426_859_363, 76_290_451)
    trained = {row.component: row.trainable for row in ledger.rows if row.trainable}
    assert trained.pop("projection") == 43_520
    assert sum(trained.values()) == 76_246_931
    assert trained == {
        "multi_modal_projector": 2_950_272,
        "vae_quant_conv": 1_056,
        "vae_post_quant_conv": 272,
        "vae_decoder": 73_295_331,
    }


def test_the_predecessors_profile_trained_the_projection_alone():
    with torch.device("meta"):
        model = Predecessor(nn.Sequential(nn.Linear(16, 2560), nn.GELU(), nn.Linear(2560, 2560), nn.GELU()))
    model.gemma.requires_grad_(False)
    model.vae.requires_grad_(False)
    ledger = count_parameters(model, model.components)
    assert (ledger.total, ledger.trainable) == (4_433_415_523, 6_599_680)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_stages_expect_what_the_full_size_model_has(path: Path):
    config = load_run_config(path)
    assert config.expect_trainable is not None
    ledger = ledger_of(config)
    check_expectation(ledger, config)
    vision, projector, language, encoder, _ = ledger.rows
    base = language.total - language.parts.get("adapter", 0)
    assert vision.total + projector.total + base == 4_300_079_472
    assert vision.total == 416_866_032
    assert encoder.total == 53_595_872 + 32 * 32 + 32  # the encoder, and the quant conv behind it


def test_the_24_gb_stage_trains_two_factors_for_each_linear_layer():
    config = load_run_config(SHIPPED / "language-24gb.yaml")
    _, _, row, _, _ = ledger_of(config).rows
    shapes = [(2560, 2048), (2560, 1024), (2560, 1024), (2048, 2560), (2560, 10240), (2560, 10240), (10240, 2560)]
    assert row.trainable == 34 * 16 * sum(wide + narrow for wide, narrow in shapes) == 29_802_496
    assert config.optimizer.name == "adamw_8bit"
    # A byte for each number of the two moments, and 4 for each 256: all factors have more than 4,096 numbers.
    assert row.optimizer_bytes == 2 * row.trainable * 260 // 256 + 4 * 34 * 7 * 2


def test_lines_show_each_component_with_rate_and_dtype(tiny: TinyCheckpoint, run_config: Config):
    model = tiny.theworld()
    apply_trainable(model, [Component.WORLD_PROJECTOR], "bf16")
    header, *rows = lines(build_ledger(model, run_config(optimizer={"lr": 2e-4})))
    assert header.split() == ["component", "parameters", "trainable", "dtype", "peak", "rate"]
    assert rows[0].split() == ["vision_tower", "117,312", "0", "bfloat16", "frozen"]
    assert rows[4].split() == ["world_projector", "12,000", "12,000", "float32", "0.0002"]
    assert rows[5].split() == ["total", "614,848", "12,000", "1.95%"]


def test_components_come_in_the_order_of_the_vocabulary(run_config: Config):
    config = run_config("world_projector", "language_model", "vision_tower")
    assert trainable_components(config) == (
        Component.VISION_TOWER,
        Component.LANGUAGE_MODEL,
        Component.WORLD_PROJECTOR,
    )
