"""Every rule on the structure of a row: what is refused, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from theworld_train.data.conversation import ImagePart, TextPart, VideoPart, parse_row

Chat = Callable[..., dict[str, Any]]
TEXT = {"type": "text", "text": "what?"}


def turn(role: str, content: object = "text") -> dict[str, Any]:
    return {"role": role, "content": content}


def the_problem(row: object) -> str:
    conversation, problems = parse_row(row, "data.jsonl:3")
    assert conversation is None
    assert len(problems) == 1, problems
    assert problems[0].source == "data.jsonl:3"
    return str(problems[0])


def test_plain_strings_and_parts_mean_the_same(chat: Chat) -> None:
    plain, _ = parse_row(chat(), "x")
    parts, _ = parse_row(chat([TEXT], [{"type": "text", "text": "this"}]), "x")
    assert plain == parts
    assert plain is not None
    assert plain.messages[0].parts == (TextPart("what?"),)


@pytest.mark.parametrize(("fields", "expected"), [({}, (None, "all")), ({"id": "a", "kind": "digit"}, ("a", "digit"))])
def test_id_and_kind_are_optional(chat: Chat, fields: dict[str, Any], expected: tuple[str | None, str]) -> None:
    conversation, _ = parse_row(chat(**fields), "x")
    assert conversation is not None
    assert (conversation.id, conversation.kind) == expected


def test_a_number_serves_as_id_and_null_as_none(chat: Chat) -> None:
    first, _ = parse_row(chat(id=0), "x")
    second, _ = parse_row(chat(id=None, kind=None, images=None), "x")
    assert first is not None
    assert second is not None
    assert (first.id, second.id, second.kind) == ("0", None, "all")


def test_parts_of_the_hub_layout_with_nulls_for_unused_fields(chat: Chat) -> None:
    question = [{"index": None, "text": "what?\n", "type": "text"}, {"index": 0, "text": None, "type": "image"}]
    answer = [{"index": None, "text": "this", "type": "text"}]
    conversation, problems = parse_row(chat(question, answer, images=["a.png"]), "x")
    assert problems == []
    assert conversation is not None
    assert conversation.messages[0].parts == (TextPart("what?\n"), ImagePart(None, 0, "images[0]"))
    assert conversation.images == ("a.png",)


def test_bare_images_take_the_next_of_the_row(chat: Chat) -> None:
    bare = {"type": "image"}
    question = [
        bare,
        {"type": "image", "index": 2},
        TEXT,
        {"type": "image", "index": 1},
        {"type": "image", "path": "x.png"},
    ]
    conversation, problems = parse_row(chat(question, images=["a", "b", "c"]), "x")
    assert problems == []
    assert conversation is not None
    assert [part.index for part in conversation.media() if isinstance(part, ImagePart)] == [0, 2, 1, None]
    again, _ = parse_row(chat([{"type": "image", "index": 0}, bare, TEXT], images=["a", "b"]), "x")
    assert again is not None
    assert [part.index for part in again.media() if isinstance(part, ImagePart)] == [0, 1]


def test_bare_images_are_counted_through_the_whole_conversation() -> None:
    picture = [{"type": "image"}, TEXT]
    row = {"messages": [turn("user", picture), turn("assistant"), turn("user", picture), turn("assistant")]}
    conversation, _ = parse_row({**row, "images": ["a", "b"]}, "x")
    assert conversation is not None
    assert [part.index for part in conversation.media() if isinstance(part, ImagePart)] == [0, 1]


def test_video_parts(chat: Chat) -> None:
    clip, frames = {"type": "video", "path": "a.mp4"}, {"type": "video", "frames": ["1.png", "2.png"]}
    conversation, problems = parse_row(chat([clip, frames, TEXT]), "x")
    assert problems == []
    assert conversation is not None
    assert conversation.media() == [
        VideoPart("a.mp4", (), "messages[0].content[0].path"),
        VideoPart(None, ("1.png", "2.png"), "messages[0].content[1].frames"),
    ]


@pytest.mark.parametrize("roles", ["system user assistant", "user assistant user assistant", "user assistant user"])
def test_orders_of_turns_that_serve(roles: str) -> None:
    assert parse_row({"messages": [turn(role) for role in roles.split()]}, "x")[1] == []


@pytest.mark.parametrize(
    ("roles", "key", "expected"),
    [
        ("user user assistant", "messages[1].role", "expected a turn of the assistant"),
        ("assistant user", "messages[0].role", "expected a turn of the user"),
        ("system assistant user", "messages[1].role", "expected a turn of the user"),
        ("user system assistant", "messages[1].role", "an optional system message comes first"),
        ("system system user assistant", "messages[1].role", "an optional system message comes first"),
        ("user assistant assistant", "messages[2].role", "expected a turn of the user"),
    ],
)
def test_turns_alternate_after_an_optional_system_message(roles: str, key: str, expected: str) -> None:
    problem = the_problem({"messages": [turn(role) for role in roles.split()]})
    assert problem.startswith(f"data.jsonl:3: {key}: ")
    assert expected in problem


@pytest.mark.parametrize("roles", ["user", "system user", "system"])
def test_a_row_without_an_answer_is_refused(roles: str) -> None:
    problem = the_problem({"messages": [turn(role) for role in roles.split()]})
    assert "a data row without an answer" in problem
    assert "add the answer" in problem


@pytest.mark.parametrize("content", ["", "  \n", [], [{"type": "text", "text": " "}]])
@pytest.mark.parametrize("index", [0, 1])
def test_empty_content_is_refused(content: object, index: int) -> None:
    messages = [turn("user"), turn("assistant")]
    messages[index]["content"] = content
    assert the_problem({"messages": messages}).startswith(
        f"data.jsonl:3: messages[{index}].content: the content is empty"
    )


def test_a_picture_is_content_enough_for_a_question(chat: Chat) -> None:
    assert parse_row(chat([{"type": "image", "path": "a.png"}]), "x")[1] == []


def test_an_empty_text_beside_other_parts_is_harmless(chat: Chat) -> None:
    assert parse_row(chat([{"type": "text", "text": ""}, TEXT]), "x")[1] == []


BAD_QUESTIONS = [
    ([{"type": "imgae", "path": "a"}], "messages[0].content[0].type", "did you mean 'image'?"),
    ([{"type": "image_url", "image_url": "a"}], "messages[0].content[0].type", "unknown part type"),
    ([{"type": 3}], "messages[0].content[0].type", "known: text, image, video"),
    ([{"type": ["text"]}], "messages[0].content[0].type", "unknown part type"),
    ([{"text": "a"}], "messages[0].content[0].type", "known: text, image, video"),
    ([{"type": "text"}], "messages[0].content[0].text", "needs a string"),
    ([{"type": "text", "text": 3}], "messages[0].content[0].text", "got 3"),
    (["a"], "messages[0].content[0]", 'write {"type": "text"'),
    ([None], "messages[0].content[0]", "must be an object"),
    (3, "messages[0].content", "a string or a list of parts"),
    (None, "messages[0].content", "a string or a list of parts"),
    ({"type": "text"}, "messages[0].content", "a string or a list of parts"),
    ([{"type": "image", "pth": "a"}], "messages[0].content[0].pth", "did you mean 'path'?"),
    ([{"type": "image", "text": "a", "path": "a"}], "messages[0].content[0].text", "unknown field"),
    ([{"type": "image", "path": "a", "index": 0}], "messages[0].content[0]", "either 'path' or 'index'"),
    ([{"type": "image", "path": ""}], "messages[0].content[0].path", "not empty"),
    ([{"type": "image", "path": 3}], "messages[0].content[0].path", "must be a string"),
    ([{"type": "image"}], "messages[0].content[0]", "asks for image 0 of the row, whose 'images' holds 0"),
    ([{"type": "image", "index": 4}], "messages[0].content[0]", "asks for image 4"),
    ([{"type": "image", "index": -1}], "messages[0].content[0].index", "whole number"),
    ([{"type": "image", "index": True}], "messages[0].content[0].index", "whole number"),
    ([{"type": "image", "index": "0"}], "messages[0].content[0].index", "whole number"),
    ([{"type": "video"}], "messages[0].content[0]", "the part asks for video 0 of the row, whose 'videos' holds 0"),
    ([{"type": "video", "path": "a", "frames": ["b"]}], "messages[0].content[0]", "one of 'path', 'frames' and"),
    ([{"type": "video", "frames": []}], "messages[0].content[0].frames", "at least one path"),
    ([{"type": "video", "frames": "a"}], "messages[0].content[0].frames", "at least one path"),
    ([{"type": "video", "frames": ["a", 3]}], "messages[0].content[0].frames[1]", "must be a string"),
]


@pytest.mark.parametrize(("question", "key", "expected"), BAD_QUESTIONS, ids=[str(q[0])[:50] for q in BAD_QUESTIONS])
def test_parts_that_are_refused(chat: Chat, question: object, key: str, expected: str) -> None:
    problem = the_problem(chat(question))
    assert problem.startswith(f"data.jsonl:3: {key}: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("row", "key", "expected"),
    [
        ([], None, "must be an object"),
        ("text", None, "must be an object"),
        (None, None, "must be an object"),
        ({}, "messages", "the row has no 'messages'"),
        ({"mesages": []}, "messages", "did you mean 'mesages'?"),
        ({"conversations": []}, "messages", "source: llava and source: sharegpt read"),
        ({"messages": []}, "messages", "at least one user and one assistant turn"),
        ({"messages": "hello"}, "messages", "must be a list"),
        ({"messages": ["hello"]}, "messages[0]", "must be an object"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "add a 'role'"),
        ({"messages": [turn("gpt")]}, "messages[0].role", "got 'gpt'"),
        ({"messages": [turn("asistant")]}, "messages[0].role", "did you mean 'assistant'?"),
        (
            {"messages": [turn("user"), {**turn("assistant"), "tool_calls": [1]}]},
            "messages[1].tool_calls",
            "unknown field",
        ),
        ({"messages": [turn("user"), turn("assistant")], "images": "a"}, "images", "must be a list"),
        ({"messages": [turn("user"), turn("assistant")], "id": 1.5}, "id", "a string or a whole number"),
        ({"messages": [turn("user"), turn("assistant")], "id": ""}, "id", "a string or a whole number"),
        ({"messages": [turn("user"), turn("assistant")], "kind": 3}, "kind", "must be a string"),
    ],
)
def test_rows_that_are_refused(row: object, key: str | None, expected: str) -> None:
    problem = the_problem(row)
    assert problem.startswith(f"data.jsonl:3: {key}: " if key else "data.jsonl:3: ")
    assert expected in problem


def test_images_that_no_part_uses_are_refused(chat: Chat) -> None:
    problem = the_problem(chat([{"type": "image", "index": 1}, TEXT], images=["a", "b", "c"]))
    assert "images: images listed but unused: 0, 2" in problem
    assert '{"type": "image"}' in problem


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_media_belong_to_the_user(role: str) -> None:
    picture = [{"type": "image", "path": "a.png"}, TEXT]
    rows = [turn("system", picture if role == "system" else "s"), turn("user")]
    rows.append(turn("assistant", picture if role == "assistant" else "a"))
    assert f"the {role} turn holds media" in the_problem({"messages": rows})


def test_a_system_message_is_a_single_text() -> None:
    assert "single text" in the_problem({"messages": [turn("system", [TEXT, TEXT]), turn("user"), turn("assistant")]})


def test_every_problem_of_a_row_is_told_at_once() -> None:
    row = {"messages": [turn("usr", [{"type": "txt"}]), turn("assistant", 3), turn("user", " ")], "kind": 4}
    keys = {problem.key for problem in parse_row(row, "x")[1]}
    assert keys == {
        "messages[0].content[0].type",
        "messages[0].role",
        "messages[1].content",
        "messages[2].content",
        "kind",
    }


def test_a_huge_value_is_shown_in_short(chat: Chat) -> None:
    assert len(the_problem(chat([{"type": "x" * 10_000}]))) < 300


def test_further_fields_of_a_row_are_left_alone(chat: Chat) -> None:
    assert parse_row(chat(source="somewhere", score=0.5), "x")[1] == []
