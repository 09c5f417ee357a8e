"""Formats of others: what their published files really hold, and whose words errors use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from theworld_train.data.conversation import parse_row
from theworld_train.data.conversations import renamed
from theworld_train.data.formats import LLAVA, SHAREGPT, Adapted, CaptionFormat, ChatFormat, VsrFormat
from theworld_train.data.media import Media

ASK = {"from": "human", "value": "What is it?"}
ANSWER = {"from": "gpt", "value": "A cup."}


def turns(adapted: Adapted) -> list[tuple[str, Any]]:
    assert adapted.problems == []
    conversation, problems = parse_row(adapted.row, "row")
    assert problems == []
    assert conversation is not None
    return [(message["role"], message["content"]) for message in adapted.row["messages"]]


@pytest.mark.parametrize("adapt", [LLAVA, SHAREGPT])
def test_text_alone(adapt: ChatFormat) -> None:
    row = {"id": "x_0", "model": "gpt-4", "conversations": [ASK, ANSWER]}
    assert turns(adapt(row, 0)) == [("user", "What is it?"), ("assistant", "A cup.")]


def test_answers_before_the_first_question_are_left_out() -> None:
    row = {"conversations": [ANSWER, ANSWER, ASK, ANSWER]}
    assert turns(SHAREGPT(row, 0)) == [("user", "What is it?"), ("assistant", "A cup.")]
    assert turns(SHAREGPT({**row, "system": "Be brief."}, 0))[0] == ("system", "Be brief.")


@pytest.mark.parametrize(
    ("speaker", "role"), [("user", "user"), ("assistant", "assistant"), ("chatgpt", "assistant"), ("gpt", "assistant")]
)
def test_other_names_of_speakers(speaker: str, role: str) -> None:
    value = ANSWER["value"] if role == "assistant" else ASK["value"]
    turn = {"from": speaker, "value": value}
    conversation = [ASK, turn] if role == "assistant" else [turn, ANSWER]
    assert (role, value) in turns(SHAREGPT({"conversations": conversation}, 0))


def test_a_system_turn_comes_first() -> None:
    row = {"conversations": [{"from": "system", "value": "Be brief."}, ASK, ANSWER]}
    assert [role for role, _ in turns(SHAREGPT(row, 0))] == ["system", "user", "assistant"]


def test_media_go_where_the_text_asks_for_them() -> None:
    value = "<image>\nLeft.\n<image>\nRight. <video> Which?"
    row = {
        "conversations": [{"from": "human", "value": value}, ANSWER],
        "images": ["a.jpg", "b.jpg"],
        "videos": ["c.mp4"],
    }
    adapted = SHAREGPT(row, 0)
    assert adapted.row["images"] == ["a.jpg", "b.jpg"]
    assert turns(adapted)[0][1] == [
        {"type": "image"},
        {"type": "text", "text": "Left."},
        {"type": "image"},
        {"type": "text", "text": "Right."},
        {"type": "video"},
        {"type": "text", "text": "Which?"},
    ]
    assert adapted.own_key("images[1]") == "images[1]"
    assert adapted.row["videos"] == ["c.mp4"]
    assert adapted.own_key("videos[0]") == "videos[0]"
    assert adapted.own_key("messages[1].content") == "conversations[1].value"


def test_images_of_later_turns() -> None:
    row = {
        "image": ["a.jpg", "b.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>\nOne?"},
            ANSWER,
            {"from": "human", "value": "<image>"},
            ANSWER,
        ],
    }
    assert [content for _, content in turns(LLAVA(row, 0))][2] == [{"type": "image"}]


def test_a_video_that_is_asked_for_as_an_image() -> None:
    row = {"video": "clips/a.mp4", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, ANSWER]}
    adapted = LLAVA(row, 0)
    assert turns(adapted)[0][1][0] == {"type": "video"}
    assert adapted.row["videos"] == ["clips/a.mp4"]
    assert adapted.own_key("videos[0]") == "video"


def test_a_video_without_a_path_is_told_by_its_field() -> None:
    row = {"video": 3, "conversations": [{"from": "human", "value": "<video>\nWhat?"}, ANSWER]}
    adapted = LLAVA(row, 0)
    conversation, _ = parse_row(adapted.row, "row")
    assert conversation is not None
    (problem,) = Media(Path("/data")).check(conversation, "row")
    assert str(renamed(problem, adapted)) == "row: video: a medium is named by its path (got 3)"


@pytest.mark.parametrize(
    ("turn", "key"),
    [
        ("text", "conversations[1]"),
        ({"from": "gpt"}, "conversations[1].value"),
        ({"from": 3, "value": "x"}, "conversations[1].from"),
        ({"value": "x"}, "conversations[1].from"),
        ({"from": "function_call", "value": "x"}, "conversations[1].from"),
    ],
)
def test_turns_that_are_none(turn: object, key: str) -> None:
    assert [problem.key for problem in LLAVA({"conversations": [ASK, turn]}, 0).problems] == [key]


def test_a_missing_field_is_answered_with_the_nearest_that_is_there() -> None:
    (problem,) = LLAVA({"conversation": [ASK, ANSWER]}, 0).problems
    assert problem.hint == "did you mean 'conversation'?"
    (problem,) = CaptionFormat("image", "caption", ["Q"])({"image": "a.jpg", "captions": "x"}, 0).problems
    assert problem.hint == "did you mean 'captions'?"


def test_questions_are_taken_in_turn() -> None:
    adapt = CaptionFormat("file", "text", ["One?", "Two?"])
    asked = [
        adapt({"file": "a.jpg", "text": "a"}, index).row["messages"][0]["content"][1]["text"] for index in range(4)
    ]
    assert asked == ["One?", "Two?", "One?", "Two?"]


@pytest.mark.parametrize(("label", "answer"), [(0, "false"), (1, "true"), (False, "false"), (True, "true")])
def test_statements_are_true_or_false(label: object, answer: str) -> None:
    adapt = VsrFormat("Is it so? {caption} Or not {x}?")
    user, assistant = turns(adapt({"image": "a.jpg", "caption": "The cup {sits}.", "label": label}, 0))
    assert user[1][1]["text"] == "Is it so? The cup {sits}. Or not {x}?"
    assert assistant == ("assistant", answer)


@pytest.mark.parametrize("label", [2, -1, "true", [], None, 0.5])
def test_other_labels_are_refused(label: object) -> None:
    (problem,) = VsrFormat("{caption}")({"image": "a.jpg", "caption": "x", "label": label}, 0).problems
    assert problem.key == "label"
