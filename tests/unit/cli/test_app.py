"""Protects the command line's frame: quick help, lazy commands, readable user errors, tracebacks for the rest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib import import_module

import pytest

import theworld_train
from theworld_train.cli import app as app_module
from theworld_train.cli.app import COMMANDS, CommandEntry
from theworld_train.cli.problems import render_problems
from theworld_train.config import ConfigError, Problem

HEAVY = ("torch", "transformers", "datasets", "diffusers", "accelerate", "numpy")


def failing(kind: str) -> None:
    """Fail.

    Example:
        theworld-train failing
    """
    if kind == "interrupted":
        raise KeyboardInterrupt
    if kind == "user":
        raise ConfigError(
            [Problem("expected a number", source="a.yaml", key="lr", value="x"), Problem("also", source="b")]
        )
    raise RuntimeError("a fault of ours")


@pytest.fixture
def failing_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds a command that fails to the table."""
    module = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "failing_command", module)
    monkeypatch.setitem(COMMANDS, "failing", CommandEntry("failing_command:failing", "Fail."))


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_help_lists_every_command_and_an_example(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "Example:" in out
    assert len(COMMANDS) > 0
    for name, entry in COMMANDS.items():
        assert name in out
        assert entry.help.split()[0] in out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_its_own_help_with_an_example(call, name):
    code, out, _ = call(name, "--help")
    assert code == 0
    assert f"theworld-train {name}" in out.partition("Example")[2]
    assert "Args:" not in out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_of_the_table_exists_and_has_a_line_of_help(name):
    module, _, function = COMMANDS[name].target.partition(":")
    assert callable(getattr(import_module(module), function))
    assert COMMANDS[name].help.endswith(".")
    assert len(COMMANDS[name].help) < 80


def test_help_imports_no_command_and_no_framework():
    code = (
        "import sys, contextlib, io\nfrom theworld_train.cli.app import app\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): app(['--help'])\n"
        f"print([m for m in (*{HEAVY}, 'pydantic', 'theworld_train.cli.validate') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_importing_the_package_is_cheap():
    code = f"import sys, theworld_train; print([m for m in (*{HEAVY}, 'pydantic', 'typer') if m in sys.modules])"
    assert run_python(code) == "[]"


def test_help_answers_in_under_half_a_second():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "theworld_train", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    # The best of three, so that a busy machine does not fail the test.
    assert min(times) < 0.5


def test_version(call):
    assert call("--version") == (0, f"theworld-train {theworld_train.__version__}\n", "")


def test_without_arguments_the_help_is_shown(call):
    code, out, err = call()
    assert code == 2
    assert "Commands:" in out + err


def test_an_unknown_command_is_answered_with_the_nearest(call):
    code, _, err = call("vlidate")
    assert code == 2
    assert "no such command 'vlidate'; did you mean 'validate'?" in err


def test_an_unknown_command_with_none_near_still_says_where_to_look(call):
    code, _, err = call("xyzzy")
    assert code == 2
    assert "validate" in err or "--help" in err


def test_a_user_error_is_a_list_of_problems_by_file(failing_command, call):
    code, out, err = call("failing", "user")
    assert (code, out) == (2, "")
    assert err.splitlines() == ["1 problem in a.yaml", "  lr: expected a number (got 'x')", "1 problem in b", "  also"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "interrupted\n"),
        ({"RANK": "0"}, "interrupted\n"),
        ({"RANK": "1"}, ""),
        ({"THEWORLD_TRAIN_INSIDE": "1"}, ""),
    ],
    ids=["alone", "rank 0", "rank 1", "started by a command"],
)
def test_ctrl_c_says_so_once_and_ends_with_130(failing_command, call, monkeypatch, environment, said):
    for name in ("RANK", "THEWORLD_TRAIN_INSIDE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert call("failing", "interrupted") == (130, "", said)
    assert dict(os.environ) == before


def test_any_other_exception_stays_one(failing_command, call):
    with pytest.raises(RuntimeError, match="a fault of ours"):
        call("failing", "ours")


def test_a_fault_of_ours_shows_the_usual_traceback():
    code = (
        "import sys, types\nmodule = types.ModuleType('boom')\n"
        "def boom():\n    'Example: boom'\n    secret = 'local-value'\n    raise RuntimeError('a fault of ours')\n"
        "module.boom = boom\nsys.modules['boom'] = module\nfrom theworld_train.cli import app\n"
        "app.COMMANDS['boom'] = app.CommandEntry('boom:boom', 'Boom.')\n"
        "sys.argv = ['theworld-train', 'boom']\napp.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "RuntimeError: a fault of ours" in result.stderr
    assert "local-value" not in result.stderr


def test_a_user_error_shows_no_traceback(folder):
    result = subprocess.run(
        [sys.executable, "-m", "theworld_train", "validate", "x=1"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (2, "no config file is named, only overrides\n")


def test_problems_of_one_file_are_counted():
    error = ConfigError([Problem("one", source="f", key="a"), Problem("two", source="f"), Problem("three")])
    assert render_problems(error) == "2 problems in f\n  a: one\n  two\nthree"


def test_problems_of_the_command_line_read_as_such():
    assert render_problems(ConfigError(Problem("one", source="command line"))).startswith(
        "1 problem on the command line"
    )


def test_the_program_has_one_name():
    assert app_module.PROGRAM == "theworld-train"


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="TheWorlds"):
        theworld_train.TheWorlds  # noqa: B018


def test_the_public_names_are_listed_without_importing_them():
    code = "import sys, theworld_train; print('TheWorld' in dir(theworld_train), 'torch' in sys.modules)"
    assert run_python(code) == "True False"
