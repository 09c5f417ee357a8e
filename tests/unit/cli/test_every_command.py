"""Every command of the table, new ones too: what its help says, and how it answers wrong input."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from theworld_train.cli.app import COMMANDS, load_command
from theworld_train.cli.completion import OPTION_NAMES
from theworld_train.cli.exit_codes import COMMON, with_exit_codes

#: A path below a file: there is nothing to read there, and nothing can be written.
IMPOSSIBLE = "taken/absent.yaml"


def arguments_of(name: str) -> list[Any]:
    return [parameter for parameter in load_command(name).params if parameter.param_type_name == "argument"]


def options_of(name: str) -> list[Any]:
    return [parameter for parameter in load_command(name).params if parameter.param_type_name == "option"]


def type_of(parameter: Any) -> Any:
    return parameter.type_descriptor.annotation


def choices(parameter: Any) -> list[str]:
    kind = type_of(parameter)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(member.value) for member in kind]
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def needed_options(name: str) -> list[str]:
    return [word for option in options_of(name) if option.required for word in (option.opts[0], "x")]


def filled(name: str, value: str) -> list[str]:
    """Returns a call with a value for each argument, and the first of its choices for one that has some."""
    words = [choices(argument)[0] if choices(argument) else value for argument in arguments_of(name)]
    return [name, *words, *needed_options(name)]


def takes(name: str, word: str) -> bool:
    """Says whether a command takes one file of a kind, by the metavar of its arguments."""
    return any(re.match(rf"\[?{word}\b", argument.metavar or "") for argument in arguments_of(name))


def wrong_words(name: str) -> Iterator[tuple[list[str], str]]:
    """Yields calls with words that a command does not take, each with what the answer has to name."""
    arguments = arguments_of(name)
    yield [name, "--no-such-option"], "--no-such-option"
    if any(argument.required for argument in arguments):
        yield [name], "Missing"
    if all(argument.nargs == 1 for argument in arguments):
        yield [*filled(name, "x"), "one-too-many"], "one-too-many"
    if any(choices(argument) for argument in arguments):
        yield [name, "no-such-choice"], "no-such-choice"
    for option in options_of(name):
        if not option.is_flag and (choices(option) or type_of(option) in (int, float)):
            yield [*filled(name, "x"), option.opts[0], "no-such-value"], option.opts[0]


def wrong_files(name: str) -> Iterator[tuple[list[str], str]]:
    """Yields calls with files that are not there or wrong, and with keys and names that there are not."""
    if any(not choices(argument) for argument in arguments_of(name)):
        yield filled(name, IMPOSSIBLE), "taken"
    if takes(name, "PIPELINE"):
        yield [*filled(name, "pipeline.yaml"), "zzz.y=1"], "zzz.y"
    if takes(name, "CONFIG"):
        yield [*filled(name, "good.yaml"), "zzz.y=1"], "zzz.y"
        yield filled(name, "wrong.yaml"), "optimizer.lr"
        for option in options_of(name):
            if OPTION_NAMES.keys() & set(option.opts):
                yield [*filled(name, "good.yaml"), option.opts[0], "no-such-name"], "no-such-name"


CALLS = [call for name in COMMANDS for call in (*wrong_words(name), *wrong_files(name))]


@pytest.mark.parametrize(("words", "named"), CALLS, ids=[" ".join(words) for words, _ in CALLS])
def test_wrong_input_is_named_with_exit_code_2_and_leaves_nothing_behind(words, named, folder: Path, call):
    (folder / "taken").write_text("")
    before = sorted(folder.rglob("*"))
    code, out, err = call(*words)
    assert code == 2, out + err
    assert named in err, out + err
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_tells_exit_codes_and_every_option(name, call):
    code, out, _ = call(name, "--help")
    assert code == 0
    text = f"{' '.join(out.split())} "
    stated = re.search(r"Exit codes: (.*?)\. ", text)
    assert stated, text
    assert [code for code in COMMON if not re.search(rf"\b{code} \w", stated[1])] == [], stated[1]
    for parameter in (*options_of(name), *arguments_of(name)):
        assert parameter.help, f"{parameter.name} has no help"


def test_exit_codes_of_a_command_are_completed():
    common = "0 done, 1 an error, with a traceback, 2 wrong input, 130 Ctrl-C."
    assert with_exit_codes("Do.\n\nExample:\n    x") == f"Do.\n\nExit codes: {common}\n\nExample:\n    x"
    assert with_exit_codes("Do.") == f"Do.\n\nExit codes: {common}"
    own = "Do.\n\nExit codes: 0 all right, 1 some\n    wrong, 75 or 130 stopped.\n\nExample:\n    x"
    assert "75 or 130 stopped, 2 wrong input.\n\nExample:" in with_exit_codes(own)
    longer = "Do.\n\nIt goes on. Exit codes: 0 all right,\n1, 2 and 130 wrong. Or not, of step 3. \n\nExample:\n    x"
    assert with_exit_codes(longer) == longer
