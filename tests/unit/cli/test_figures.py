"""Protects `theworld-train figures` and its check of the page."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from theworld_train.accounting.published import markdown
from theworld_train.cli import figures as command
from theworld_train.config.errors import ConfigError

app = typer.Typer()
app.command()(command.figures)


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def test_the_tables_show_published_and_ours():
    output = run().output
    for text in ("76,246,931", "3,956,397,459", "not computed by this version", "gpt3-13b"):
        assert text in output, text


def test_the_page_is_printed_as_it_is_checked(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(run("--markdown").output, encoding="utf-8")
    result = run("--check", str(page))
    assert result.exit_code == 0
    assert "up to date" in result.output


def test_a_page_with_another_value_is_named_with_its_lines(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(markdown().replace("76,246,931", "76,246,932"), encoding="utf-8")
    result = run("--check", str(page))
    assert isinstance(result.exception, ConfigError)
    assert "76,246,932" in str(result.exception)
    assert "figures --markdown" in str(result.exception)


def test_an_absent_page_is_a_users_error(tmp_path: Path):
    assert isinstance(run("--check", str(tmp_path / "absent.md")).exception, ConfigError)


def test_a_value_that_no_longer_holds_fails_every_form(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "broken", lambda groups: iter(["gpt2, parameters: is different"]))
    for arguments in ((), ("--markdown",)):
        assert isinstance(run(*arguments).exception, ConfigError)
