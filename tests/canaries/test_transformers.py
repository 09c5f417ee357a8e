"""Fail when transformers moves a seam that the model layer is built on, and name it before anything else breaks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from torch import nn
from transformers import Gemma3ForConditionalGeneration, Gemma3Model, Gemma3Processor, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3TextScaledWordEmbedding
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
from transformers.utils.chat_template_utils import render_jinja_template

from tests.helpers.tiny import TinyCheckpoint, image
from theworld_train.model import TheWorld


def parameters_of(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (
            Gemma3ForConditionalGeneration.forward,
            "input_ids pixel_values attention_mask position_ids past_key_values token_type_ids inputs_embeds labels "
            "use_cache logits_to_keep mm_encoder_outputs kwargs",
        ),
        (
            Gemma3Model.forward,
            "input_ids pixel_values attention_mask position_ids past_key_values token_type_ids inputs_embeds labels "
            "use_cache mm_encoder_outputs kwargs",
        ),
    ],
)
def test_forward_takes_what_we_pass_on(function: Any, names: str):
    assert set(names.split()) <= parameters_of(function).keys()


def test_our_forward_has_every_argument_of_gemmas():
    """`generate` reads the signature to decide what to pass."""
    ours, theirs = (parameters_of(kind.forward) for kind in (TheWorld, Gemma3ForConditionalGeneration))
    assert theirs.keys() <= ours.keys()
    added = {"world_frames", "world_frame_counts", "world_offsets", "world_latents"}
    assert ours.keys() - theirs.keys() == added


def test_the_parts_of_gemma_hang_where_we_look_for_them(tiny: TinyCheckpoint):
    model = tiny.gemma3()
    assert [name for name, _ in model.named_children()] == ["model", "lm_head"]
    assert [name for name, _ in model.model.named_children()] == [
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    ]
    embedding = model.get_input_embeddings()
    assert type(embedding) is Gemma3TextScaledWordEmbedding
    assert float(embedding.scalar_embed_scale) == pytest.approx(model.config.text_config.hidden_size**0.5)
    assert model.model.vision_tower.embeddings.patch_embedding.weight.dim() == 4
    assert isinstance(model.model.multi_modal_projector.mm_input_projection_weight, nn.Parameter)
    assert model._tied_weights_keys == {"lm_head.weight": "model.language_model.embed_tokens.weight"}


def test_image_features_are_the_projected_patches(tiny: TinyCheckpoint):
    """`encode_images` and the projector, called apart, are what `get_image_features` does."""
    gemma3, ours = tiny.gemma3(), tiny.theworld()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = gemma3.model.get_image_features(pixels, return_dict=True).pooler_output
        assert torch.equal(ours.model.multi_modal_projector(ours.encode_images(pixels)), expected)


def test_older_names_of_gemma_are_renamed_by_model_type():
    mapping = get_checkpoint_conversion_mapping("gemma3")
    assert mapping
    patterns = [pattern for rule in mapping for pattern in rule.source_patterns]
    for part in ("language_model", "vision_tower", "multi_modal_projector"):
        assert any(pattern.startswith(f"^{part}") for pattern in patterns), part
    assert "overwrite" in parameters_of(register_checkpoint_conversion_mapping)
    ours = get_checkpoint_conversion_mapping("theworld")
    assert ours is not None
    assert [rule.source_patterns for rule in ours] == [rule.source_patterns for rule in mapping]


def test_loading_reports_keys_and_strict_fp32_modules_exist():
    assert {"config", "ignore_mismatched_sizes"} <= parameters_of(PreTrainedModel.from_pretrained).keys()
    assert hasattr(PreTrainedModel, "_keep_in_fp32_modules_strict")
    assert "output_loading_info" in inspect.getsource(PreTrainedModel.from_pretrained)


def test_layers_are_checkpointed_only_while_training():
    """A frozen part on the gradient path stays checkpointed only because it stays in training mode."""
    assert issubclass(Gemma3DecoderLayer, GradientCheckpointingLayer)
    assert issubclass(SiglipEncoderLayer, GradientCheckpointingLayer)
    calls = []

    class Layer(GradientCheckpointingLayer):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return value

    layer = Layer()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda function, *args: calls.append(args) or function(*args)
    layer.eval()(torch.ones(1))
    assert not calls
    layer.train()(torch.ones(1))
    assert len(calls) == 1


def test_generate_encodes_images_before_prefill(tiny: TinyCheckpoint):
    model = tiny.theworld()
    assert model._supports_mm_encoder_outputs()
    inputs = {"pixel_values": torch.zeros(1, 3, 64, 64), "world_frames": torch.zeros(1, 3, 32, 32)}
    with torch.no_grad():
        prepared = model._prepare_multimodal_encoder_kwargs_for_generation(dict(inputs))
    assert prepared.keys() == {"mm_encoder_outputs", "world_frames"}
    assert prepared["mm_encoder_outputs"]["image"].pooler_output.shape == (1, 16, 96)


def test_generation_hooks_have_their_arguments():
    assert {"expand_size", "is_encoder_decoder", "input_ids"} <= parameters_of(
        GenerationMixin._expand_inputs_for_generation
    ).keys()
    hook = parameters_of(Gemma3ForConditionalGeneration.prepare_inputs_for_generation)
    assert {"input_ids", "use_cache", "is_first_iteration"} <= hook.keys()
    assert "logits_processor" in parameters_of(GenerationMixin.generate)


def test_suppressed_tokens_get_no_probability():
    scores = SuppressTokensLogitsProcessor([1, 3], device="cpu")(torch.zeros(1, 1).long(), torch.zeros(2, 5))
    assert scores.isneginf().tolist() == [[False, True, False, True, False]] * 2


def test_templates_report_what_is_generated():
    template = (
        "{% for message in messages %}[{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}!{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}]{% endfor %}"
    )
    messages = [
        {"role": role, "content": text} for role, text in [("user", "ab"), ("assistant", "cd"), ("assistant", "e")]
    ]
    rendered, spans = render_jinja_template([messages], chat_template=template, return_assistant_tokens_mask=True)
    assert rendered == ["[ab][cd!][e!]"]
    assert [rendered[0][start:end] for start, end in spans[0]] == ["cd!", "e!"]


def test_templates_can_refuse():
    with pytest.raises(TemplateError, match="no"):
        render_jinja_template([[]], chat_template="{{ raise_exception('no') }}")


def test_gemmas_processor_has_what_ours_builds_on(tiny: TinyCheckpoint):
    assert {"image_processor", "tokenizer", "chat_template", "image_seq_length"} <= parameters_of(
        Gemma3Processor.__init__
    ).keys()
    processor = tiny.gemma3_processor()
    placeholders = processor.tokenizer.image_token * processor.image_seq_length
    assert processor.full_image_sequence == f"\n\n<start_of_image>{placeholders}<end_of_image>\n\n"
    pixels = processor.image_processor([image(1), image(2, (9, 5), "L").convert("RGB")], return_tensors=None)
    assert [tuple(values.shape) for values in pixels["pixel_values"]] == [(3, 64, 64)] * 2
