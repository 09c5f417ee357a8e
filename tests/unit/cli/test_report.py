"""Protects `theworld-train report`: what it writes and where, and its answers to mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import reported

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run, which nothing may change, and a sweep."""
    monkeypatch.chdir(tmp_path)
    reported.write_run(tmp_path / "runs" / "projection")
    (tmp_path / "runs" / "sweep").mkdir()
    reported.write_sweep(tmp_path / "runs" / "sweep")
    return tmp_path


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_page_is_written_and_the_run_is_left_alone(runs: Path, call: Call) -> None:
    before = contents(runs / "runs")
    code, out, err = call("report", "runs/projection", "--out", "page.html")
    assert (code, out) == (0, "")
    assert "page.html: written" in err
    page = (runs / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("data:image/png;base64,") == 40
    assert contents(runs / "runs") == before
    assert sorted(path.name for path in runs.iterdir()) == ["page.html", "runs"]


def test_without_a_name_the_page_is_report_html(runs: Path, call: Call) -> None:
    assert call("report", "runs/sweep")[0] == 0
    assert "Sweep of 12 trials" in (runs / "report.html").read_text()


def test_pictures_can_be_left_out(runs: Path, call: Call) -> None:
    assert call("report", "runs/projection", "--no-pictures")[0] == 0
    assert "data:image" not in (runs / "report.html").read_text()


def test_markdown_goes_to_the_terminal_or_a_file(runs: Path, call: Call) -> None:
    code, out, _ = call("report", "runs/projection", "--format", "md")
    assert code == 0
    assert out.startswith("# projection\n")
    assert call("report", "runs/projection", "--format", "md", "--out", "report.md")[0] == 0
    assert (runs / "report.md").read_text() == out


def test_mistakes_are_answered_together_before_anything_is_written(runs: Path, call: Call) -> None:
    code, _, err = call("report", "runs", "absent")
    assert code == 2
    assert "neither a run, a pipeline nor a sweep" in " ".join(err.split())
    assert "no such directory" in " ".join(err.split())
    assert not (runs / "report.html").exists()


@pytest.mark.parametrize("out", ["absent/page.html", "runs", "", f"{'x' * 300}.html"])
def test_a_page_that_cannot_be_written_is_a_problem(runs: Path, call: Call, out: str) -> None:
    code, _, err = call("report", "runs/sweep", "--out", out)
    assert code == 2
    assert "--out" in err
    assert sorted(path.name for path in runs.iterdir()) == ["runs"]
