"""A newcomer's way, as docs/own-data.md writes it: every command of the page in its order, on pictures of their own."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.helpers.pages import shell_lines
from theworld_train.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "own-data.md"
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
#: What the tests' own environment stands for.
INSTALLING = (("git", "clone"), ("cd", "theworld-train"), ("make", "install"), ("source",))
#: What needs the weights of Gemma and Cosmos, which no test has.
REAL_WEIGHTS = ("fetch", "doctor", "plan", "train", "launch", "run")


def sections() -> dict[str, str]:
    """Returns the page's sections by their headings."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def steps(section: str) -> Iterator[tuple[str, str | list[str]]]:
    """Yields what a section has the reader do: programs in Python, and lines of the shell."""
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            yield "python", block
        elif language in ("sh", "bash"):
            for words in shell_lines(block):
                if not any(tuple(words[: len(known)]) == known for known in INSTALLING):
                    yield "shell", words


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs one line of the page as a shell would, in this process."""
    if words[0] == "cd":
        monkeypatch.chdir(words[1])
    else:
        assert words[0] == "theworld-train", words
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{' '.join(words)}\n{result.output}\n{result.exception!r}"


def walk(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Does what some sections of the page say."""
    page = sections()
    for name in names:
        done = 0
        for kind, step in steps(page[name]):
            done += 1
            if isinstance(step, str):
                assert kind == "python"
                exec(compile(step, f"{PAGE.name}: {name}", "exec"), {})
            elif name == "With the real model" and step[1] in REAL_WEIGHTS and step[0] != "cd":
                continue  # tests/unit/test_docs.py parses them
            else:
                run(step, monkeypatch)
        assert done > 0, f"the section {name!r} says nothing to do"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with twelve pictures and what they show, as the page's reader has them."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    with Path("photos/labels.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["file", "answer"])
        for number in range(12):
            colour = COLOURS[number % len(COLOURS)]
            Image.new("RGB", (40 + number, 50), colour).save(f"photos/{number}.png")
            table.writerow([f"{number}.png", f"A {colour} wall."])
    return tmp_path


def test_the_page_is_walked_whole():
    assert list(sections()) == [*FIRST, LAST, "With the real model"]


FIRST = ("Install", "Write your rows", "Make a project", "Look before you train", "Train")
LAST = "All four stages"


def test_from_a_clone_to_a_stage_of_own_data(place: Path, monkeypatch: pytest.MonkeyPatch):
    walk(monkeypatch, *FIRST)
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    assert (len(rows), len((place / "held-out.jsonl").read_text().splitlines())) == (10, 2)
    project = place / "my-project"
    assert (project / "samples.html").is_file()
    metrics = [json.loads(line) for line in (project / "runs/trial/metrics.jsonl").read_text().splitlines()]
    assert max(line.get("step", 0) for line in metrics) == 10
    assert json.loads((project / "runs/trial/result.json").read_text())["eval"]["total"]["samples"]
    walk(monkeypatch, "With the real model")
    assert "google/gemma-3-4b-it" in (place / "my-model/configs/base/project.yaml").read_text()


@pytest.mark.slow
def test_from_a_clone_through_all_four_stages(place: Path, monkeypatch: pytest.MonkeyPatch):
    walk(monkeypatch, *FIRST, LAST)
    runs = place / "my-project" / "runs"
    assert all((runs / stage / "result.json").is_file() for stage in ("projection", "vision", "language", "full"))
    assert (place / "my-project" / "exported" / "config.json").is_file()
