"""What counts as a right answer, by metric."""

from __future__ import annotations

from typing import Any

import pytest

from theworld_train.config.schema import AnswerMetric
from theworld_train.train.scoring import is_correct, named_choice, normalized, only_number, unscorable


def correct(answer: str, expected: str, metric: str, **options: Any) -> bool:
    return is_correct(AnswerMetric.model_validate({"metric": metric, **options}), answer, expected)


def test_exact_is_exact_but_for_space_around_it():
    assert correct(" left\n", "left", "exact")
    assert not correct("Left", "left", "exact")
    assert not correct("left.", "left", "exact")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The rule of SQuAD's evaluate-v1.1.py: lower case, then punctuation, then articles, then white space.
        ("The  Cat!", "cat"),
        ("an apple, a pear", "apple pear"),
        ("it's", "its"),
        ("theory of a-b", "theory of ab"),
        ("A", "a"),
        ("The", "the"),
        ("!?", "!?"),
        ("", ""),
    ],
)
def test_normalisation_is_that_of_squad_but_leaves_something(text: str, expected: str):
    assert normalized(text) == expected


def test_normalised_answers_are_compared():
    assert correct("The left!", "left", "normalized")
    assert not correct("A", "the", "normalized"), "two articles are two answers"
    assert not correct("", "left", "normalized")


LETTERS = ("A", "B", "C")
WAYS = ("left", "right", "up", "up and left")


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("B", LETTERS, "B"),
        ("(B) left", LETTERS, "B"),
        ("B. It is not A", LETTERS, "B"),
        ("B: left", LETTERS, "B"),
        ("The answer is C.", LETTERS, "C"),
        ("B, A", LETTERS, None),
        ("a dog", LETTERS, None),
        ("A or B", LETTERS, None),
        ("Because", LETTERS, None),
        ("", LETTERS, None),
        ("Left", WAYS, "left"),
        ("It moves to the LEFT!", WAYS, "left"),
        ("left: it moves there", WAYS, "left"),
        ("left, right, up, down", WAYS, None),
        ("left: no, it moves right", WAYS, None),
        ("left. Or right.", WAYS, None),
        ("leftover", WAYS, None),
        ("left or right", WAYS, None),
        ("It goes up and left", WAYS, "up and left"),
        ("up and left", WAYS, "up and left"),
        ("up", WAYS, "up"),
        ("it is 3.5 (b)", ("(a)", "(b)"), "(b)"),
    ],
)
def test_a_choice_is_named_alone(text: str, choices: tuple[str, ...], expected: str | None):
    assert named_choice(text, choices) == expected


def test_choices_are_compared_with_the_expected_one():
    assert correct("to the left", "Left", "choice", choices=WAYS)
    assert not correct("right", "left", "choice", choices=WAYS)
    assert not correct("left, right, up", "left", "choice", choices=WAYS)
    assert not correct("neither", "left", "choice", choices=WAYS)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7),
        ("about -2.5 m", -2.5),
        ("1,200", 1200),
        ("1,200.5kg", 1200.5),
        ("+6e-3", 0.006),
        (".5", 0.5),
        ("50%", 50),
        ("7.", 7),
        ("x7", None),
        ("2 of 3", None),
        ("1.2.3", None),
        ("12,5", None),
        ("2026-11-21", None),
        ("seven", None),
        ("", None),
    ],
)
def test_a_number_stands_alone(text: str, number: float | None):
    assert only_number(text) == number


def test_numbers_may_be_off_by_the_larger_tolerance():
    assert correct("7.0", "7", "numeric")
    assert not correct("7.01", "7", "numeric")
    assert correct("7.5", "7", "numeric", tolerance=0.5)
    assert correct("104", "100 m", "numeric", tolerance=1.0, relative_tolerance=0.05)
    assert not correct("106", "100 m", "numeric", relative_tolerance=0.05)
    assert not correct("many", "7", "numeric", tolerance=100.0)
    assert correct("0", "0", "numeric", relative_tolerance=0.05)


def test_references_that_no_answer_can_meet_are_told():
    ways = AnswerMetric(metric="choice", choices=("left", "right"))
    assert "names none, or several, of the choices left, right" in str(unscorable(ways, "up"))
    assert "holds no number" in str(unscorable(AnswerMetric(metric="numeric"), "three"))
    assert unscorable(ways, "left") is unscorable(AnswerMetric(metric="exact"), "") is None
