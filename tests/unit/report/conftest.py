"""What the reports are made of: directories, and pages read back."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import reported
from theworld_train.report.blocks import Report
from theworld_train.report.making import make_report
from theworld_train.report.markdown import render_markdown
from theworld_train.report.page import render_page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a complete run."""
    return reported.write_run(tmp_path / "run")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """The directory of a pipeline, two of whose stages have run."""
    return reported.write_pipeline(tmp_path / "pipeline")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The directory of a finished sweep."""
    (tmp_path / "sweep").mkdir()
    return reported.write_sweep(tmp_path / "sweep")


class Page(HTMLParser):
    """A page as a browser takes it: its tags, their attributes, and the text that is seen.

    Attributes:
        tags: Name and attributes of each opened tag.
        text: All text outside of `<style>`, white space made one.
        titles: The texts of charts that show when they are pointed at.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self._texts: list[str] = []
        self.titles: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "wbr"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "title" and "svg" in self._open:
            self.titles.append(data)
        elif not self._open or self._open[-1] != "style":
            self._texts.append(data)


def report_of(*paths: Path, pictures: Any = None) -> Report:
    return make_report(paths, pictures)


def page_of(*paths: Path, pictures: Any = None) -> Page:
    return Page(render_page(make_report(paths, pictures)))


def markdown_of(*paths: Path) -> str:
    return render_markdown(make_report(paths, None))


def section(report: Report, title: str) -> Any:
    """Returns the one section whose title begins so."""
    (found,) = [each for each in report.sections if each.title.startswith(title)]
    return found


def blocks(report: Report, title: str, kind: type) -> list[Any]:
    """Returns the blocks of a kind in a section."""
    return [block for block in section(report, title).blocks if isinstance(block, kind)]


def facts(report: Report, title: str) -> dict[str, str]:
    from theworld_train.report.blocks import Facts

    return {name: value for block in blocks(report, title, Facts) for name, value in block.rows}


def charts(report: Report, title: str) -> dict[str, Any]:
    from theworld_train.report.blocks import Figures

    return {figure.title: figure for block in blocks(report, title, Figures) for figure in block.items}


def notes(report: Report, title: str) -> str:
    from theworld_train.report.blocks import Note

    return "\n".join(f"{block.text} {block.command or ''}" for block in blocks(report, title, Note))
