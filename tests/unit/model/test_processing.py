"""Protects what the model is shown: tokens, pixels, and which tokens it has to predict."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Gemma3Processor

from tests.helpers.tiny import IMAGE_LENGTH, RESOLUTION, Message, TinyCheckpoint, assistant, clip, image, parts, user
from theworld_train.batch import EncodedSample
from theworld_train.config.errors import ConfigError
from theworld_train.data.moving_digits import WORDS
from theworld_train.model import TheWorld, TheWorldProcessor
from theworld_train.model.build import tiny_tokenizer
from theworld_train.model.processing import fit_frame

CELLS = (RESOLUTION // 8) ** 2
#: A template that, as Gemma 3's own does, knows `add_generation_prompt` but marks no generated text.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture(scope="module")
def processor(tiny: TinyCheckpoint) -> TheWorldProcessor:
    return tiny.processor()


def image_block() -> str:
    return "\n\n<start_of_image>" + "<image_soft_token>" * IMAGE_LENGTH + "<end_of_image>\n\n"


def visual_block(latent_frames: int = 1) -> str:
    return "<start_of_world>" + "<world>" * (CELLS * latent_frames) + "<end_of_world>" + image_block()


def text_of(processor: TheWorldProcessor, sample: EncodedSample) -> str:
    return processor.tokenizer.decode(sample.input_ids)


def supervised_runs(processor: TheWorldProcessor, sample: EncodedSample) -> list[str]:
    """Returns the text of each run of supervised tokens."""
    flags = [False, *sample.supervised.tolist(), False]
    edges = [index for index, (before, after) in enumerate(pairwise(flags)) if before != after]
    return [
        processor.tokenizer.decode(sample.input_ids[start:end])
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


# -- layout -----------------------------------------------------------------------------------------------------------


def test_a_world_block_stands_directly_before_its_image_block(processor: TheWorldProcessor):
    sample = processor.encode(
        [
            {"role": "system", "content": "Which digit"},
            user("left", image(1), "right", clip(2, frames=9), "up"),
            assistant("5"),
            user(image(3)),
        ],
        add_generation_prompt=True,
    )
    assert text_of(processor, sample) == (
        "<bos><start_of_turn>user\nWhich digit\n\nleft"
        + visual_block()
        + "right"
        + visual_block(latent_frames=3)
        + "up<end_of_turn>\n<start_of_turn>model\n5<end_of_turn>\n<start_of_turn>user\n"
        + visual_block()
        + "<end_of_turn>\n<start_of_turn>model\n"
    )
    assert sample.pixel_values is not None
    assert sample.pixel_values.shape == (3, 3, 64, 64)
    assert [frames.shape for frames in sample.world_frames] == [
        (count, 3, RESOLUTION, RESOLUTION) for count in (1, 9, 1)
    ]


def test_content_as_a_string_is_a_text_part(processor: TheWorldProcessor):
    as_string = processor.encode([{"role": "user", "content": " Which digit is it? "}])
    as_part = processor.encode([user("Which digit is it?")])
    assert torch.equal(as_string.input_ids, as_part.input_ids)


@pytest.mark.parametrize("conversation", ["image", "images", "text", "turns", "system"])
def test_without_world_the_tokens_and_pixels_are_gemmas(tiny: TinyCheckpoint, conversation: str):
    turn, end = "<start_of_turn>", "<end_of_turn>\n"
    messages: list[Message]
    messages, expected = {
        "image": ([user(image(1), "Which digit is it?")], f"{turn}user\n<start_of_image>Which digit is it?{end}"),
        "images": (
            [user("left ", image(1), image(2), " right")],
            f"{turn}user\nleft<start_of_image><start_of_image>right{end}",
        ),
        "text": ([user("\n Which way? \n")], f"{turn}user\nWhich way?{end}"),
        "turns": (
            [user(image(1)), assistant("5"), user("left?"), assistant("right")],
            f"{turn}user\n<start_of_image>{end}{turn}model\n5{end}{turn}user\nleft?{end}{turn}model\nright{end}",
        ),
        "system": ([{"role": "system", "content": "up"}, user("down")], f"{turn}user\nup\n\ndown{end}"),
    }[conversation]
    images = [part["image"] for message in messages for part in message["content"] if "image" in part]
    gemma3 = tiny.gemma3_processor()(
        text=f"<bos>{expected}", images=images or None, add_special_tokens=False, return_tensors="pt"
    )
    plain = tiny.processor(enable_world=False)
    sample = plain.encode(messages)
    assert sample.input_ids.tolist() == gemma3["input_ids"][0].tolist()
    assert sample.token_type_ids.tolist() == gemma3["token_type_ids"][0].tolist()
    assert sample.world_frames == ()
    if images:
        assert sample.pixel_values is not None
        assert torch.equal(sample.pixel_values, gemma3["pixel_values"])
    called = plain(text=f"<bos>{expected}", images=images or None)
    assert called.keys() == gemma3.keys()
    assert all(torch.equal(called[name], gemma3[name]) for name in called)
    assert "<world>" not in plain.tokenizer.get_vocab()


def test_with_world_the_rest_of_the_tokens_is_gemmas(tiny: TinyCheckpoint, processor: TheWorldProcessor):
    messages = [user(image(1), "Which digit is it?", clip(2)), assistant("5")]
    ids = processor.encode(messages).input_ids
    plain = tiny.processor(enable_world=False).encode(messages).input_ids
    world = torch.isin(ids, torch.tensor(tiny.theworld().config.world_token_ids))
    assert torch.equal(ids[~world], plain)


@pytest.mark.parametrize("layout", ["spatial", "channel"])
@pytest.mark.parametrize("enable_world", [True, False])
def test_lengths_are_known_beforehand(tiny: TinyCheckpoint, layout: str, enable_world: bool):
    processor = tiny.processor(world_tokens=layout, enable_world=enable_world)
    alone = len(processor.encode([user("left", "right")]).input_ids)
    for visual, frames in [(image(1), 1), (clip(1, frames=5), 5), (clip(1, frames=9), 9)]:
        sample = processor.encode([user("left", visual, "right")])
        assert len(sample.input_ids) - alone == processor.num_visual_tokens(frames)
        world = (sample.input_ids == processor.tokenizer.convert_tokens_to_ids("<world>")).sum()
        assert world == enable_world * (16 if layout == "channel" else CELLS) * (1 + (frames - 1) // 4)


def test_lengths_of_the_full_model(tiny: TinyCheckpoint):
    blank_line = len(tiny.processor().tokenizer("\n\n", add_special_tokens=False)["input_ids"])
    base = tiny.processor(world_resolution=512).num_visual_tokens() - 4096
    assert base == 2 + (IMAGE_LENGTH + 2) + 2 * blank_line
    assert tiny.processor(world_resolution=224).num_visual_tokens() - 784 == base
    assert tiny.processor(world_resolution=512, world_tokens="channel").num_visual_tokens(5) - 32 == base


def test_line_breaks_that_merge_as_in_gemmas_vocabulary(tiny: TinyCheckpoint):
    """Gemma has a token for each short run of line breaks, so blocks that touch could share one."""
    plain = tiny.gemma3_processor()

    def build(kind: type[Gemma3Processor], **kwargs: Any) -> Any:
        tokenizer = tiny_tokenizer([*WORDS, *("\n" * length for length in (2, 3, 4, 5))])
        return kind(plain.image_processor, tokenizer, image_seq_length=IMAGE_LENGTH, **kwargs)

    messages = [user(image(1), image(2), "left"), assistant("up\n\ndown"), user(image(3))]
    theworld, without = (build(TheWorldProcessor, enable_world=on, world_resolution=RESOLUTION) for on in (True, False))
    assert len(theworld.tokenizer("\n\n", add_special_tokens=False)["input_ids"]) == 1
    text = theworld.apply_chat_template(messages, tokenize=False)
    gemma3 = build(Gemma3Processor)(text=text, images=[image(1), image(2), image(3)], add_special_tokens=False)
    assert without.encode(messages).input_ids.tolist() == gemma3["input_ids"][0]
    alone = [user("left"), assistant("up\n\ndown"), user("")]
    lengths = [len(theworld.encode(turns).input_ids) for turns in (messages, alone)]
    assert lengths[0] - lengths[1] == 3 * theworld.num_visual_tokens()
    assert supervised_runs(theworld, theworld.encode(messages)) == ["up\n\ndown<end_of_turn>"]


def test_the_world_tokens_lie_behind_the_image_placeholder(tiny: TinyCheckpoint, processor: TheWorldProcessor):
    config = tiny.theworld().config
    names = ["<start_of_world>", "<world>", "<end_of_world>"]
    assert tuple(processor.tokenizer.convert_tokens_to_ids(names)) == config.world_token_ids
    assert config.world_token_ids == tuple(config.image_token_index + offset for offset in (1, 2, 3))
    assert config.world_token_ids[-1] < config.text_config.vocab_size
    assert processor.tokenizer("a<world>b", add_special_tokens=False)["input_ids"].count(config.world_token_id) == 1


def test_a_tokenizer_with_a_token_in_their_place_is_refused(tiny: TinyCheckpoint):
    plain = tiny.gemma3_processor()
    plain.tokenizer.add_tokens(["intruder"])
    with pytest.raises(ConfigError, match="the world tokens got the ids"):
        TheWorldProcessor(plain.image_processor, plain.tokenizer)


def test_visual_blocks_are_indivisible(processor: TheWorldProcessor):
    sample = processor.encode([user("left", clip(1), "right"), assistant("up")])
    block = processor.tokenizer.decode(sample.input_ids[sample.indivisible]).replace("\n", "")
    assert block == visual_block(latent_frames=2).replace("\n", "")
    assert torch.equal(sample.token_type_ids.bool(), sample.input_ids == processor.tokenizer.image_token_id)


# -- supervision ------------------------------------------------------------------------------------------------------


def test_only_the_models_turns_are_supervised(processor: TheWorldProcessor):
    sample = processor.encode([user(clip(1), "Which way does it move?"), assistant(" left ")])
    assert supervised_runs(processor, sample) == ["left<end_of_turn>"]
    assert not (sample.supervised & sample.indivisible).any()


def test_every_turn_of_the_model_is_supervised(processor: TheWorldProcessor):
    sample = processor.encode(
        [
            {"role": "system", "content": "left"},
            user(image(1), "up"),
            assistant("5"),
            user("model\nright<", image(2)),
            assistant("down it move?\nup"),
            user("not this"),
        ],
    )
    assert supervised_runs(processor, sample) == ["5<end_of_turn>", "down it move?\nup<end_of_turn>"]


def test_a_prompt_is_the_beginning_of_what_is_trained(processor: TheWorldProcessor):
    for question in (user("Which digit is it?"), user(clip(1), "Which way does it move?")):
        for answer in ("left", "5", "It moves up, äö 日本", "<b>x</b>", "..."):
            trained = processor.encode([question, assistant(answer)])
            prompt = processor.encode([question], add_generation_prompt=True)
            length = len(prompt.input_ids)
            assert torch.equal(trained.input_ids[:length], prompt.input_ids)
            assert trained.supervised.nonzero()[0] == length
            assert not prompt.supervised.any()


def test_a_template_that_marks_no_generated_text_is_replaced(tiny: TinyCheckpoint, tmp_path: Path):
    shutil.copytree(tiny.gemma, tmp_path / "gemma")
    (tmp_path / "gemma" / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    assert AutoProcessor.from_pretrained(tmp_path / "gemma").chat_template == PLAIN_TEMPLATE
    processor = TheWorldProcessor.from_pretrained(tmp_path / "gemma")
    sample = processor.encode([user("Which digit is it?"), assistant("5")])
    assert supervised_runs(processor, sample) == ["5<end_of_turn>"]


# -- what cannot be rendered ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token",
    [
        "<start_of_world>",
        "<world>",
        "<end_of_world>",
        "<start_of_image>",
        "<image_soft_token>",
        "<end_of_image>",
        "<start_of_turn>",
        "<end_of_turn>",
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_reserved_tokens_in_text_are_refused(processor: TheWorldProcessor, token: str, role: str):
    turns = {"system": "left", "user": "up", "assistant": "5"} | {role: f"a {token} b"}
    for wrap in (str, lambda text: parts(text)):
        with pytest.raises(ValueError, match=f"reserved token {token}"):
            processor.encode([{"role": name, "content": wrap(text)} for name, text in turns.items()])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], "type 'audio'"),
        ([{"role": "user", "content": [{"text": "left"}]}], "expected text, image or video"),
        ([{"role": "tool", "content": "left"}], "role 'tool'"),
        ([user("left"), {"role": "system", "content": "right"}], "system message must come first"),
        ([{"role": "system", "content": "left"}, assistant("up")], "user message must follow the system message"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "no loaded image under 'image'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "no loaded image under 'image'"),
        ([{"role": "user", "content": [{"type": "video", "video": []}]}], "no loaded image under 'video'"),
        ([user(clip(1, frames=4))], r"1 \+ 4k frames, got 4"),
    ],
)
def test_what_cannot_be_rendered_is_refused(processor: TheWorldProcessor, messages: list[Message], message: str):
    with pytest.raises(ValueError, match=message):
        processor.encode(messages)


def test_as_many_visuals_as_markers(processor: TheWorldProcessor):
    with pytest.raises(ValueError, match="places for 2 images or clips, but 1 were given"):
        processor(text="<bos><start_of_image> <start_of_image>", images=[image(1)])


# -- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (200, 16), (3, 90)])
def test_images_of_any_size_and_mode(processor: TheWorldProcessor, mode: str, size: tuple[int, int]):
    sample = processor.encode([user(image(1, size, mode), "left", [image(2, size, mode)] * 5)])
    assert sample.pixel_values is not None
    assert sample.pixel_values.shape == (2, 3, 64, 64)
    assert [frames.shape[0] for frames in sample.world_frames] == [1, 5]
    for pixels in (sample.pixel_values, *sample.world_frames):
        assert pixels.dtype == torch.float32
        assert pixels.abs().max() <= 1
        assert pixels.isfinite().all()


def test_world_frames_are_the_pixels_from_minus_one_to_one(processor: TheWorldProcessor):
    picture = image(1, (RESOLUTION, RESOLUTION))
    frames = processor.encode([user(picture)]).world_frames[0]
    expected = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).double() / 127.5 - 1
    torch.testing.assert_close(frames[0].double(), expected, rtol=0, atol=1e-6)
    black_and_white = processor.encode([user(Image.new("L", (8, 8), 0)), user(Image.new("L", (8, 8), 255))])
    assert [float(block.unique().item()) for block in black_and_white.world_frames] == [-1.0, 1.0]


def test_the_vision_tower_sees_the_present(processor: TheWorldProcessor):
    frames = clip(1, frames=5)
    sample, last = processor.encode([user(frames)]), processor.encode([user(frames[-1])])
    assert sample.pixel_values is not None
    assert last.pixel_values is not None
    assert torch.equal(sample.pixel_values, last.pixel_values)
    assert torch.equal(sample.world_frames[0][-1], last.world_frames[0][0])
    assert len({frame.sum().item() for frame in sample.world_frames[0]}) == 5


@pytest.mark.parametrize("rule", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("size", [(40, 20), (20, 40), (400, 200), (15, 31), (1, 100), (100, 1), (1, 1)])
def test_every_frame_becomes_the_square(rule: str, size: tuple[int, int]):
    assert fit_frame(image(1, size), 32, rule).size == (32, 32)


def halves(size: tuple[int, int]) -> Image.Image:
    """Returns an image whose left third is red, middle third green and right third blue."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    for index in range(3):
        pixels[:, index * width // 3 : (index + 1) * width // 3, index] = 255
    return Image.fromarray(pixels)


def test_padding_keeps_the_whole_frame_between_black_bars():
    fitted = np.asarray(fit_frame(halves((96, 48)), 32, "pad"))
    assert not fitted[:8].any()
    assert not fitted[-8:].any()
    inner = fitted[9:-9]
    assert inner[:, 2].tolist() == [[255, 0, 0]] * len(inner)
    assert inner[:, -3].tolist() == [[0, 0, 255]] * len(inner)
    tall = np.asarray(fit_frame(halves((48, 96)), 32, "pad"))
    assert not tall[:, :8].any()
    assert not tall[:, -8:].any()
    assert tall[:, 9:-9].any(axis=2).all()


def test_cropping_keeps_the_middle():
    fitted = np.asarray(fit_frame(halves((96, 32)), 32, "crop"))
    assert (fitted == (0, 255, 0)).all()
    tall = np.asarray(fit_frame(halves((33, 99)), 33, "crop"))
    assert tall[16, [0, 16, 32]].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_stretching_keeps_everything_without_bars():
    fitted = np.asarray(fit_frame(halves((96, 48)), 32, "stretch"))
    assert fitted[:, [1, 16, 30]].tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]] * 32


