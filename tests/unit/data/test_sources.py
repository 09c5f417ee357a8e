"""Every source: a sample in its true format becomes the same structure, and a wrong row is told by place and field."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image

from tests.unit.data.conftest import problems_of
from theworld_train.batch import Encoder
from theworld_train.config import parse_run_config
from theworld_train.config.errors import ConfigError
from theworld_train.data import Source, UnreadableSampleError, open_source

Row = dict[str, Any]
Write = Callable[[Path, list[Row]], None]
ORANGE = (200, 100, 50)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Copies of Parquet files go where the test is."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def jpeg(size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, ORANGE).save(buffer, format="PNG")
    return buffer.getvalue()


# -- writers of each container ----------------------------------------------------------------------------------------


def as_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_array(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows, indent=2))


def as_parquet(path: Path, rows: list[Row]) -> None:
    datasets.Dataset.from_list(rows).to_parquet(path)


def as_groups(path: Path, rows: list[Row]) -> None:
    """Writes row groups of two rows each."""
    datasets.Dataset.from_list(rows).to_parquet(path, batch_size=2)


def as_tsv(path: Path, rows: list[Row]) -> None:
    path.write_text("".join("\t".join(row.values()) + "\n" for row in rows))


def as_shard(path: Path, rows: list[Row]) -> None:
    """Writes members as img2dataset does: an image, a text and a JSON file of the same nine digits for each sample."""
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            for extension, value in row.items():
                data = value if isinstance(value, bytes) else value.encode()
                member = tarfile.TarInfo(f"{number:09}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def as_clips(path: Path, rows: list[Row]) -> None:
    """Writes a directory of frames for each clip, and beside it its JSON file unless it has none."""
    for row in rows:
        for number in range(5):
            frame = path / row["clip"] / f"{number}.png"
            frame.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), ORANGE).save(frame)
        if "beside" in row:
            (path / f"{row['clip']}.json").write_text(row["beside"])


def as_dataset(path: Path, rows: list[Row]) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(path)


def as_repository(path: Path, rows: list[Row]) -> None:
    """Writes a directory as the hub has it."""
    (path / "data").mkdir(parents=True)
    as_groups(path / "data" / "train-00000-of-00001.parquet", rows)


# -- the samples ------------------------------------------------------------------------------------------------------

OWN = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
    ],
}
CHAT = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A cup."},
]
REGIONS = {
    "filename": "000a1b2c3d4e5f6a",
    "conversations": [
        {"from": "human", "value": "<image>\nDoes <mask> <depth> have a greater width than <mask> <depth>?"},
        {"from": "gpt", "value": "Region [0] might be narrower than Region [1]."},
    ],
    "rle": [{"size": [48, 64], "counts": "PP]{0"}, {"size": [48, 64], "counts": '"\\{'}],
    "bbox": [[1, 2, 20, 30], [30, 5, 60, 40]],
}
VSR = {
    "image": "000000050403.jpg",
    "image_link": "http://images.cocodataset.org/train2017/000000050403.jpg",
    "caption": "The teddy bear is in front of the person.",
    "label": 1,
    "relation": "in front of",
    "annotator_id": 31,
    "vote_true_validator_id": [2, 6],
    "vote_false_validator_id": [],
}
#: The metadata that img2dataset writes.
METADATA = json.dumps({"url": "https://example.org/1.jpg", "caption": "a cup", "key": "000000000", "status": "success"})


@dataclass
class Example:
    """One row of a source, what it becomes, and rows that are wrong.

    Attributes:
        config: The YAML of the source without its path.
        name: Name of the file or folder.
        write: Writes rows.
        row: A right row.
        image: Name of the image file that it needs, if it needs one.
        question: What the user says, after the image or clip.
        answer: What the assistant says.
        place: What follows the path in the name of the first row.
        kind: Kind of the sample.
        wrong: Changes to the row, each with the beginning of the error after the name of the row.
    """

    config: str
    name: str
    write: Write
    row: Row
    image: str | None
    question: str
    answer: str
    place: str
    kind: str = "all"
    wrong: list[tuple[Row, str]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Names the file or folder in the YAML of the source."""
        return "id" if "source: hub" in self.config else "path"


