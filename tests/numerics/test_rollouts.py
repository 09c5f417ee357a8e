"""Generated futures: what an entry holds, what it depends on, and a run that reads them from training to an answer."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Cosmos2VideoToWorldPipeline
from PIL import Image
from rich.console import Console
from torch import Tensor

import theworld_train.data.rollouts as listing
import theworld_train.rollout as making
from tests.helpers.tiny import RESOLUTION, TinyCheckpoint, write_run
from theworld_train.assemble.encoded import check_encoded
from theworld_train.assemble.inputs import open_inputs, open_processor
from theworld_train.assemble.run import train
from theworld_train.batch import ROLLOUT
from theworld_train.checkpoint_files import resolve_checkpoint
from theworld_train.config import load_run_config
from theworld_train.config.errors import ConfigError
from theworld_train.config.rollout import RolloutRules
from theworld_train.config.schema import RunConfig
from theworld_train.data import open_source
from theworld_train.data.rollouts import Future as RolloutFuture
from theworld_train.data.rollouts import Futures
from theworld_train.encoded_files import EncodedFiles, Recipe, frames_digest
from theworld_train.evaluate.ablations import run_ablations
from theworld_train.evaluate.answer import Future, answer, find_model
from theworld_train.model import world_generator
from theworld_train.model.processing import fit_frame, frames_to_pixels
from theworld_train.model.world_encoder import WorldEncoder
from theworld_train.model.world_generator import Fit, NoGuardrail, WorldGenerator, load_generator, noise_seed
from theworld_train.rollout import Generated, rollout

#: Prompts of two lengths; the tiny tokenizer reads other words letter by letter.
NEGATIVE = "bad"
Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices want no second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rules_of(tiny: TinyCheckpoint, **changed: Any) -> RolloutRules:
    """Rules of the tiny pipeline, at the geometry of the tiny world encoder."""
    size = {"height": RESOLUTION, "width": RESOLUTION, "num_frames": 9}
    asked = {"num_inference_steps": 2, "negative_prompt": NEGATIVE, "dtype": "float32"}
    return RolloutRules(**{"pipeline": tiny.cosmos, **size, **asked, **changed})


@pytest.fixture
def make(tiny: TinyCheckpoint, tmp_path: Path) -> Make:
    """Makes the config of a run that reads rollouts from `tmp_path/encoded`."""

    def config(*overrides: str, **rules: Any) -> RunConfig:
        digits = {"source": "moving_digits", "samples": 6, "frames": 5, "canvas": 48}
        world = {"frames": "rollout", "steps": 1, "rollout": rules_of(tiny, **rules).model_dump()}
        data = {
            "train": {**digits, "split": "train"},
            "eval": {**digits, "split": "eval", "samples": 4},
            "num_workers": 0,
            "encoded": str(tmp_path / "encoded"),
            "world": world,
        }
        model = {
            "base": tiny.gemma,
            "world": {"encoder": tiny.cosmos, "resolution": RESOLUTION, "max_world_steps": 2},
        }
        path = write_run(tiny, tmp_path, steps=3, batch=2, data=data, model=model)
        return load_run_config(path, list(overrides))

    return config


def generate(config: RunConfig, guardrail: NoGuardrail | None = None) -> tuple[Generated, str]:
    """Generates, and returns what is kept and what has been said."""
    said = io.StringIO()
    made = rollout(config, Console(file=said, width=1000), guardrail)
    assert made is not None
    return made, said.getvalue()


def entries(config: RunConfig) -> dict[str, Tensor]:
    assert config.data.encoded is not None
    found: dict[str, Tensor] = {}
    for folder in Path(config.data.encoded).glob(f"{ROLLOUT}-*"):
        files = EncodedFiles(folder)
        found |= {digest: tensor for digest in files.digests if (tensor := files.get(digest)) is not None}
    return found


def picture(size: tuple[int, int] = (48, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encode(encoder: WorldEncoder, frames: list[Image.Image]) -> Tensor:
    """`(latent frames, channels, height, width)`, as the world encoder makes them of fitted frames."""
    fitted = frames_to_pixels([fit_frame(frame, RESOLUTION, "pad") for frame in frames])
    latents, _ = encoder(fitted, (len(frames),))
    return latents.detach()


# -- what an entry holds ----------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tiny: TinyCheckpoint) -> WorldEncoder:
    return tiny.theworld().world_encoder.eval()


def pipeline_of(generator: WorldGenerator) -> Cosmos2VideoToWorldPipeline:
    return generator._pipeline


def by_diffusers(generator: WorldGenerator, rules: RolloutRules, image: Image.Image, seed: int) -> np.ndarray:
    """The frames that diffusers' pipeline gives when it is called as its documentation says, uint8."""
    with world_generator.without_torchvision():
        frames = pipeline_of(generator)(
            image=image,
            prompt="digit",
            negative_prompt=NEGATIVE,
            height=rules.height,
            width=rules.width,
            num_frames=rules.num_frames,
            num_inference_steps=rules.num_inference_steps,
            guidance_scale=rules.guidance_scale,
            fps=rules.fps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).frames[0]
    return np.round(np.asarray(frames) * 255).astype(np.uint8)