def test_a_frame_that_fits_is_left_alone():
    frame = image(1, (32, 32))
    assert all(fit_frame(frame, 32, rule) is frame for rule in ("pad", "crop", "stretch"))


def test_the_resize_rule_of_the_processor_is_used(tiny: TinyCheckpoint):
    wide = halves((96, 48))
    seen = {rule: tiny.processor(world_resize=rule).encode([user(wide)]).world_frames[0] for rule in ("pad", "crop")}
    assert (seen["pad"][0, :, 0] == -1).all()
    assert (seen["crop"][0, :, 0] != -1).any()


# -- the idioms of transformers ---------------------------------------------------------------------------------------


def test_a_batch_feeds_the_model(tiny: TinyCheckpoint, processor: TheWorldProcessor):
    conversations = [[user(clip(1), "Which way does it move?")], [user("left", image(2), image(3))], [user("up")]]
    batch = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, add_generation_prompt=True)
    samples = [processor.encode(messages, add_generation_prompt=True) for messages in conversations]
    for row, mask, types, sample in zip(
        batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], samples, strict=True
    ):
        real = mask.bool()
        assert mask.tolist() == sorted(mask.tolist()), "padding belongs on the left"
        assert torch.equal(row[real], sample.input_ids)
        assert torch.equal(types[real], sample.token_type_ids)
        assert (row[~real] == processor.pad_token_id).all()
        assert not types[~real].any()
    assert batch["world_frame_counts"].tolist() == [5, 1, 1]
    assert torch.equal(
        batch["world_frames"], torch.cat([frames for sample in samples for frames in sample.world_frames])
    )
    assert set(batch) == set(processor.model_input_names) - {"world_latents"}, "given in the place of frames"
    assert tiny.theworld()(**batch).logits.shape[:2] == batch["input_ids"].shape
    right = processor.apply_chat_template(conversations, tokenize=True, padding_side="right")
    assert right["attention_mask"][2].tolist() == sorted(right["attention_mask"][2].tolist(), reverse=True)


