"""Protects the page: it opens offline, runs nothing, and shows text from data as text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers import reported
from tests.unit.report.conftest import Page, markdown_of, page_of
from theworld_train.report.blocks import Answer, Answers, Bar, Bars, Chart, Figures, Report, Section, Series, Table
from theworld_train.report.markdown import escape, render_markdown
from theworld_train.report.page import render_page

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"
#: What a page may open that is not itself.
ADDRESSES = ("src", "href", "action", "data", "poster", "background", "srcset", "xlink:href")


def poisoned(value: object) -> object:
    """Returns a record with hostile text in the place of every text but what gives the record its shape."""
    shape = {"event", "state", "direction", "kind", "search", "source", "split", "base", "directory"}
    if isinstance(value, dict):
        return {
            key if key in shape or key.isidentifier() or "/" in key else f"{key}{EVIL}": each
            if key in shape
            else poisoned(each)
            for key, each in value.items()
        }
    if isinstance(value, list):
        return [poisoned(each) for each in value]
    return EVIL if isinstance(value, str) else value


@pytest.mark.parametrize("kind", ["run", "pipeline", "sweep"])
def test_a_page_needs_nothing_but_itself(kind: str, request: pytest.FixtureRequest) -> None:
    page = page_of(request.getfixturevalue(kind))
    policy = next(attributes["content"] for tag, attributes in page.tags if tag == "meta" and "content" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "script" not in policy
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for name in ADDRESSES:
            address = attributes.get(name)
            assert address is None or re.match(r"#s\d+$|data:image/(png|jpeg);base64,", address), (tag, address)
    html = render_page(Report("run", "t", "a", []))
    assert "@import" not in html
    assert "url(" not in html


@pytest.mark.parametrize("kind", ["run", "pipeline", "sweep"])
def test_text_from_files_is_shown_and_never_obeyed(kind: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(kind)
    clean = {tag for tag, _ in page_of(directory).tags}
    for path in directory.rglob("*.json"):
        path.write_text(json.dumps(poisoned(json.loads(path.read_text()))))
    for path in directory.rglob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        reported.write_lines(path, [poisoned(row) for row in rows])  # type: ignore[misc]
    page = page_of(directory)
    assert {tag for tag, _ in page.tags} <= clean | {"details", "summary"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert EVIL in page.text
    text = markdown_of(directory)
    assert "<script" not in re.sub(r"\\.", "", text)
    assert re.search(r"\\<script\\>alert\(1\)", text)


def test_every_place_of_text_in_a_page_is_escaped() -> None:
    chart = Chart(EVIL, EVIL, EVIL, (Series(EVIL, ((1, 1), (2, 2))),), ((1.5, EVIL),), ((1.5, EVIL),))
    named = Chart(EVIL, EVIL, EVIL, (Series(EVIL, ((0, 1), (1, 2))),), ticks=(EVIL, EVIL))
    answer = Answer(EVIL, EVIL, EVIL, EVIL, {EVIL: EVIL}, {EVIL: True})
    figures = Figures((chart, named, Bars(EVIL, (Bar(EVIL, 1.0, EVIL, (0.5, 1.0)),))))
    table = Table((EVIL, EVIL), ((EVIL, EVIL),), EVIL, frozenset({1}))
    report = Report("run", EVIL, EVIL, [Section(EVIL, [figures, table, Answers((answer,))])])
    html = render_page(report)
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "49" not in re.sub(r"[\d.]{3,}", "", Page(html).text)
    # Title, heading, sentence, section and its link, two charts, bars, table and answer.
    assert Page(html).text.count(EVIL) >= 20


def test_values_can_be_read_off_a_chart() -> None:
    chart = Chart("Loss", "step", "nats", (Series("a", ((1, 0.5), (2, 0.25))), Series("b", ((2, 7.0),))))
    page = Page(render_page(Report("run", "t", "a", [Section("s", [Figures((chart,))])])))
    assert page.titles == ["step 1\na: 0.5", "step 2\na: 0.25\nb: 7"]


def test_a_curve_keeps_its_gaps_and_says_how_many_they_are() -> None:
    points = tuple((float(step), float("nan") if step == 3 else 1.0 + step) for step in range(1, 6))
    page = Page(
        render_page(Report("run", "t", "a", [Section("s", [Figures((Chart("L", "x", "y", (Series("a", points),)),))])]))
    )
    (path,) = [a["d"] for tag, a in page.tags if tag == "path" and a.get("class") == "curve c0" and a["d"] != "M0 4H26"]
    assert path is not None
    assert path.count("M") == 2
    assert "(1 not finite)" in page.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("two\nlines", "two lines"),
        (r"back\slash", r"back\\slash"),
        ("model.world_size", "model.world_size"),
        ("_edge_", r"\_edge\_"),
        ("[x](http://example.org)", r"\[x\](http://example.org)"),
        ("`code` *bold* #1 @x", r"\`code\` \*bold\* \#1 @x"),
    ],
)
def test_markdown_shows_text_as_it_is(text: str, shown: str) -> None:
    assert escape(text) == shown


def test_markdown_tables_are_whole() -> None:
    table = Table(("a", "value"), (("x|y", "1"), ("z", "22")), texts=frozenset())
    text = render_markdown(Report("run", "t", "a.", [Section("s", [table])]))
    assert text.splitlines()[-4:] == ["| a    | value |", "| ---- | ----: |", r"| x\|y |     1 |", "| z    |    22 |"]


def test_markdown_leaves_long_tables_and_charts_out(run: Path) -> None:
    text = markdown_of(run)
    assert text.startswith("# projection\n\nRun, complete after 40 optimizer steps")
    assert "Resolved config" not in text
    assert "## Training" not in text
    assert "| as trained " in text
    assert len(text) < 12_000