CHAT_WRONG = [
    ({"conversations": None}, "conversations: expected a list of turns"),
    ({"conversations": CHAT[:1]}, "conversations: no assistant turn"),
    ({"conversations": [CHAT[0], CHAT[0]]}, "conversations[1].value: the text asks for more media"),
    ({"conversations": [CHAT[0], CHAT[1], CHAT[1]]}, "conversations[2].from: expected a turn of the user"),
    ({"conversations": [CHAT[0], {"from": "gtp", "value": "A cup."}]}, "conversations[1].from: unknown speaker"),
    ({"conversations": [CHAT[0], {"from": "gpt", "value": "  "}]}, "conversations[1].value: the content is empty"),
]
TURN = OWN["messages"]
EXAMPLES = {
    "jsonl": Example(
        "{source: jsonl}",
        "data.jsonl",
        as_lines,
        {**OWN, "images": ["a.jpg"]},
        "a.jpg",
        "What is it?",
        "A cup.",
        ":1",
        wrong=[
            ({"messages": TURN[:1]}, "messages: no assistant turn"),
            ({"images": ["../a.jpg"]}, "images[0]: the path leaves the media root"),
            ({"images": []}, "messages[0].content[0]: the part asks for image 0"),
        ],
    ),
    "parquet": Example(
        "{source: parquet}",
        "data.parquet",
        as_parquet,
        {**OWN, "images": ["a.jpg"], "score": 0.5},
        "a.jpg",
        "What is it?",
        "A cup.",
        "[0]",
        wrong=[
            ({"messages": TURN[:1]}, "messages: no assistant turn"),
            ({"images": ["/etc/a.jpg"]}, "images[0]: media paths are relative"),
        ],
    ),
    "parquet as a stream": Example(
        "{source: parquet, streaming: true}",
        "data.parquet",
        as_groups,
        {**OWN, "images": [{"bytes": jpeg(), "path": None}], "score": 0.5},
        None,
        "What is it?",
        "A cup.",
        "[0]",
        wrong=[
            ({"messages": TURN[:1]}, "messages: no assistant turn"),
            ({"images": []}, "messages[0].content[0]: the part asks for image 0"),
        ],
    ),
    "llava": Example(
        "{source: llava}",
        "llava_v1_5_mix.json",
        as_array,
        {"id": "000000033471", "image": "coco/train2017/a.jpg", "conversations": CHAT},
        "coco/train2017/a.jpg",
        "What is it?",
        "A cup.",
        "[0]",
        wrong=[
            *CHAT_WRONG,
            ({"image": None}, "conversations[0].value: the text asks for more media than the row's 'image' holds"),
            ({"image": "coco/b.jpg"}, "image: no such file (got 'coco/b.jpg')"),
            ({"image": "https://example.org/a.jpg"}, "image: media are files; nothing is fetched"),
            ({"image": ["coco/train2017/a.jpg", "b.jpg"]}, "image[1]: the row's texts ask for 1 of 2"),
        ],
    ),
    "sharegpt": Example(
        "{source: sharegpt}",
        "sharegpt.jsonl",
        as_lines,
        {"conversations": CHAT, "images": ["a.jpg"]},
        "a.jpg",
        "What is it?",
        "A cup.",
        ":1",
        wrong=[
            *CHAT_WRONG,
            ({"images": ["../a.jpg"]}, "images[0]: the path leaves the media root"),
            ({"system": 3}, "system: content must be a string or a list of parts"),
        ],
    ),
    "captions": Example(
        '{source: captions, questions: ["What is it?"]}',
        "metadata.json",
        as_array,
        {"id": "GCC_train_002582585", "image": "a.jpg", "caption": "a cup", "url": "http://example.org/a.jpg"},
        "a.jpg",
        "What is it?",
        "a cup",
        "[0]",
        wrong=[
            ({"caption": " "}, "caption: expected a caption"),
            ({"image": None}, "image: the row names no image"),
            ({"image": "http://example.org/a.jpg"}, "image: media are files; nothing is fetched"),
        ],
    ),
    "captions in TSV": Example(
        '{source: captions, questions: ["What is it?"]}',
        "cc3m.tsv",
        as_tsv,
        {"caption": "a cup", "image": "a.jpg"},
        "a.jpg",
        "What is it?",
        "a cup",
        ":1",
        wrong=[
            ({"image": "http://example.org/a.jpg"}, "image: media are files; nothing is fetched"),
            ({"more": "x"}, "expected 2 columns, caption and image, and found 3"),
        ],
    ),
    "captions in Parquet": Example(
        '{source: captions, questions: ["What is it?"], image_field: jpg}',
        "00000.parquet",
        as_parquet,
        {"jpg": jpeg(), "caption": "a cup", "key": "000000000"},
        None,
        "What is it?",
        "a cup",
        "[0]",
        wrong=[({"jpg": None}, "jpg: the row names no image"), ({"caption": None}, "caption: expected a caption")],
    ),
    "vsr": Example(
        "{source: vsr}",
        "train.jsonl",
        as_lines,
        VSR,
        "000000050403.jpg",
        "Is the statement true or false? The teddy bear is in front of the person.",
        "true",
        ":1",
        kind="in front of",
        wrong=[
            ({"label": "1"}, "label: expected 1 for a true statement or 0 for a false one (got '1')"),
            ({"label": None}, "label: expected 1 for a true statement"),
            ({"caption": None}, "caption: expected a statement"),
            ({"image": None}, "image: the row names no image"),
            ({"relation": 3}, "relation: kind must be a string"),
        ],
    ),
    "spatialrgpt": Example(
        "{source: spatialrgpt}",
        "result_10_depth_convs.json",
        as_array,
        REGIONS,
        "000a1b2c3d4e5f6a.jpg",
        "Does Region [0] have a greater width than Region [1]?",
        "Region [0] might be narrower than Region [1].",
        "[0]",
        wrong=[
            ({"filename": None}, "filename: the row names no image"),
            ({"filename": "../a"}, "filename: the path leaves the media root"),
            ({"bbox": [[1, 2, 20, 30]]}, "bbox: 1 boxes for 2 <mask>"),
            ({"bbox": REGIONS["bbox"] * 2}, "bbox: 4 boxes for 2 <mask>"),
            ({"bbox": [[1, 2, 20, 30], [9, 5, 6, 40]]}, "bbox[1]: expected a box of four numbers"),
            ({"rle": [{"size": [48]}]}, "rle[0].size: expected the height and the width of a mask"),
            ({"conversations": []}, "conversations: expected a list of turns"),
        ],
    ),
    "webdataset": Example(
        '{source: webdataset, questions: ["What is it?"]}',
        "00000.tar",
        as_shard,
        {"jpg": jpeg(), "json": METADATA, "txt": "a cup"},
        None,
        "What is it?",
        "a cup",
        ":000000000",
        wrong=[
            ({"txt": ""}, "txt: expected a caption"),
            ({"txt": b"\xff"}, "the text is not in UTF-8"),
            ({"json": "{"}, "not valid JSON"),
            ({"png": jpeg()}, "images: expected one image or clip beside the caption (got 2)"),
        ],
    ),
    "webdataset of conversations": Example(
        "{source: webdataset, format: conversations}",
        "00000.tar",
        as_shard,
        {"jpg": jpeg(), "json": json.dumps(OWN)},
        None,
        "What is it?",
        "A cup.",
        ":000000000",
        wrong=[
            ({"json": "[]"}, "json: expected an object (got [])"),
            ({"json": json.dumps({"messages": TURN[:1]})}, "messages: no assistant turn"),
            (
                {"json": json.dumps(OWN).replace('"type": "image"', '"type": "image", "path": "/etc/hostname"')},
                "images: images listed but unused: 0",
            ),
        ],
    ),
    "webdataset of llava": Example(
        "{source: webdataset, format: llava}",
        "00000.tar",
        as_shard,
        {"jpg": jpeg(), "json": json.dumps({"id": "1", "conversations": CHAT})},
        None,
        "What is it?",
        "A cup.",
        ":000000000",
        wrong=[({"json": json.dumps({"conversations": CHAT[1:]})}, "image[0]: the row's texts ask for 0 of 1")],
    ),
    "clips": Example(
        '{source: clips, answers: files, questions: ["What is it?"], max_video_frames: 5}',
        "clips",
        as_clips,
        {"clip": "a", "beside": json.dumps({"answer": "A cup.", "kind": "things"})},
        None,
        "What is it?",
        "A cup.",
        "/a.json",
        kind="things",
        wrong=[
            ({"beside": "{}"}, "answer: expected a text"),
            ({"beside": "[]"}, "a row must be an object"),
            ({"beside": '{"answer": "x", "qestion": "y"}'}, "qestion: unknown field"),
            ({"beside": '{"answer": "x", "question": " 3", "kind": 3}'}, "kind: kind must be a string"),
        ],
    ),
    "clips in folders": Example(
        '{source: clips, questions: ["What is it?"], max_video_frames: 5}',
        "clips",
        as_clips,
        {"clip": "a_cup/1"},
        None,
        "What is it?",
        "a cup",
        "/a_cup/1",
    ),
    "hub": Example(
        "{source: hub}",
        "saved",
        as_dataset,
        {**OWN, "images": [{"bytes": jpeg(), "path": None}]},
        None,
        "What is it?",
        "A cup.",
        ":0",
        wrong=[({"messages": TURN[:1]}, "messages: no assistant turn")],
    ),
    "hub as a stream": Example(
        "{source: hub, streaming: true}",
        "repository",
        as_repository,
        {**OWN, "images": [{"bytes": jpeg(), "path": None}]},
        None,
        "What is it?",
        "A cup.",
        "/data/train-00000-of-00001.parquet[0]",
        wrong=[({"messages": TURN[:1]}, "messages: no assistant turn")],
    ),
    "hub in LLaVA's format": Example(
        "{source: hub, format: llava}",
        "saved",
        as_dataset,
        {"id": "1", "image": {"bytes": jpeg(), "path": "a.jpg"}, "conversations": CHAT, "data_source": "x"},
        None,
        "What is it?",
        "A cup.",
        ":0",
        wrong=[
            ({"conversations": CHAT[:1]}, "conversations: no assistant turn"),
            ({"image": {"bytes": None, "path": "/etc/a.jpg"}}, "image: paths have no meaning in a dataset"),
        ],
    ),
    "hub in ShareGPT's format": Example(
        "{source: hub, format: sharegpt}",
        "saved",
        as_dataset,
        {"images": [{"bytes": jpeg(), "path": None}], "conversations": CHAT},
        None,
        "What is it?",
        "A cup.",
        ":0",
    ),
}


