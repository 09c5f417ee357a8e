"""Whether a generated answer is right."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from theworld_train.config.schema import AnswerMetric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
#: A number that is no part of a word: `3`, `-2.5`, `1,200`, `.5`, `6e-3`; what follows it may be a unit.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?!\.?\d)")


def is_exact(answer: str, expected: str) -> bool:
    """Whether two answers are equal but for white space around them."""
    return answer.strip() == expected.strip()


def normalized(text: str) -> str:
    """Returns an answer without case, punctuation, articles and spare white space.

    The rule and its order are those of `normalize_answer` in SQuAD's evaluation script (Rajpurkar et al. 2016). An
    answer of which it leaves nothing, such as the letter `A`, is only lower-cased and trimmed.
    """
    lowered = text.lower()
    kept = " ".join(_ARTICLES.sub(" ", lowered.translate(_PUNCTUATION)).split())
    return kept or " ".join(lowered.split())


def is_normalized(answer: str, expected: str) -> bool:
    """Whether two answers are equal once they are normalised."""
    return normalized(answer) == normalized(expected)


def named_choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the choice that a text names, or None if it names none, or several.

    It names what it holds as words of their own. Of single letters it names the one that it begins with and marks, as
    in `(B) left`, `B.` or `B: left`, whatever follows; and their case matters: `a dog` is no `A`.

    Args:
        text: An answer.
        choices: What there is to choose from.
    """
    letters = all(len(choice) == 1 for choice in choices)
    flags = re.NOFLAG if letters else re.IGNORECASE
    if letters and (marked := re.match(r"\s*\(?(\S)\s*[).:]", text)) and marked[1] in choices:
        return marked[1]
    found = []
    rest = text
    for choice in sorted(choices, key=len, reverse=True):  # of `up` and `up and left` the longer one is meant
        rest, number = re.subn(rf"(?<!\w){re.escape(choice)}(?!\w)", " ", rest, flags=flags)
        found += [choice] if number else []
    return found[0] if len(found) == 1 else None


def only_number(text: str) -> float | None:
    """Returns the number in a text, or None if it holds none, or several; commas between thousands are left out."""
    found = _NUMBER.findall(text)
    return float(found[0].replace(",", "")) if len(found) == 1 else None


def is_correct(metric: AnswerMetric, answer: str, expected: str) -> bool:
    """Whether an answer is right by the metric of its kind.

    Args:
        metric: The metric.
        answer: What the model has generated.
        expected: The reference, of which `unscorable` has nothing to say.
    """
    rules: dict[str, Callable[[], bool]] = {
        "exact": lambda: is_exact(answer, expected),
        "normalized": lambda: is_normalized(answer, expected),
        "choice": lambda: _same_choice(metric, answer, expected),
        "numeric": lambda: _near(metric, answer, expected),
    }
    return rules[metric.metric]()


def unscorable(metric: AnswerMetric, expected: str) -> str | None:
    """Returns why no answer could be held against a reference, or None if one can."""
    if metric.metric == "choice" and named_choice(expected, metric.choices) is None:
        return f"names none, or several, of the choices {', '.join(metric.choices)}"
    if metric.metric == "numeric" and only_number(expected) is None:
        return "holds no number, or several"
    return None


def _same_choice(metric: AnswerMetric, answer: str, expected: str) -> bool:
    choices = metric.choices
    return named_choice(answer, choices) == named_choice(expected, choices)


def _near(metric: AnswerMetric, answer: str, expected: str) -> bool:
    given, wanted = only_number(answer), only_number(expected)
    assert wanted is not None
    allowed = max(metric.tolerance or 0.0, (metric.relative_tolerance or 0.0) * abs(wanted))
    return given is not None and abs(given - wanted) <= allowed
