"""JSONL files: every problem names its line, and no row reaches outside the file's directory."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.data.conftest import problems_of
from theworld_train.config.errors import ConfigError
from theworld_train.config.sources import JsonlSource
from theworld_train.data import Source, UnreadableSampleError, check_rows, open_source

Chat = Callable[..., dict[str, Any]]
Write = Callable[..., Path]


def read(path: Path, max_video_frames: int = 9) -> Source:
    return open_source(JsonlSource(source="jsonl", path=str(path), max_video_frames=max_video_frames))


def problems(path: Path) -> list[str]:
    return [str(problem) for problem in problems_of(read(path))]


def test_a_row_becomes_a_sample_with_loaded_images(write_jsonl: Write, write_image: Write, chat: Chat) -> None:
    write_image("pictures/a.png")
    question = [{"type": "image", "path": "pictures/a.png"}, {"type": "text", "text": "what?"}]
    source = read(write_jsonl(chat(question, "orange", id="first", kind="colour")))
    assert list(source.check()) == []
    sample = source[0]
    assert (sample.id, sample.kind) == ("first", "colour")
    user, assistant = sample.messages
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": "orange"}]}
    assert user["role"] == "user"
    assert user["content"][1] == {"type": "text", "text": "what?"}
    assert user["content"][0]["type"] == "image"
    assert user["content"][0]["image"].mode == "RGB"
    assert user["content"][0]["image"].getpixel((0, 0)) == (200, 100, 50)


def test_images_of_the_row(write_jsonl: Write, write_image: Write, chat: Chat) -> None:
    write_image("a.png", (1, 2, 3))
    write_image("b.png", (4, 5, 6))
    question = [{"type": "image", "index": 1}, {"type": "image", "index": 0}]
    source = read(write_jsonl(chat(question, images=["a.png", "b.png"])))
    assert list(source.check()) == []
    pixels = [part["image"].getpixel((0, 0)) for part in source[0].messages[0]["content"]]
    assert pixels == [(4, 5, 6), (1, 2, 3)]


def test_clips_of_frames(write_jsonl: Write, write_image: Write, chat: Chat) -> None:
    for number in range(7):
        write_image(f"clip/{number}.png", (number, 0, 0))
    frames = [f"clip/{number}.png" for number in range(6)]
    source = read(write_jsonl(chat([{"type": "video", "path": "clip"}, {"type": "video", "frames": frames}])), 5)
    assert list(source.check()) == []
    clips = [[frame.getpixel((0, 0))[0] for frame in part["video"]] for part in source[0].messages[0]["content"]]
    assert clips == [[0, 2, 3, 5, 6], [0, 1, 3, 4, 5]]


def test_rows_without_common_fields(write_jsonl: Write, write_image: Write, chat: Chat) -> None:
    write_image("a.png")
    mixed = chat([{"type": "image"}, {"type": "text", "text": "q"}], "a", images=["a.png"], id=7)
    source = read(write_jsonl(chat(), mixed, chat(id="x", extra={"a": 1}), chat(extra=[1])))
    assert list(source.check()) == []
    assert [source[index].id for index in range(4)] == ["data.jsonl:1", "7", "x", "data.jsonl:4"]


def test_blank_lines_and_a_byte_order_mark_do_not_shift_lines(write_jsonl: Write, chat: Chat) -> None:
    path = write_jsonl(chat("first"), "   ", "{broken", "", chat("last"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n"))
    source = read(path)
    assert [source[index].messages[0]["content"][0]["text"] for index in (0, 2)] == ["first", "last"]
    assert [source[index].id for index in (0, 2)] == ["data.jsonl:1", "data.jsonl:5"]
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:3: not valid JSON")


def test_windows_line_ends_and_text_beyond_ascii(write_jsonl: Write, chat: Chat) -> None:
    path = write_jsonl(chat("ü" * 3), chat("\u2028\x85 😀"))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    source = read(path)
    assert list(source.check()) == []
    assert [source[i].messages[0]["content"][0]["text"] for i in range(2)] == ["üüü", "\u2028\x85 😀"]


def test_half_a_surrogate_pair_is_refused_before_a_tokenizer_meets_it(write_jsonl: Write, chat: Chat) -> None:
    row = chat("MARK")
    path = write_jsonl(json.dumps(row).replace("MARK", r"\ud83d"), json.dumps(row).replace("MARK", r"\ud83d\ude00"))
    (problem,) = problems(path)
    assert "data.jsonl:1: not valid JSON" in problem
    assert "surrogates not allowed" in problem


def test_every_problem_of_every_row_is_listed(write_jsonl: Write, chat: Chat) -> None:
    rows = [chat(""), chat(), '{"messages": ', chat([{"type": "image", "path": "none.png"}]), "[]", "[" * 100_000]
    path = write_jsonl(*rows)
    found = problems(path)
    assert [text.split(": ")[0] for text in found] == [f"{path}:{line}" for line in (1, 3, 4, 5, 6)]
    assert "messages[0].content[0].path: no such file (got 'none.png')" in found[2]


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n')
    assert "in UTF-8" in problems(path)[0]


def test_the_list_of_problems_is_capped(write_jsonl: Write) -> None:
    path = write_jsonl(*["{}"] * 25)
    found = [str(problem) for problem in check_rows(read(path), "data.train", None).problems]
    assert len(found) == 21
    assert found[0].startswith(f"{path}:1: messages")
    assert found[-1] == "data.train: and 5 more problems"


def test_double_ids_are_refused(write_jsonl: Write, chat: Chat) -> None:
    (problem,) = problems(write_jsonl(chat(id="a"), chat(id="b"), chat(id="a")))
    assert ":3: id: the id is already that of" in problem
    assert "data.jsonl:1 (got 'a'); make it unique" in problem


def test_a_wrong_row_that_nobody_checked_is_still_refused(write_jsonl: Write, chat: Chat) -> None:
    source = read(write_jsonl(chat(), "{}"))
    with pytest.raises(UnreadableSampleError, match=r"data\.jsonl:2: messages: the row has no 'messages'"):
        source[1]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match="holds no rows"):
        read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl: no such file"):
        read(tmp_path / "none.jsonl")


def test_a_damaged_image_names_the_sample_and_the_file(write_jsonl: Write, write_image: Write, chat: Chat) -> None:
    image = write_image("a.png", size=(60, 60))
    image.write_bytes(image.read_bytes()[:60])
    source = read(write_jsonl(chat([{"type": "image", "path": "a.png"}], id="x")))
    assert list(source.check()) == []
    with pytest.raises(UnreadableSampleError, match=r"x: .*a\.png") as caught:
        source[0]
    assert caught.value.sample_id == "x"


def test_a_medium_that_has_gone_since_the_check(write_jsonl: Write, write_image: Write, chat: Chat) -> None:
    source = read(write_jsonl(chat([{"type": "image", "path": "a.png"}])))
    with pytest.raises(UnreadableSampleError, match=r"data\.jsonl:1: .*a\.png: No such file"):
        source[0]


ESCAPES = [
    ("../secret.png", "leaves the media root"),
    ("a/../../secret.png", "leaves the media root"),
    ("/etc/hostname", "relative to the media root"),
    ("link.png", "leaves the media root"),
    ("folder/secret.png", "leaves the media root"),
    ("https://example.org/a.png", "nothing is fetched"),
    ("file:///etc/hostname", "nothing is fetched"),
    ("data:image/png;base64,AAAA", "nothing is fetched"),
    ("a\0.png", "null character"),
]


@pytest.mark.parametrize(("name", "expected"), ESCAPES)
@pytest.mark.parametrize("kind", ["image", "listed", "video", "frames"])
def test_paths_that_leave_the_directory_are_refused(
    tmp_path: Path, write_jsonl: Write, write_image: Write, chat: Chat, name: str, expected: str, kind: str
) -> None:
    write_image("secret.png")
    root = tmp_path / "data"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    parts = {
        "image": {"type": "image", "path": name},
        "listed": {"type": "image"},
        "video": {"type": "video", "path": name},
        "frames": {"type": "video", "frames": [name]},
    }
    row = chat([parts[kind]], **({"images": [name]} if kind == "listed" else {}))
    path = write_jsonl(row, name="data/data.jsonl")
    (problem,) = problems(path)
    assert expected in problem
    with pytest.raises(UnreadableSampleError, match=expected):
        read(path)[0]


def test_links_within_the_directory_serve(tmp_path: Path, write_jsonl: Write, write_image: Write, chat: Chat) -> None:
    write_image("real/a.png")
    (tmp_path / "link").symlink_to("real")
    source = read(
        write_jsonl(chat([{"type": "image", "path": "link/../real/a.png"}, {"type": "image", "path": "link/a.png"}]))
    )
    assert list(source.check()) == []
    assert len(source[0].messages[0]["content"]) == 2


def test_the_file_may_be_named_relative_to_the_working_directory(
    tmp_path: Path, write_jsonl: Write, write_image: Write, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image("a.png")
    write_jsonl(chat([{"type": "image", "path": "a.png"}]))
    monkeypatch.chdir(tmp_path)
    assert list(read(Path("data.jsonl")).check()) == []


@pytest.mark.parametrize("images", [[None], [3], [""]])
def test_entries_of_images_are_paths(write_jsonl: Write, chat: Chat, images: list[object]) -> None:
    path = write_jsonl(chat([{"type": "image"}], images=images))
    assert "a medium is named by its path" in problems(path)[0]
    with pytest.raises(UnreadableSampleError, match="named by its path"):
        read(path)[0]


def test_an_empty_directory_is_no_clip(tmp_path: Path, write_jsonl: Write, chat: Chat) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "notes.txt").write_text("x")
    (problem,) = problems(write_jsonl(chat([{"type": "video", "path": "clip"}])))
    assert "the directory holds no frames" in problem


def test_a_directory_is_no_image(tmp_path: Path, write_jsonl: Write, chat: Chat) -> None:
    (tmp_path / "a.png").mkdir()
    assert "no such file" in problems(write_jsonl(chat([{"type": "image", "path": "a.png"}])))[0]


def test_the_missing_video_decoder_is_told_once(
    tmp_path: Path, write_jsonl: Write, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    path = write_jsonl(*[chat([{"type": "video", "path": "a.mp4"}])] * 3)
    assert problems(path) == []
    monkeypatch.setattr("theworld_train.data.video.find_spec", lambda name: None)
    (problem,) = problems(path)
    assert "pip install 'theworld-train[video]'" in problem


def test_a_source_can_be_sent_to_a_worker(write_jsonl: Write, write_image: Write, chat: Chat) -> None:
    write_image("a.png")
    source = read(write_jsonl(chat([{"type": "image", "path": "a.png"}])))
    again = pickle.loads(pickle.dumps(source))
    assert isinstance(again[0].messages[0]["content"][0]["image"], Image.Image)


def test_a_row_can_do_without_world_tokens(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    rows = [{"messages": messages}, {"messages": messages, "world": False}, {"messages": messages, "world": "no"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = read(path)
    assert [source[0].world, source[1].world] == [True, False]
    (problem,) = problems_of(source)
    assert "rows.jsonl:3" in str(problem)
    assert "world must be true or false" in str(problem)


@pytest.mark.parametrize("name", ["iVBORw0KGgo" * 40, "a/" * 2500 + "b.png", "loop/a.png"])
def test_paths_that_cannot_be_followed_are_problems(write_jsonl: Write, tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    image = [{"type": "image", "path": name}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": image}, {"role": "assistant", "content": "this"}]
    source = open_source(JsonlSource(source="jsonl", path=str(write_jsonl({"messages": turns}))))
    (problem,) = problems_of(source)
    assert problem.source is not None
    assert problem.source.endswith("data.jsonl:1")