@pytest.mark.parametrize("width", [RESOLUTION, 2 * RESOLUTION], ids=["same geometry", "its own geometry"])
def test_entry_is_our_encoding_of_the_picture_and_what_diffusers_generates(
    tiny: TinyCheckpoint, encoder: WorldEncoder, width: int
):
    rules = rules_of(tiny, width=width)
    generator = load_generator(rules, torch.device("cpu"))
    prompt = generator.encode_prompts(["digit"])["digit"]
    assert prompt is not None
    image = picture()
    latents = generator.latents(image, prompt, 7, 2, encoder, Fit(RESOLUTION, "pad"))
    assert latents.shape == (3, 16, RESOLUTION // 8, RESOLUTION // 8)
    assert torch.equal(latents[:1], encode(encoder, [image])), "the present is what frames: image sees, bit for bit"
    same = width == RESOLUTION
    given = fit_frame(image, RESOLUTION, "pad") if same else image
    expected = by_diffusers(generator, rules, given, seed=7)
    decoded = generator._decode(generator._denoise(given, prompt, 7))
    assert np.abs(expected.astype(int) - decoded.astype(int)).max() <= 1, "8-bit rounding of diffusers and ours"
    if same:
        assert torch.equal(latents[1:], generator._denoise(given, prompt, 7)[0, :, 1:3].transpose(0, 1))
    else:
        later = [Image.fromarray(frame).resize(image.size, Image.Resampling.BICUBIC) for frame in decoded[1:]]
        assert torch.equal(latents, encode(encoder, [image, *later]))
    other = generator.latents(image, prompt, 8, 2, encoder, Fit(RESOLUTION, "pad"))
    assert torch.equal(other[:1], latents[:1])
    assert not torch.equal(other[1:], latents[1:]), "another seed, another future"


@pytest.mark.parametrize("changed", ["weights", "statistics"])
def test_latents_of_another_encoder_are_not_taken_as_they_are(
    tiny: TinyCheckpoint, encoder: WorldEncoder, changed: str
):
    """A world encoder that was trained, and then frozen, sees the generated frames itself."""
    generator = load_generator(rules_of(tiny), torch.device("cpu"))
    prompt = generator.encode_prompts(["digit"])["digit"]
    assert prompt is not None
    if changed == "weights":
        with torch.no_grad():
            encoder.quant_conv.weight.mul_(1.5)
    else:
        encoder._latents_mean = tuple(value + 1 for value in encoder._latents_mean)
    image = fit_frame(picture(), RESOLUTION, "pad")
    latents = generator.latents(image, prompt, 7, 2, encoder, Fit(RESOLUTION, "pad"))
    decoded = generator._decode(generator._denoise(image, prompt, 7))
    assert torch.equal(latents, encode(encoder, [image, *(Image.fromarray(frame) for frame in decoded[1:])]))


def test_the_text_encoder_leaves_the_device_once_prompts_are_encoded(
    tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
):
    generator = load_generator(rules_of(tiny), torch.device("cpu"))
    done: list[str] = []
    embed = generator._embed
    monkeypatch.setattr(generator, "_embed", lambda text: done.append(text) or embed(text))
    monkeypatch.setattr(generator._pipeline, "maybe_free_model_hooks", lambda: done.append("freed"))
    generator.encode_prompts(["digit"])
    assert done == [NEGATIVE, "digit", "freed"]


def test_fewer_steps_are_the_first_of_more(tiny: TinyCheckpoint, encoder: WorldEncoder):
    generator = load_generator(rules_of(tiny, width=2 * RESOLUTION), torch.device("cpu"))
    prompt = generator.encode_prompts(["digit"])["digit"]
    assert prompt is not None
    one, two = (generator.latents(picture(), prompt, 7, steps, encoder, Fit(RESOLUTION, "pad")) for steps in (1, 2))
    assert torch.equal(one, two[:2])


# -- what it depends on -----------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_which_samples_there_are_or_on_their_order(make: Make, tmp_path: Path):
    config = make()
    made, said = generate(config)
    assert made.new == made.entries == len(entries(config))
    assert "futures under 2 prompts" in said, "moving-digits asks two questions"
    fewer = make(f"data.encoded={tmp_path / 'fewer'}", "data.train.samples=3", "seed=5", "evaluation.max_samples=1")
    generate(fewer)
    assert 0 < len(entries(fewer)) < len(entries(config))
    for digest, tensor in entries(fewer).items():
        assert torch.equal(tensor, entries(config)[digest])


def test_what_is_there_is_not_generated_again(make: Make):
    generate(make())
    made, said = generate(make())
    assert made.new == 0
    assert "0 futures under 0 prompts" in said


def test_of_held_out_samples_alone(make: Make):
    config, said = make(), io.StringIO()
    made = rollout(config, Console(file=said, width=1000), only_held_out=True)
    assert made is not None
    assert 0 < made.new <= 4
    assert generate(config)[0].new > 0, "those of training are still missing"


def test_the_text_encoder_reads_each_prompt_once(make: Make, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    embed = WorldGenerator._embed
    monkeypatch.setattr(WorldGenerator, "_embed", lambda self, text: read.append(text) or embed(self, text))
    generate(make())
    assert len(read) == len(set(read)) == 3, "two questions, and the negative prompt"


def test_a_changed_setting_makes_rollouts_stale(make: Make):
    generate(make())
    check_encoded(make(), open_processor(make()))
    for changed, said in (
        ({"guidance_scale": 5.0}, "generator.guidance_scale: 7.0 there, 5.0 in this run"),
        ({"num_inference_steps": 3}, "generator.num_inference_steps: 2 there, 3 in this run"),
        ({"seed": 1}, "generator.seed: 0 there, 1 in this run"),
        ({"width": 64}, "generator.width: 32 there, 64 in this run"),
    ):
        config = make(**changed)
        with pytest.raises(ConfigError, match=said):
            check_encoded(config, open_processor(config))
    same = make(revision="v2", pipeline="elsewhere/cosmos")
    check_encoded(same, open_processor(same))  # its digest identifies the generator, whatever it is called


@pytest.mark.parametrize("changed", ["vae", "scheduler", "tokenizer"])
def test_the_generators_digest_covers_its_configs(tiny: TinyCheckpoint, changed: str):
    generator = load_generator(rules_of(tiny), torch.device("cpu"))
    before, pipeline = generator.weights_digest(), pipeline_of(generator)
    pipeline.vae.register_to_config(_name_or_path="elsewhere")
    assert generator.weights_digest() == before
    if changed == "vae":
        pipeline.vae.register_to_config(latents_mean=[1.0] * 16)
    elif changed == "scheduler":
        pipeline.scheduler.register_to_config(sigma_max=79.0)
    else:
        pipeline.tokenizer.add_tokens("another")
    assert generator.weights_digest() != before


def test_rollouts_of_another_generator_are_refused(make: Make, tiny: TinyCheckpoint):
    """As when a directory is replaced in place: the recipe's digest of the weights tells them apart."""
    generate(make())
    recipes = {folder.name for folder in Path(str(make().data.encoded)).iterdir()}
    changed = WorldGenerator.weights_digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorldGenerator, "weights_digest", lambda self: changed(self)[::-1])
        generate(make())
    assert len({folder.name for folder in Path(str(make().data.encoded)).iterdir()} - recipes) == 1
    with pytest.raises(ConfigError, match=r"2 sets of rollouts, which differ in generator\.weights"):
        train(make(), Console(file=io.StringIO()))


# -- the guardrail ----------------------------------------------------------------------------------------------------


class Strict(NoGuardrail):
    """Refuses prompts that ask for a digit."""

    def check_text_safety(self, prompt: str) -> bool:
        return "digit" not in prompt


class Blind(NoGuardrail):
    """Refuses every video."""

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray | None:  # type: ignore[override]
        return None


class Blurred(NoGuardrail):
    """Changes every video."""

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return np.full_like(frames, 128)


def test_refused_prompts_are_left_out_and_named(make: Make):
    made, _ = generate(make(), Strict())
    assert made.refused
    assert made.new == len(entries(make())) > 0
    assert f"the guardrail refuses {len(made.refused)}: {made.refused[0]}" in str(made)


def test_refused_futures_are_left_out(make: Make):
    made, _ = generate(make(), Blind())
    assert made.new == 0 < len(made.refused)


def test_what_the_guardrail_changes_is_encoded_anew(make: Make, tmp_path: Path):
    generate(make(), Blurred())
    plain = make(f"data.encoded={tmp_path / 'plain'}")
    generate(plain)
    theirs = entries(plain)
    for digest, tensor in entries(make()).items():
        assert torch.equal(tensor[:1], theirs[digest][:1])
        assert not torch.allclose(tensor[1:], theirs[digest][1:], atol=0.1)


def test_large_transformers_need_nvidias_guardrail(tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(world_generator, "TINY_PARAMETERS", 1)
    monkeypatch.setattr(world_generator.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"guardrail.*not installed.*pip install cosmos_guardrail"):
        load_generator(rules_of(tiny), torch.device("cpu"))


def test_a_guardrail_without_its_models_says_how_to_fetch_them(tiny: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch):
    def offline() -> None:
        raise OSError("no such file in the cache")

    monkeypatch.setattr(world_generator, "TINY_PARAMETERS", 1)
    monkeypatch.setattr(world_generator.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(world_generator._VIDEO2WORLD, "CosmosSafetyChecker", offline)
    with pytest.raises(ConfigError, match=r"no such file in the cache.*run once with network: python -c"):
        load_generator(rules_of(tiny), torch.device("cpu"))


def few_of_many(make: Make, *overrides: str) -> RunConfig:
    """A run that takes 6 of 40 samples, so that few of those that could stand in are taken themselves."""
    return make("data.train.samples=40", "data.eval=null", *overrides)


def test_what_stands_in_for_refused_samples_is_generated_too(make: Make):
    made, said = generate(few_of_many(make), Strict())
    assert made.refused
    assert "in place of refused ones" in said
    # No sample besides the refused ones is missed in training.
    train(few_of_many(make, f"data.max_bad_samples={len(made.refused)}"), Console(file=io.StringIO()))
    assert generate(few_of_many(make), Strict())[0].new == 0, "a second pass finds nothing to add"


def test_what_stands_in_for_excluded_samples_is_generated_too(make: Make, tmp_path: Path):
    inputs = open_inputs(few_of_many(make))
    names = [inputs.train[index].id for step in range(3) for index in inputs.order.indices(step)]
    (tmp_path / "left.jsonl").write_text("".join(json.dumps({"id": name}) + "\n" for name in names))
    config = few_of_many(make, f"data.exclude=[{tmp_path / 'left.jsonl'}]", "data.max_bad_samples=0")
    generate(config)
    train(config, Console(file=io.StringIO()))


def test_in_packed_rows_a_sample_as_short_stands_in_too(monkeypatch: pytest.MonkeyPatch):
    tokens, unreadable = [5, 4, 4, 9, 8, 3, 4], {2}

    def read(self: Any, place: tuple[int, int], *, pictures: bool) -> Futures:
        return Futures(place, skipped="unreadable" if place[1] in unreadable else "")

    monkeypatch.setattr(listing._Reader, "read", read)
    monkeypatch.setattr(listing._Lister, "_tokens", lambda self, source, index: tokens[index])
    sources: Any = [tokens, tokens]
    collator: Any = None
    for source, packed, expected in ((0, True, [2, 3, 5]), (0, False, [2, 3]), (1, True, [2, 3])):
        lister = listing._Lister(sources, collator, frozenset(), packed)
        assert [futures.place for futures in lister[source, 2]] == [(source, index) for index in expected]
        assert [futures.place for futures in lister[source, 4]] == [(source, 4)]


def test_ranks_take_turns_among_the_futures_of_a_prompt(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """So that what is refused, or cheap, does not fall to one of them; and they meet after a few."""
    missing = [Futures((0, n), str(n), (RolloutFuture(f"{n:032x}", "ab"[n // 11]),)) for n in range(22)]
    taken: dict[int, list[str]] = {}
    meetings: list[int] = []
    for rank in range(3):
        own = taken[rank] = []
        runtime: Any = SimpleNamespace(rank=rank, world_size=3, is_main=False, device_name="cpu")
        runtime.agreement = lambda rank=rank: nullcontext(meetings.append(rank))
        runtime.gather = lambda value: [value]
        generator: Any = SimpleNamespace(encode_prompts=lambda prompts: dict.fromkeys(prompts))
        monkeypatch.setattr(making, "load_futures", lambda *a: (Futures(place) for place in a[2]))
        monkeypatch.setattr(making._Work, "_generate", lambda *a, own=own: own.append(a[4].wanted[0].prompt) or True)
        inputs: Any = SimpleNamespace(train=None, held_out=None, collator=None)
        recipe = Recipe(ROLLOUT, {})
        making._Work(make(), inputs, recipe, tmp_path, runtime, Console()).generate(generator, Any, missing)
    assert [Counter(own) for own in taken.values()] == [{"a": 4, "b": 4}, {"a": 4, "b": 3}, {"a": 3, "b": 4}]
    assert Counter(meetings) == dict.fromkeys(range(3), 3), "two times four futures, and the end"


# -- a run ------------------------------------------------------------------------------------------------------------


def test_from_rollout_to_training_evaluation_and_an_answer(make: Make, tiny: TinyCheckpoint):
    config = make()
    generate(config)
    train(config, Console(file=io.StringIO()))
    checkpoint = resolve_checkpoint(Path(config.output_dir))
    measured = run_ablations(checkpoint, ["as_trained"])
    assert measured.results["as_trained"].total.samples == 4
    assert config.data.eval is not None
    sample = open_source(config.data.eval, config.data.world)[0]
    content = sample.messages[0]["content"]
    question = next(part["text"] for part in content if part["type"] == "text")
    frame = next(part["video"][-1] for part in content if part["type"] == "video")
    digest = frames_digest([frame], question)
    stored = entries(config)[digest]
    seen: list[Tensor] = []
    latents = WorldGenerator.latents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorldGenerator, "latents", lambda self, *a: seen.append(latents(self, *a)) or seen[-1])
        asked = [{"type": "image", "image": frame}, {"type": "text", "text": question}]
        text = answer(find_model(checkpoint), asked, max_new_tokens=3, future=Future(1, config.data.world.rollout))
    assert isinstance(text, str)
    (live,) = seen
    assert torch.equal(live, stored[:2]), "the live future is the one that training would read"
    assert noise_seed(0, digest) != noise_seed(1, digest)


def test_samples_without_a_rollout_are_quarantined(make: Make):
    generate(make(), Strict())
    with pytest.raises(ConfigError, match=r"could not be used"):
        train(make("data.max_bad_samples=0"), Console(file=io.StringIO()))


def test_wrong_inputs(make: Make, tmp_path: Path):
    for overrides, said in (
        (["data.world.frames=history", "data.world.steps=null"], r"data\.world\.frames: nothing to generate"),
        ([f"data.world.rollout.pipeline={tmp_path}"], r"data\.world\.rollout\.pipeline: the configs of its parts"),
    ):
        with pytest.raises(ConfigError, match=said):
            rollout(make(*overrides), Console(file=io.StringIO()))


def test_a_run_without_rollouts_is_told_to_make_them(make: Make, tmp_path: Path):
    (tmp_path / "encoded").mkdir()
    with pytest.raises(ConfigError, match=r"holds no rollouts.*theworld-train rollout"):
        train(make(), Console(file=io.StringIO()))
