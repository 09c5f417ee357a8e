"""Folders of clips: which entries are clips, where their answers come from, and which of their frames are taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.conftest import problems_of
from theworld_train.config.errors import ConfigError
from theworld_train.config.sources import ClipsSource, JsonlSource
from theworld_train.data import Source, UnreadableSampleError, open_source

Write = Callable[..., Path]


def read(path: Path, **fields: Any) -> Source:
    return open_source(ClipsSource(source="clips", path=str(path), **fields))


def frames(write_image: Write, folder: str, number: int = 9) -> None:
    for frame in range(number):
        write_image(f"{folder}/{frame:03}.png", (10 * frame, 0, 0))


def taken(source: Source, index: int = 0) -> list[int]:
    """Returns which frames of `frames` a sample holds, and checks that its outline has as many."""
    clip = source[index].messages[0]["content"][0]["video"]
    blank = source.outline(index).messages[0]["content"][0]["video"]
    assert blank.frames == len(clip)
    return [frame.getpixel((0, 0))[0] // 10 for frame in clip]


def test_answers_that_are_folders(tmp_path: Path, write_image: Write) -> None:
    for folder in ("turns_left/b", "turns_left/a", "stops/c"):
        frames(write_image, folder)
    (tmp_path / "stops" / "d.mp4").touch()
    (tmp_path / "stops" / "e.MP4").touch()
    (tmp_path / "stops" / "notes.txt").touch()
    (tmp_path / "stops" / ".f.mp4").touch()
    (tmp_path / ".cache" / "g").mkdir(parents=True)
    (tmp_path / "README.md").touch()
    source = read(tmp_path, questions=("One?", "Two?"))
    assert list(source.check()) == []
    outlines = [source.outline(index) for index in (0, 3, 4)]
    assert [sample.id for sample in outlines] == ["stops/c", "turns_left/a", "turns_left/b"]
    assert [sample.messages[0]["content"][1]["text"] for sample in outlines] == ["One?", "Two?", "One?"]
    assert [sample.messages[1]["content"][0]["text"] for sample in outlines] == ["stops", "turns left", "turns left"]
    assert len(source) == 5
    assert taken(source) == list(range(9))


def test_answers_that_are_files(tmp_path: Path, write_image: Write) -> None:
    frames(write_image, "a")
    frames(write_image, "b.1")
    (tmp_path / "c.mp4").touch()
    (tmp_path / "a.json").write_text('{"answer": "It stops.", "question": "Does it stop?", "kind": "motion"}')
    (tmp_path / "b.1.json").write_text('{"answer": "It falls.", "question": null}')
    source = read(tmp_path, answers="files", questions=("What next?",))
    (problem,) = problems_of(source)
    assert str(problem).startswith(f"{tmp_path}/c.json: cannot be read: No such file")
    assert [source[index].kind for index in (0, 1)] == ["motion", "all"]
    assert [source[index].messages[0]["content"][1]["text"] for index in (0, 1)] == ["Does it stop?", "What next?"]
    with pytest.raises(UnreadableSampleError, match=r"c\.json: cannot be read"):
        source[2]


def test_clips_are_not_followed_out_of_the_folder(tmp_path: Path, write_image: Write) -> None:
    frames(write_image, "elsewhere/clip")
    (tmp_path / "data" / "label").mkdir(parents=True)
    (tmp_path / "data" / "label" / "clip").symlink_to(tmp_path / "elsewhere" / "clip")
    (tmp_path / "data" / "other").symlink_to(tmp_path / "elsewhere")
    source = read(tmp_path / "data")
    assert [str(problem).split(": clip: ")[1].split(",")[0] for problem in problems_of(source)] == [
        "the path leaves the media root"
    ] * 2
    with pytest.raises(UnreadableSampleError, match="leaves the media root"):
        source[0]


def test_neither_frames_nor_answers_are_read_from_elsewhere(tmp_path: Path, write_image: Write) -> None:
    root = tmp_path / "data"
    frames(write_image, "data/a")
    frames(write_image, "data/b")
    (root / "a" / "999.png").symlink_to(write_image("secret.png"))
    (root / "b" / "999.png").symlink_to("../a/000.png")
    (tmp_path / "secret.json").write_text('{"answer": "secret"}')
    (root / "a.json").write_text('{"answer": "x"}')
    (root / "b.json").symlink_to(tmp_path / "secret.json")
    source = read(root, answers="files")
    first, second = (str(problem) for problem in problems_of(source))
    assert f"a.json: clip: its frame 999.png leaves the media root, {root}" in first
    assert f"b.json: the path leaves the media root, {root}" in second
    for index in (0, 1):
        with pytest.raises(UnreadableSampleError, match="leaves the media root"):
            source[index]
    (root / "b.json").unlink()
    (root / "b.json").write_text('{"answer": "x"}')
    assert len(taken(source, 1)) == 9


@pytest.mark.parametrize(("answers", "layout"), [("folders", "FOLDER/CLIP"), ("files", "CLIP with CLIP.json")])
def test_a_folder_without_clips_says_what_was_expected(tmp_path: Path, answers: str, layout: str) -> None:
    (tmp_path / "label").mkdir()
    with pytest.raises(ConfigError, match=f"it holds no clips; expected {layout}"):
        read(tmp_path, answers=answers)
    with pytest.raises(ConfigError, match="no such folder"):
        read(tmp_path / "nowhere", answers=answers)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ConfigError, match="is a file, expected a folder of clips"):
        read(tmp_path / "a.mp4", answers=answers)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, [0, 5, 10, 15, 20]),
        ({"window_s": 0.8}, [12, 14, 16, 18, 20]),
        ({"window_s": 0.4}, [16, 17, 18, 19, 20]),
        ({"window_s": 0.3}, [20]),
        ({"window_s": 60.0}, [0, 5, 10, 15, 20]),
        ({"sample_fps": 5.0}, [12, 14, 16, 18, 20]),
        ({"sample_fps": 2.5}, [4, 8, 12, 16, 20]),
        ({"sample_fps": 1.0}, [20]),
        ({"sample_fps": 30.0}, [16, 17, 18, 19, 20]),
    ],
)
def test_frames_by_time(tmp_path: Path, write_image: Write, rule: dict[str, float], expected: list[int]) -> None:
    frames(write_image, "label/clip", 21)
    rate = {"directory_fps": 10.0} if rule else {}
    source = read(tmp_path, max_video_frames=5, **rule, **rate)
    assert list(source.check()) == []
    assert taken(source) == expected


def test_clips_that_do_not_tell_their_frame_rate(tmp_path: Path, write_image: Write) -> None:
    frames(write_image, "clip")
    contents = (
        [{"type": "video", "path": "clip"}],
        [{"type": "video", "frames": [f"clip/{i:03}.png" for i in range(9)]}],
    )
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for content in contents:
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    source = open_source(JsonlSource(source="jsonl", path=str(path), window_s=1.0))
    assert [str(problem) for problem in problems_of(source)] == [
        f"{path}:1: messages[0].content[0].path: the clip does not tell its frame rate (got 'clip'); set directory_fps",
        f"{path}:2: messages[0].content[0].frames: the clip does not tell its frame rate; set directory_fps",
    ]
    for index in (0, 1):
        with pytest.raises(UnreadableSampleError, match="set directory_fps"):
            source[index]
        with pytest.raises(UnreadableSampleError, match="set directory_fps"):
            source.outline(index)
    source = open_source(JsonlSource(source="jsonl", path=str(path), window_s=0.4, directory_fps=10.0))
    assert list(source.check()) == []
    assert [taken(source, index) for index in (0, 1)] == [[4, 5, 6, 7, 8]] * 2


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"window_s": 1.0, "sample_fps": 1.0}, "two rules for the same frames"),
        ({"directory_fps": 10.0}, "changes nothing unless"),
        ({"max_video_frames": 4}, r"1 \+ 4k"),
    ],
)
def test_rules_that_contradict_each_other(rule: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ClipsSource(source="clips", path="x", **rule)
