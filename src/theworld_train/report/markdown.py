"""A report as Markdown for a pull request: its facts, short tables and warnings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from theworld_train.report.blocks import Bars, Block, Facts, Figures, Note, Report, Table

#: What Markdown and HTML give a meaning; an underscore only at the edge of a word.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~#&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def render_markdown(report: Report) -> str:
    """Renders a report; charts and answers are left out, and so are long tables."""
    parts = [f"# {escape(report.title)}", escape(report.about)]
    for section in report.sections:
        texts = [text for block in section.blocks if (text := _block(block))]
        if texts:
            parts += [f"## {escape(section.title)}", *texts]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(lambda match: f"\\{match[0]}", " ".join(text.split()))


def _block(block: Block) -> str:
    if isinstance(block, Facts):
        return "\n".join(f"- {escape(name)}: {escape(value)}" for name, value in block.rows)
    if isinstance(block, Table):
        title = f"{escape(block.title)}\n\n" if block.title else ""
        return title + _table(block) if block.brief and block.rows else ""
    if isinstance(block, Note):
        return escape(block.text) if block.warns else ""
    if isinstance(block, Figures):
        return "\n\n".join(_bars(each) for each in block.items if isinstance(each, Bars) and each.brief)
    return ""


def _bars(bars: Bars) -> str:
    rows = tuple((bar.name, bar.text) for bar in bars.bars)
    return _table(Table((bars.title, ""), rows))


def _table(table: Table) -> str:
    header = [escape(cell) for cell in table.header]
    rows = [[escape(cell) for cell in row] for row in table.rows]
    left = table.texts | {0}
    widths = [max(3, *(len(line[column]) for line in (header, *rows))) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if n in left else c.rjust(w) for n, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if n in left else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])
