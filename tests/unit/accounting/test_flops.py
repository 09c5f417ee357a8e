"""FLOPs of a step: the factor of each part, attention as computed, and figures that were published."""

from dataclasses import replace

import pytest

from theworld_train.accounting.architectures import Composite
from theworld_train.accounting.flops import StepModel, StepSettings, StepShape, step_work
from theworld_train.accounting.pieces import AttentionWork, attended_pairs
from theworld_train.accounting.presets import preset
from theworld_train.accounting.video_vae import VideoVae
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError

GEMMA = preset("gemma-3-4b").architecture
assert isinstance(GEMMA, Composite)
MODEL = StepModel(GEMMA.members["language_model"], GEMMA.members["vision_tower"], 256, VideoVae(), "mlp")
SHAPE = StepShape(1, 5000, 300)
PROJECTION = frozenset({Component.WORLD_PROJECTOR})
FULL = frozenset(Component)
#: Of the fields that are left out, transformers' and diffusers' defaults are those of Gemma 3 4B and Wan 2.1.
CONFIG = {
    "enable_world": True,
    "world_encoder_config": {},
    "world_projection": "linear",
    "world_tokens": "spatial",
    "world_resolution": 224,
    "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "vocab_size": 262_208},
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


def flops(trainable, component, part, *, shape=SHAPE, **settings):
    """FLOPs of one part by pass, relative to its forward pass."""
    work = step_work(MODEL, shape, StepSettings(frozenset(trainable), **settings))
    passes = {}
    for operation in work.operations:
        if (operation.component, operation.part) == (component, part) and operation.kind in ("matmul", "convolution"):
            passes[operation.phase] = passes.get(operation.phase, 0) + operation.flops
    forward = passes.pop("forward", 0) + passes.pop("encode", 0)
    return {phase: value / forward for phase, value in passes.items() if value}


def test_a_frozen_language_model_passes_gradients_and_has_none():
    assert flops(PROJECTION, Component.LANGUAGE_MODEL, "mlp") == {"recompute": 1, "input_gradients": 1}
    assert flops(PROJECTION, Component.LANGUAGE_MODEL, "mlp", gradient_checkpointing=False) == {"input_gradients": 1}


def test_what_trains_pays_for_its_weights_too():
    passes = flops([Component.LANGUAGE_MODEL], Component.LANGUAGE_MODEL, "mlp")
    assert passes == {"recompute": 1, "input_gradients": 1, "weight_gradients": 1}


@pytest.mark.parametrize(
    ("component", "part"),
    [
        (Component.VISION_TOWER, "mlp"),
        (Component.WORLD_ENCODER, "convolution"),
        (Component.MULTI_MODAL_PROJECTOR, "projection"),
    ],
)
def test_nothing_upstream_of_the_first_trainable_part_has_a_backward_pass(component, part):
    assert flops(PROJECTION, component, part) == {}


def test_a_run_that_trains_nothing_only_runs_forward():
    work = step_work(MODEL, SHAPE, StepSettings(frozenset()))
    assert set(work.flops_by("phase")) == {"encode", "forward"}


def test_the_first_part_that_trains_needs_no_gradients_of_its_inputs():
    assert flops([Component.MULTI_MODAL_PROJECTOR], Component.MULTI_MODAL_PROJECTOR, "projection") == {
        "weight_gradients": 1
    }
    assert flops([Component.VISION_TOWER], Component.MULTI_MODAL_PROJECTOR, "projection") == {"input_gradients": 1}
    assert flops([Component.VISION_TOWER], Component.VISION_TOWER, "embedding") == {"weight_gradients": 1}


def test_recomputation_stops_before_a_vision_layers_last_product():
    assert flops([Component.VISION_TOWER], Component.VISION_TOWER, "mlp")["recompute"] == pytest.approx(0.5)
    assert flops([Component.VISION_TOWER], Component.VISION_TOWER, "attention")["recompute"] == 1


def test_logits_are_recomputed_where_there_are_several_chunks_and_the_head_trains():
    for chunk_size in (300, 299):
        found = flops(PROJECTION, Component.LANGUAGE_MODEL, "head", chunk_size=chunk_size)
        assert found == {"input_gradients": 1}
    assert "recompute" not in flops(FULL, Component.LANGUAGE_MODEL, "head", chunk_size=300)
    assert flops(FULL, Component.LANGUAGE_MODEL, "head", chunk_size=299)["recompute"] == 1


def test_a_cached_encoder_costs_nothing_unless_it_trains():
    frozen, cached = (
        step_work(MODEL, SHAPE, StepSettings(PROJECTION, cached=names)).flops_by("component")
        for names in (frozenset[Component](), frozenset({Component.WORLD_ENCODER}))
    )
    assert frozen.pop("world_encoder") > 1e11
    assert frozen == cached
    settings = StepSettings(FULL, cached=frozenset({Component.WORLD_ENCODER}))
    assert step_work(MODEL, SHAPE, settings) == step_work(MODEL, SHAPE, replace(settings, cached=frozenset()))


def test_work_grows_with_micro_batches_but_the_optimizers_does_not():
    one, four = (
        step_work(MODEL, replace(SHAPE, gradient_accumulation_steps=steps), StepSettings(FULL)) for steps in (1, 4)
    )
    assert four.flops == 4 * one.flops
    assert four.useful_flops == 4 * one.useful_flops
    assert four.tokens == 4 * one.tokens
    moved = [sum(o.bytes for o in work.operations if o.phase == "optimizer") for work in (one, four)]
    assert moved[0] == moved[1] > 0


def test_ranks_that_share_the_optimizers_state_share_its_work():
    alone, shared = (
        [
            o.bytes
            for o in step_work(MODEL, SHAPE, StepSettings(FULL, optimizer_shards=ranks)).operations
            if o.phase == "optimizer"
        ]
        for ranks in (1, 8)
    )
    assert sum(shared) == pytest.approx(sum(alone) / 8, rel=1e-3)


@pytest.mark.parametrize("field", ["vision_config", "world_encoder_config"])
def test_models_of_another_kind_are_refused(field):
    config = {**CONFIG, field: {"model_type": "clip_vision_model", "is_residual": True}}
    with pytest.raises(ConfigError, match=f"config.json: {field}: describes a"):
        StepModel.from_config(config)


def test_a_models_sizes_are_read_from_its_config():
    model = StepModel.from_config(CONFIG)
    assert (model.world_tokens(1), model.projection, model.image_tokens) == (784, "linear", 256)
    assert model.parameters[Component.WORLD_PROJECTOR] == 43_520
    assert model.parameters[Component.WORLD_ENCODER] == 53_595_872 + 1_056
    assert model.parameters[Component.VISION_TOWER] == 416_866_032
    assert model.parameters[Component.LANGUAGE_MODEL] == 3_880_263_168
    assert StepModel.from_config({**CONFIG, "enable_world": False}).world_encoder is None


@pytest.mark.parametrize(
    ("positions", "window", "block", "expected"),
    [(10, None, 1, 55), (10, 3, 1, 1 + 2 + 8 * 3), (10, 100, 1, 55), (256, None, 128, 3 * 128**2)],
)
def test_structured_attention_counts_its_blocks(positions, window, block, expected):
    assert attended_pairs(positions, window, AttentionWork("structured", block)) == expected


@pytest.mark.parametrize("window", [None, 48])
def test_blocks_are_those_that_hold_an_allowed_pair(window):
    positions, block = 200, 16
    allowed = {(q, k) for q in range(positions) for k in range(q + 1) if window is None or q - k < window}
    assert attended_pairs(positions, window, AttentionWork("structured", 1)) == len(allowed)
    blocks = {(q // block, k // block) for q, k in allowed}
    sizes = [min(block, positions - start) for start in range(0, positions, block)]
    assert attended_pairs(positions, window, AttentionWork("structured", block)) == sum(
        sizes[q] * sizes[k] for q, k in blocks
    )


def test_images_attend_both_ways():
    plain, image = (attended_pairs(300, None, AttentionWork("structured", 1, tokens)) for tokens in ((), (256,)))
    assert image - plain == 256 * 255 // 2


def test_attention_over_all_pairs_ignores_windows():
    assert attended_pairs(5000, 1024, AttentionWork("sdpa")) == 5000**2


def test_the_published_workload_needs_a_seventh_of_a_second_on_an_h100():
    # "Useful work 1.36e14 FLOP a step": batch 2 at 4,823 positions, projection only, encoders not counted. Its loss is
    # at the positions of the text alone: 725 - 256 image tokens.
    encoders = frozenset({Component.VISION_TOWER, Component.WORLD_ENCODER})
    work = step_work(MODEL, StepShape(2, 4823, 725 - 256), StepSettings(PROJECTION, cached=encoders))
    assert work.useful_flops == pytest.approx(1.36e14, rel=0.005)
    assert work.useful_flops / 989.4e12 == pytest.approx(0.14, abs=0.005)


def test_useful_work_does_not_depend_on_how_it_is_computed():
    results = {
        step_work(MODEL, SHAPE, StepSettings(FULL, checkpointing, attention, chunk)).useful_flops
        for checkpointing in (True, False)
        for attention in ("sdpa", "eager", "structured")
        for chunk in (10, 1000)
    }
    assert len(results) == 1


def test_a_model_without_a_world_path_has_no_world_work():
    model = StepModel(MODEL.language_model, MODEL.vision_tower, 256)
    work = step_work(model, SHAPE, StepSettings(frozenset({Component.LANGUAGE_MODEL})))
    assert set(work.flops_by("component")) == {"language_model", "vision_tower", "multi_modal_projector"}
    assert model.world_tokens(1) == 0
    assert MODEL.world_tokens(5) == 2 * 4096