def open_example(example: Example, folder: Path, rows: list[Row], **fields: object) -> Source:
    path = folder / example.name
    example.write(path, rows)
    if example.image is not None:
        image = folder / example.image
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(jpeg())
    source = {**yaml.safe_load(example.config), example.key: str(path), **fields}
    config = {
        "name": "example",
        "output_dir": "runs/example",
        "trainable": {"world_projector": {}},
        "data": {"train": source},
        "training": {"max_steps": 1},
    }
    return open_source(parse_run_config(config, source="test").data.train)


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_a_sample_becomes_the_same_structure(example: Example, tmp_path: Path, encoder: Encoder) -> None:
    source = open_example(example, tmp_path, [example.row])
    assert list(source.check()) == []
    assert len(source) == 1
    sample = source[0]
    assert (sample.kind, sample.world) == (example.kind, True)
    # A folder of clips calls its samples by their clips, a dataset by the name that the config gives it.
    named = f"{example.name}{example.place}" if example.key == "path" else f"{tmp_path / example.name}{example.place}"
    assert sample.id == (example.row["clip"] if example.write is as_clips else named)
    user, assistant = sample.messages
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": example.answer}]}
    assert user["role"] == "user"
    medium, text = user["content"]
    assert text == {"type": "text", "text": example.question}
    images = medium["video"] if example.write is as_clips else [medium["image"]]
    assert medium.keys() == {"type", "video" if example.write is as_clips else "image"}
    assert len(images) == (5 if example.write is as_clips else 1)
    for image in images:
        assert isinstance(image, Image.Image)
        assert image.mode == "RGB"
        assert image.getpixel((image.width - 1, image.height - 1)) == ORANGE

    outline = source.outline(0)
    assert (outline.id, outline.kind, outline.world) == (sample.id, sample.kind, sample.world)
    blank, whole = encoder.encode(outline.messages), encoder.encode(sample.messages)
    assert blank.input_ids.tolist() == whole.input_ids.tolist()
    assert blank.pixel_values is None
    again = pickle.loads(pickle.dumps(source))
    assert again[0].messages == sample.messages


