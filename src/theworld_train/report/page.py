"""A report as a page of HTML that opens offline and runs nothing."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template

from theworld_train import __version__
from theworld_train.report import drawing
from theworld_train.report.blocks import Bars, Block, Report


def render_page(report: Report) -> str:
    """Renders a report; all text in it is escaped, and neither scripts nor the network have a place in the page."""
    return _template().render(report=report, version=__version__)


@cache
def _template() -> Template:
    """Returns the page's template, which knows the geometry of charts and what draws them."""
    text = files("theworld_train.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    environment.tests["block"] = _is_block
    environment.globals |= {"draw": drawing.draw, "draw_parallel": drawing.draw_parallel, "bar_length": _bar_length}
    geometry = {
        "width": drawing.WIDTH,
        "height": drawing.HEIGHT,
        "left": drawing.LEFT,
        "right": drawing.WIDTH - drawing.RIGHT,
        "top": drawing.TOP,
        "bottom": drawing.HEIGHT - drawing.BOTTOM,
        "axis_top": drawing.PARALLEL_TOP,
        "axis_bottom": drawing.PARALLEL_HEIGHT - drawing.PARALLEL_BOTTOM,
        "axis_height": drawing.PARALLEL_HEIGHT,
        "styles": range(drawing.STYLES),
    }
    return environment.from_string(text, globals={"at": geometry})


def _is_block(block: Block | Bars, kind: str) -> bool:
    """Whether a block or figure is of the class with a name; for the template, which knows no classes."""
    return type(block).__name__ == kind


def _bar_length(bars: Bars, value: float) -> float:
    """Returns a value as a percentage of the bars' scale."""
    ends = [max(bar.value, bar.interval[1] if bar.interval else 0.0) for bar in bars.bars]
    most = bars.most or max(ends) or 1.0
    return round(100 * min(1.0, max(0.0, value / most)), 2)
