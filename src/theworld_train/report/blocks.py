"""What a report is made of: sections of blocks, which HTML and Markdown render alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Facts:
    """Names and values, one beside the other.

    Attributes:
        rows: Each a name and its value.
    """

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """Rows under a header; the first column names the row, and the others hold numbers or short words.

    Attributes:
        header: Name of each column.
        rows: Cells, as many as the header has.
        title: What the table says, empty if the section says it.
        texts: Indices of further columns that hold text and are set to the left.
        marked: Indices of rows that stand out, such as the best one.
        brief: Whether it is short enough for a pull request.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    texts: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()
    brief: bool = True

    def __post_init__(self) -> None:
        """Makes sure that every row is as long as the header."""
        assert all(len(row) == len(self.header) for row in self.rows), f"{self.title}: rows of another length"


@dataclass(frozen=True)
class Note:
    """A sentence, and the command that would change what it says.

    Attributes:
        text: The sentence.
        command: What to run, or None.
        warns: Whether something is wrong, and not only absent.
    """

    text: str
    command: str | None = None
    warns: bool = False


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: What it is.
        points: Pairs of x and y in the order of x; a y that is not finite is a gap.
        dotted: Whether its points are drawn, as there are few of them.
        breaks: Places between two points where the line is not drawn, such as where another stage begins.
        joined: Whether its points are joined by a line at all.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    dotted: bool = False
    breaks: tuple[float, ...] = ()
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """Curves over a shared axis.

    Attributes:
        title: What is drawn.
        x: Name of the horizontal axis, with its unit.
        y: Name of the vertical axis, with its unit.
        series: The curves.
        marks: Places on the horizontal axis with a name, such as restarts.
        levels: Places on the vertical axis with a name, such as what was planned.
        ticks: Names of whole numbers on the horizontal axis, if they are names of things.
        may_be_log: Whether values over several magnitudes get a logarithmic axis.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    marks: tuple[tuple[float, str], ...] = ()
    levels: tuple[tuple[float, str], ...] = ()
    ticks: tuple[str, ...] = ()
    may_be_log: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: What it is.
        value: Its length.
        text: The value with its unit.
        interval: Lower and upper end of what the value may be, or None.
    """

    name: str
    value: float
    text: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bars:
    """Bars on one scale, which begins at zero.

    Attributes:
        title: What they show.
        bars: The bars.
        most: Length of the scale; that of the longest bar if None.
        brief: Whether no table says the same, so that Markdown needs them too.
    """

    title: str
    bars: tuple[Bar, ...]
    most: float | None = None
    brief: bool = False


@dataclass(frozen=True)
class Line:
    """One trial among parallel axes.

    Attributes:
        name: What it is.
        places: For each axis, the place on it between 0 and 1, or None where it has no value.
        shade: Place of its result between 0 (best) and 1 (worst); None if it has none.
        best: Whether it is the best one.
    """

    name: str
    places: tuple[float | None, ...]
    shade: float | None
    best: bool = False


@dataclass(frozen=True)
class Axis:
    """One of parallel axes.

    Attributes:
        name: What it measures.
        ticks: Place between 0 and 1, and what stands there.
    """

    name: str
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Parallel:
    """Trials as lines over parallel axes.

    Attributes:
        title: What is drawn.
        axes: The axes, the result last.
        lines: The trials.
    """

    title: str
    axes: tuple[Axis, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question.

    Attributes:
        id: Of the sample.
        kind: Kind of the question.
        question: What was asked.
        expected: The reference answer.
        given: What the model said, by the name of the variant or stage.
        right: Whether each is right, by the same names.
        media: Of each image or clip, its frames as data URIs.
    """

    id: str
    kind: str
    question: str
    expected: str
    given: dict[str, str]
    right: dict[str, bool]
    media: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Answers:
    """Sample answers.

    Attributes:
        items: The answers.
    """

    items: tuple[Answer, ...]


@dataclass(frozen=True)
class Figures:
    """Charts and bars, side by side where there is room.

    Attributes:
        items: The figures.
    """

    items: tuple[Chart | Bars, ...]


Block = Facts | Table | Note | Figures | Parallel | Answers


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it.

    Attributes:
        title: The heading.
        blocks: What stands there.
    """

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        kind: `run`, `comparison`, `pipeline` or `sweep`.
        title: Its heading.
        about: One sentence on what it is of and how far it has come.
        sections: Its sections.
    """

    kind: Literal["run", "comparison", "pipeline", "sweep"]
    title: str
    about: str
    sections: Sequence[Section] = field(default=())
