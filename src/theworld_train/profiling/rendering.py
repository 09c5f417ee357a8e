"""Reports and their comparison as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from theworld_train.memory.tracker import CATEGORIES
from theworld_train.profiling.attribution import PARTS, PASSES

MIB = 2**20
Report = Mapping[str, Any]


def render(report: Report) -> str:
    """Returns a report as Markdown."""
    run, environment = report["run"], report["environment"]
    device = environment["device"]
    where = f"{environment['threads']} threads of {environment['cores']} cores" if device == "cpu" else device
    sections = [
        f"# Profile of {report['name']}",
        f"{where}; torch {environment['torch']}, transformers {environment['transformers']}, Python"
        f" {environment['python']}. {run['precision']}, global batch {run['global_batch_size']} in micro-batches of"
        f" {run['micro_batch_size']}; trains {', '.join(run['trainable'])}.",
        "## Step",
        _step(report),
        "## Time by component",
        _time(report),
        "## Operations",
        _operations(report),
        "## Memory",
        _memory(report),
        "## Parameters",
        _parameters(report),
        "## Loss",
        table(
            ["step", "taken", "loss"],
            [[str(row["step"]), row["how"], f"{row['loss']:.6f}"] for row in report["losses"]],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Renders rows as Markdown with columns of equal width, the first one to the left and the others to the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(w) if not n else cell.rjust(w) for n, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1)) + ("-" if not column else ":") for column, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def _step(report: Report) -> str:
    step = report["step"]
    each = [1e3 * seconds for seconds in step["each"]]
    slower = step["traced_seconds"] / step["seconds"] - 1
    rows = [
        ["step, median", _ms(step["seconds"])],
        ["step, least and most", f"{min(each):,.1f} - {max(each):,.1f} ms"],
        ["waiting for data before it, median", _ms(step["data_wait_seconds"])],
        ["tokens/s, without padding", f"{step['tokens_per_second']:,.0f}"],
        ["samples/s", f"{step['samples_per_second']:,.1f}"],
        ["positions of the longest sample", f"{step['positions']:,}"],
        ["padding, of all positions", f"{step['padding_share']:.1%}"],
        ["step under the profiler, median", f"{_ms(step['traced_seconds'])} ({slower:+.0%})"],
    ]
    return table(["timed steps", ""], rows)


def _time(report: Report) -> str:
    time = report["time"]
    parts: dict[str, dict[str, float]] = time["parts"]
    whole: dict[str, float] = {kind: sum(passes[kind] for passes in parts.values()) for kind in PASSES}
    rows = []
    for part, passes in {**parts, "step": whole}.items():
        cells = [f"{1e3 * passes[kind]:,.2f}" if passes[kind] else "" for kind in PASSES]
        total = sum(passes.values())
        rows.append([part, *cells, f"{1e3 * total:,.2f}", f"{total / time['seconds']:.1%}"])
    note = (
        f"Of the traced steps, by the {time['clock']}, with what the profiler itself takes. `sequence` is what the step"
        " does outside of components before the language model has run, `loss` the head and all else after it, `data`"
        " the wait for samples; `other` is the rest, in the backward column what lies between the nodes of autograd."
    )
    return table(["ms of a step", *PASSES, "total", "share"], rows) + "\n\n" + note


def _operations(report: Report) -> str:
    whole = report["time"]["seconds"]
    rows = [
        [each["name"], f"{each['calls']:,.0f}", f"{1e3 * each['seconds']:,.2f}", f"{each['seconds'] / whole:.1%}"]
        for each in report["operations"]
    ]
    return table(["operation", "calls", "own ms", "share"], rows)


def _memory(report: Report) -> str:
    measured, planned = report["memory"]["measured"], report["memory"]["planned"]
    rows = []
    for name in (*CATEGORIES, "total"):
        found, said = (
            None if peak is None else peak["bytes"] if name == "total" else peak["by_category"][name]
            for peak in (measured, planned)
        )
        off = "" if not found or not said else f"{found / said - 1:+.1%}"
        rows.append([name, _mib(found), _mib(said), off])
    held = "the process has grown by" if report["environment"]["device"] == "cpu" else "the GPU's allocator has held"
    place = f"{measured['op']} in {measured['module']}" if measured["module"] else measured["op"]
    shape = report["memory"]["shape"]
    note = (
        f"At the peak of the followed step, in {measured['phase']} at {place}. The plan is for samples as long as the"
        f" longest, {shape['positions']:,} positions with {shape['supervised']:,} supervised, each with all its visual"
        f" parts. Until the traced steps {held} {_mib(report['memory']['process_bytes'])} MiB at most."
    )
    return table(["MiB at the peak", "measured", "planned", "off"], rows) + "\n\n" + note


def _parameters(report: Report) -> str:
    values = report["parameters"]
    rows = [
        ["parameters", f"{values['total']:,}"],
        ["trainable", f"{values['trainable']:,}"],
        ["trainable share: trainable / parameters", f"{values['trainable_share']:.2%}"],
        ["updated/s: trainable / seconds of a step", f"{values['updated_per_second']:,.0f}"],
    ]
    if "step_flops" in values:
        rows += [
            ["FLOPs of a step, planned", f"{values['step_flops']:.3e}"],
            ["of them, gradients of weights", f"{values['weight_gradient_share']:.1%}"],
            ["FLOP/s: planned FLOPs / seconds of a step", f"{values['flops_per_second']:.3e}"],
        ]
    return table(["efficiency", ""], rows)


# -- comparison -------------------------------------------------------------------------------------------------------


def compare(reports: Mapping[str, Report]) -> dict[str, Any]:
    """Returns two reports side by side: rows with both values and their ratio, second over first.

    Args:
        reports: Both, by name.
    """
    first, second = reports.values()
    rows = [
        _row(name, unit, value(first), value(second))
        for name, unit, value in _COMPARED
        if value(first) is not None or value(second) is not None
    ]
    for part in PARTS:
        passes = [report["time"]["parts"].get(part) for report in (first, second)]
        if any(passes):
            rows.append(_row(f"time of {part}", "s", *(sum(each.values()) if each else None for each in passes)))
    return {"names": list(reports), "rows": rows}


def _row(name: str, unit: str, first: float | None, second: float | None) -> dict[str, Any]:
    ratio = None if not first or second is None else second / first
    return {"name": name, "unit": unit, "values": [first, second], "ratio": ratio}


def _planned(report: Report) -> float | None:
    planned = report["memory"]["planned"]
    return None if planned is None else float(planned["bytes"])


_COMPARED: tuple[tuple[str, str, Callable[[Report], float | None]], ...] = (
    ("step", "s", lambda report: report["step"]["seconds"]),
    ("tokens/s", "", lambda report: report["step"]["tokens_per_second"]),
    ("samples/s", "", lambda report: report["step"]["samples_per_second"]),
    ("positions of the longest sample", "", lambda report: report["step"]["positions"]),
    ("padding", "share", lambda report: report["step"]["padding_share"]),
    ("peak of tensors", "bytes", lambda report: report["memory"]["measured"]["bytes"]),
    ("planned peak", "bytes", _planned),
    ("peak of the process", "bytes", lambda report: report["memory"]["process_bytes"]),
    ("parameters", "", lambda report: report["parameters"]["total"]),
    ("trainable", "", lambda report: report["parameters"]["trainable"]),
    ("trainable share", "share", lambda report: report["parameters"]["trainable_share"]),
    ("updated/s", "", lambda report: report["parameters"]["updated_per_second"]),
    ("FLOPs of a step", "flops", lambda report: report["parameters"].get("step_flops")),
    ("gradients of weights, of the FLOPs", "share", lambda report: report["parameters"].get("weight_gradient_share")),
    ("FLOP/s", "flops", lambda report: report["parameters"].get("flops_per_second")),
    ("loss of the first step", "loss", lambda report: report["losses"][0]["loss"]),
    ("loss of the last step", "loss", lambda report: report["losses"][-1]["loss"]),
)


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """Returns a comparison as one Markdown table."""
    first, second = comparison["names"]
    rows = [
        [
            row["name"] + {"s": " (ms)", "bytes": " (MiB)"}.get(row["unit"], ""),
            *(_cell(value, row["unit"]) for value in row["values"]),
            "" if row["ratio"] is None else f"x{row['ratio']:.2f}",
        ]
        for row in comparison["rows"]
    ]
    return table(["", first, second, "ratio"], rows) + "\n"


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    match unit:
        case "s":
            return f"{1e3 * value:,.2f}"
        case "bytes":
            return _mib(value)
        case "share":
            return f"{value:.2%}"
        case "flops":
            return f"{value:.3e}"
        case "loss":
            return f"{value:.4f}"
    return f"{value:,.0f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / MIB:,.2f}"
