"""Hugging Face datasets: the layout of published ones is read, and the network is never a surprise."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from tests.unit.data.conftest import problems_of
from theworld_train.batch import Encoder
from theworld_train.config.errors import ConfigError
from theworld_train.config.sources import HubSource
from theworld_train.data import Source, UnreadableSampleError, open_source
from theworld_train.data.hub import fetch_dataset

PART = {"index": Value("int64"), "text": Value("string"), "type": Value("string")}
#: The layout of HuggingFaceH4/llava-instruct-mix-vsft.
FEATURES = Features(
    {"messages": List({"content": List(PART), "role": Value("string")}), "images": List(ImageFeature())}
)


def text(value: str) -> dict[str, Any]:
    return {"index": None, "text": value, "type": "text"}


def row(question: str, answer: str, *colors: tuple[int, int, int]) -> dict[str, Any]:
    images = [{"index": number, "text": None, "type": "image"} for number in range(len(colors))]
    turns = [("user", [text(question), *images]), ("assistant", [text(answer)])]
    return {
        "messages": [{"content": content, "role": role} for role, content in turns],
        "images": [Image.new("RGB", (4, 4), color) for color in colors],
    }


ROWS = [row("what?\n", "red", (255, 0, 0)), row("two?", "both", (0, 255, 0), (0, 0, 255)), row("none?", "right")]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 sets when the packages are imported, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def save(rows: list[dict[str, Any]], features: Features | None = FEATURES) -> Path:
        Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return save


Save = Callable[..., Path]


def read(path: Path | str, **fields: Any) -> Source:
    return open_source(HubSource(source="hub", id=str(path), **fields))


def test_the_published_layout(save: Save) -> None:
    path = save(ROWS)
    source = read(path)
    assert len(source) == 3
    assert list(source.check()) == []
    sample = source[1]
    assert (sample.id, sample.kind) == (f"{path}:1", "all")
    user, assistant = sample.messages
    assert [part["type"] for part in user["content"]] == ["text", "image", "image"]
    assert [part["image"].getpixel((0, 0)) for part in user["content"][1:]] == [(0, 255, 0), (0, 0, 255)]
    assert user["content"][1]["image"].mode == "RGB"
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": "both"}]}
    assert source[2].messages[0]["content"] == [{"type": "text", "text": "none?"}]


def test_ids_kinds_plain_strings_and_further_columns(save: Save) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    source = read(save([{"id": "x", "kind": "k", "messages": turns, "score": 0.5}], features=None))
    assert list(source.check()) == []
    assert (source[0].id, source[0].kind) == ("x", "k")


@pytest.mark.parametrize(
    ("split", "expected"), [("train", [0, 1, 2]), ("train[:2]", [0, 1]), ("train[34%:]", [1, 2]), ("train[-1:]", [2])]
)
def test_splits_and_slices_of_a_directory(save: Save, split: str, expected: list[int]) -> None:
    source = read(save(ROWS), split=split)
    answers = [source[index].messages[1]["content"][0]["text"] for index in range(len(source))]
    assert answers == [["red", "both", "right"][index] for index in expected]


def test_directories_with_several_splits(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS, features=FEATURES)
    DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(tmp_path / "saved")
    assert len(read(tmp_path / "saved", split="test")) == 1
    with pytest.raises(ConfigError, match=r"split 'validation'.*its splits: train, test"):
        read(tmp_path / "saved", split="validation")


def test_an_empty_slice_is_refused(save: Save) -> None:
    with pytest.raises(ConfigError, match="holds no rows"):
        read(save(ROWS), split="train[:0]")


def test_the_check_names_rows_and_reads_no_image(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    without_answer = row("q", "a")
    without_answer["messages"] = without_answer["messages"][:1]
    unused = row("q", "a", (0, 0, 0))
    unused["messages"][0]["content"].pop()
    path = save([ROWS[0], without_answer, unused])
    source = read(path)
    monkeypatch.setattr(ImageFeature, "decode_example", None)
    monkeypatch.setattr("theworld_train.data.arrow.BATCH", 2)
    first, second = (str(problem) for problem in problems_of(source))
    assert first.startswith(f"{path}:1: messages: no assistant turn")
    assert second.startswith(f"{path}:2: images: images listed but unused: 0")
    with pytest.raises(UnreadableSampleError, match="without an answer"):
        source[1]


def test_double_ids_are_refused(save: Save) -> None:
    rows = [{"id": name, **ROWS[2]} for name in ("a", "b", "a")]
    path = save(rows, features=Features({"id": Value("string"), **FEATURES}))
    (problem,) = problems_of(read(path))
    assert str(problem) == f"{path}:2: id: the id is already that of {path}:0 (got 'a'); make it unique"


def test_paths_are_refused(save: Save) -> None:
    turns = [
        {"role": "user", "content": [{"type": "image", "path": "/etc/x.png"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    part = {"type": Value("string"), "path": Value("string"), "text": Value("string")}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)})})
    source = read(save([{"messages": turns}], features))
    (problem,) = problems_of(source)
    assert "paths have no meaning in a dataset" in str(problem)
    with pytest.raises(UnreadableSampleError, match="paths have no meaning"):
        source[0]


def test_images_that_are_paths_are_refused(
    save: Save, write_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(ROWS)
    stored = datasets.List(ImageFeature(decode=False))
    foreign = {**ROWS[0], "images": [{"bytes": None, "path": str(write_image())}]}
    dataset = Dataset.from_list([foreign], features=Features({**FEATURES, "images": stored}))
    monkeypatch.setattr("theworld_train.data.hub._open", lambda _: dataset)
    source = read(path)
    (problem,) = problems_of(source)
    assert "images[0]: paths have no meaning in a dataset" in str(problem)
    with pytest.raises(UnreadableSampleError, match="paths have no meaning"):
        source[0]


def test_a_damaged_image_names_the_sample(save: Save) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, format="PNG")
    damaged = {**ROWS[0], "images": [{"bytes": buffer.getvalue()[:900], "path": None}]}
    source = read(save([damaged]))
    assert list(source.check()) == []
    with pytest.raises(UnreadableSampleError, match=r"images\[0\]: the image is damaged") as caught:
        source[0]
    assert caught.value.sample_id.endswith("saved:0")


def test_a_dataset_without_messages_is_refused(save: Save) -> None:
    with pytest.raises(ConfigError, match=r"no column 'messages'; did you mean 'message'\?"):
        read(save([{"message": "x"}], features=None))


def test_a_directory_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="written by save_to_disk"):
        read(tmp_path)


def test_a_dataset_that_is_not_cached_is_to_be_fetched_first() -> None:
    with pytest.raises(ConfigError, match=r"someone/nothing: .*theworld-train fetch CONFIG"):
        read("someone/nothing")


@pytest.mark.parametrize("name", ["a/b/c", "./missing", "/missing/too"])
def test_a_missing_directory_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a directory nor a dataset"):
        read(name)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def _cached(tmp_path: Path) -> None:
    """A dataset in the cache, as the hub's loader leaves it there."""
    folder = tmp_path / "cache" / "someone___pictures" / "default" / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    dataset = Dataset.from_list(ROWS, features=FEATURES)
    dataset.save_to_disk(tmp_path / "built")
    (tmp_path / "built" / "data-00000-of-00001.arrow").rename(folder / "pictures-train.arrow")
    info = json.loads((tmp_path / "built" / "dataset_info.json").read_text())
    split = {"name": "train", "num_examples": 3, "dataset_name": "pictures"}
    info.update(builder_name="parquet", dataset_name="pictures", config_name="default", splits={"train": split})
    info["version"] = {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.usefixtures("_cached")
def test_a_cached_dataset_is_read_offline() -> None:
    source = read("someone/pictures", split="train[:2]")
    assert len(source) == 2
    assert list(source.check()) == []
    assert source[0].id == "someone/pictures:0"
    with pytest.raises(ConfigError, match="split 'test'"):
        read("someone/pictures", split="test")


@pytest.mark.usefixtures("_cached")
def test_another_commit_than_the_pinned_one_is_refused() -> None:
    assert len(read("someone/pictures", revision=COMMIT)) == 3
    with pytest.raises(ConfigError, match=f"holds commit {COMMIT}, not {'f' * 40}; .*fetch CONFIG"):
        read("someone/pictures", revision="f" * 40)


@pytest.mark.usefixtures("_cached")
def test_fetching_tells_the_commit(save: Save) -> None:
    assert fetch_dataset(HubSource(source="hub", id="someone/pictures")) == COMMIT
    assert fetch_dataset(HubSource(source="hub", id=str(save(ROWS)))) is None


def test_a_source_can_be_sent_to_a_worker(save: Save) -> None:
    again = pickle.loads(pickle.dumps(open_source(HubSource(source="hub", id=str(save(ROWS))))))
    assert again[0].messages[0]["content"][1]["image"].getpixel((0, 0)) == (255, 0, 0)


def test_outline_has_the_tokens_of_a_row_and_no_pixels(save: Callable[..., Path], encoder: Encoder):
    source = read(save(ROWS))
    for index in range(len(ROWS)):
        outline, loaded = source.outline(index), source[index]
        tokens, expected = (encoder.encode(sample.messages) for sample in (outline, loaded))
        assert tokens.input_ids.tolist() == expected.input_ids.tolist()
        assert tokens.pixel_values is None
        assert (outline.id, outline.kind, outline.world) == (loaded.id, loaded.kind, loaded.world)