WRONG = [
    pytest.param(example, change, expected, id=f"{name}-{expected.split(':')[0][:30]}-{number}")
    for name, example in EXAMPLES.items()
    for number, (change, expected) in enumerate(example.wrong)
]


@pytest.mark.parametrize(("example", "change", "expected"), WRONG)
def test_a_wrong_row_is_told_by_file_row_and_field(
    example: Example, change: Row, expected: str, tmp_path: Path
) -> None:
    source = open_example(example, tmp_path, [{**example.row, **change}])
    problem, *more = map(str, problems_of(source))
    assert more == []
    assert problem.startswith(f"{tmp_path / example.name}{example.place}: {expected}")
    # A row that nobody checked does not get by.
    with pytest.raises(UnreadableSampleError):
        source[0]


#: The sources whose rows name an image by its path, and the field that does.
NAMING = {
    "jsonl": "images",
    "parquet": "images",
    "llava": "image",
    "sharegpt": "images",
    "captions": "image",
    "captions in TSV": "image",
    "vsr": "image",
    "spatialrgpt": "filename",
}
ESCAPES = {
    "../secret.jpg": "the path leaves the media root",
    "a/../../secret.jpg": "the path leaves the media root",
    "link.jpg": "the path leaves the media root",
    "folder/secret.jpg": "the path leaves the media root",
    "/etc/hostname.jpg": "media paths are relative to the media root",
    "file:///etc/hostname.jpg": "nothing is fetched",
    "https://example.org/a.jpg": "nothing is fetched",
    "data:image/png;base64,AAAA.jpg": "nothing is fetched",
}