def test_rendered_text_and_images_give_the_same_batch(processor: TheWorldProcessor):
    single, several, moving = [user(image(1), "left")], [user(image(1), image(2))], [user(clip(1))]
    for messages, images in [
        (single, image(1)),
        (single, [image(1)]),
        (single, [[image(1)]]),
        (several, [image(1), image(2)]),
        (several, [[image(1), image(2)]]),
        (moving, [[clip(1)]]),
    ]:
        expected = processor.apply_chat_template(messages, tokenize=True)
        actual = processor(text=processor.apply_chat_template(messages, tokenize=False), images=images)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    texts = [processor.apply_chat_template(messages, tokenize=False) for messages in (single, several, moving)]
    batch = processor(text=texts, images=[image(1), [image(1), image(2)], [clip(1)]])
    assert batch["world_frame_counts"].tolist() == [1, 1, 1, 5]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"world_resolution": 64, "world_resize": "crop", "world_tokens": "channel", "world_latent_channels": 4},
        {"enable_world": False},
    ],
    ids=["default", "other", "without-world"],
)
def test_a_saved_processor_comes_back(tiny: TinyCheckpoint, tmp_path: Path, settings: dict[str, Any]):
    processor = tiny.processor(**settings)
    processor.save_pretrained(tmp_path)
    TheWorld.from_pretrained(tiny.gemma, cosmos=tiny.cosmos).config.save_pretrained(tmp_path)
    messages = [user(clip(1), "Which way does it move?", image(2)), assistant("left")]
    expected = processor.encode(messages)
    for again in (TheWorldProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) is TheWorldProcessor
        actual = again.encode(messages)
        assert again.chat_template == processor.chat_template
        assert again.num_visual_tokens(5) == processor.num_visual_tokens(5)
        assert torch.equal(actual.input_ids, expected.input_ids)
        assert torch.equal(actual.supervised, expected.supervised)
        assert all(torch.equal(a, b) for a, b in zip(actual.world_frames, expected.world_frames, strict=True))
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "TheWorldProcessor"


def test_a_saved_world_path_can_be_left_out(tiny: TinyCheckpoint, tmp_path: Path):
    tiny.processor().save_pretrained(tmp_path)
    messages = [user(clip(1), "Which way does it move?"), assistant("left")]
    without = TheWorldProcessor.from_pretrained(tmp_path, enable_world=False)
    assert torch.equal(
        without.encode(messages).input_ids, tiny.processor(enable_world=False).encode(messages).input_ids
    )
