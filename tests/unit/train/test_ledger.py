"""The ledger counts every parameter once and holds a run to what its config expects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.accounting.ledger import lines
from theworld_train.config import load_run_config
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig
from theworld_train.model.build import build_on_meta, gemma_4b_config
from theworld_train.train.freeze import apply_trainable
from theworld_train.train.ledger import build_ledger, check_expectation, trainable_components

Config = Callable[..., RunConfig]
SHIPPED = Path(__file__).parents[3] / "configs" / "stages"


def test_rows_add_up_to_the_model(tiny: TinyCheckpoint, run_config: Config, trainable: tuple[Component, ...]):
    model = tiny.theworld()
    apply_trainable(model, trainable, "bf16")
    ledger = build_ledger(model, run_config(*trainable))
    unique = {id(parameter): parameter for parameter in model.parameters()}.values()
    assert [row.component for row in ledger.rows] == [component.value for component in Component]
    assert ledger.total == sum(parameter.numel() for parameter in unique)
    assert ledger.trainable == sum(parameter.numel() for parameter in unique if parameter.requires_grad)
    assert sum(row.weight_bytes for row in ledger.rows) == sum(p.numel() * p.element_size() for p in unique)
    for row in ledger.rows:
        trains = row.component in {component.value for component in trainable}
        assert row.trainable == (row.total if trains else 0)
        assert (row.gradient_bytes, row.optimizer_bytes) == (4 * row.trainable, 8 * row.trainable)
        assert (row.lr is not None) is trains
        assert 0 < row.decayed < row.total if trains else row.decayed == 0
        assert row.dtype == ("float32" if trains or row.component == "world_encoder" else "bfloat16")


def test_tied_head_counts_once_and_is_named(tiny: TinyCheckpoint, run_config: Config):
    model = tiny.theworld()
    ledger = build_ledger(model, run_config())
    ties = {row.component: row.ties for row in ledger.rows}
    assert ties.pop("language_model") == ("lm_head.weight",)
    assert set(ties.values()) == {()}


def test_rates_are_those_of_the_config(tiny: TinyCheckpoint, run_config: Config):
    config = run_config(
        trainable={"world_projector": {"lr": 1e-2}, "vision_tower": {"weight_decay": 0.5}},
        optimizer={"lr": 1e-4, "weight_decay": 0.1},
    )
    model = tiny.theworld()
    apply_trainable(model, trainable_components(config), "fp32")
    rows = {row.component: (row.lr, row.weight_decay) for row in build_ledger(model, config).rows if row.trainable}
    assert rows == {"world_projector": (1e-2, 0.1), "vision_tower": (1e-4, 0.5)}


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


@pytest.mark.parametrize("stage", ["projection", "vision", "language", "full"])
def test_shipped_stages_expect_what_the_full_size_model_has(stage: str):
    config = load_run_config(SHIPPED / f"{stage}.yaml")
    world = config.model.world
    model = build_on_meta(
        gemma_4b_config(
            world_projection=world.projection, world_resolution=world.resolution, max_world_steps=world.max_world_steps
        )
    )
    apply_trainable(model, trainable_components(config), config.precision)
    ledger = build_ledger(model, config)
    assert config.expect_trainable is not None
    check_expectation(ledger, config)
    vision, projector, language, encoder, _ = ledger.rows
    assert vision.total + projector.total + language.total == 4_300_079_472
    assert vision.total == 416_866_032
    assert encoder.total == 53_595_872 + 32 * 32 + 32  # the encoder, and the quant conv behind it


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