@pytest.mark.parametrize("root", ["beside", "media_root"])
@pytest.mark.parametrize("name", NAMING)
def test_no_source_lets_a_row_out_of_the_media_root(name: str, root: str, tmp_path: Path) -> None:
    example, key = EXAMPLES[name], NAMING[name]
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "folder").symlink_to(tmp_path)
    value = example.row[key]
    rows = [{**example.row, key: [path] if isinstance(value, list) else path} for path in ESCAPES]
    if root == "beside":
        source = open_example(example, folder, rows)
    else:
        (tmp_path / "rows").mkdir()
        source = open_example(example, tmp_path / "rows", rows, media_root=str(folder))
    problems = [str(problem) for problem in problems_of(source)]
    assert len(problems) == len(ESCAPES)
    for index, (problem, expected) in enumerate(zip(problems, ESCAPES.values(), strict=True)):
        assert f": {key}" in problem
        assert expected in problem
        with pytest.raises(UnreadableSampleError, match=expected):
            source[index]


@pytest.mark.parametrize("name", NAMING)
def test_media_may_lie_elsewhere(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    images, rows = tmp_path / "images", tmp_path / "annotations"
    images.mkdir()
    rows.mkdir()
    assert example.image is not None
    (images / example.image).parent.mkdir(parents=True, exist_ok=True)
    (images / example.image).write_bytes(jpeg())
    source = open_example(Example(**{**vars(example), "image": None}), rows, [example.row], media_root=str(images))
    assert list(source.check()) == []
    assert source[0].messages[0]["content"][0]["image"].size == (64, 48)


def test_a_media_root_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.jsonl: media_root: no such directory \(got 'nowhere'\)"):
        open_example(EXAMPLES["vsr"], tmp_path, [VSR], media_root="nowhere")


@pytest.mark.parametrize("name", ["llava", "sharegpt", "vsr", "spatialrgpt", "captions"])
@pytest.mark.parametrize(
    ("suffix", "write", "place"),
    [(".json", as_array, "[1]"), (".jsonl", as_lines, ":2"), (".parquet", as_parquet, "[1]")],
)
def test_a_format_is_read_from_each_container(name: str, suffix: str, write: Write, place: str, tmp_path: Path) -> None:
    example = Example(**{**vars(EXAMPLES[name]), "name": f"rows{suffix}", "write": write})
    source = open_example(example, tmp_path, [example.row, example.row])
    assert list(source.check()) == []
    assert [source[index].messages[1]["content"][0]["text"] for index in (0, 1)] == [example.answer] * 2
    assert source[1].id == f"rows{suffix}{place}"


@pytest.mark.parametrize("name", ["llava", "vsr"])
def test_a_file_of_another_kind_is_refused(name: str, tmp_path: Path) -> None:
    example = Example(**{**vars(EXAMPLES[name]), "name": "rows.csv"})
    with pytest.raises(ConfigError, match=r"rows\.csv: rows of source: \w+ are read from files named \.json, \.jsonl"):
        open_example(example, tmp_path, [example.row])


@pytest.mark.parametrize(
    "name", [name for name, example in EXAMPLES.items() if example.write is not as_clips and example.key == "path"]
)
def test_a_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    example = Example(**{**vars(EXAMPLES[name]), "write": lambda path, rows: None})
    with pytest.raises(ConfigError, match=r"(?i)no such file"):
        open_example(example, tmp_path, [])


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.key == "path"])
def test_a_source_without_rows_is_refused(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    if example.write is as_clips:
        (tmp_path / example.name).mkdir()
    if example.write in (as_parquet, as_groups):
        example = replace(example, write=lambda path, _: datasets.Dataset.from_dict({"messages": []}).to_parquet(path))
    with pytest.raises(ConfigError, match="holds no"):
        open_example(example, tmp_path, [])


def test_ids_of_other_formats_may_repeat(tmp_path: Path) -> None:
    source = open_example(EXAMPLES["llava"], tmp_path, [EXAMPLES["llava"].row] * 2)
    assert list(source.check()) == []
    assert len({source[0].id, source[1].id}) == 2


@pytest.mark.parametrize("name", ["jsonl", "parquet", "llava", "sharegpt", "clips"])
def test_clips_longer_than_the_temporal_embedding_reaches_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train has clips of 21 frames"):
        open_example(EXAMPLES[name], tmp_path, [EXAMPLES[name].row], max_video_frames=21)
