"""Held-out measurements: over the steps, with parts taken away, by kind of question, and answer by answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from theworld_train.report.blocks import (
    Answer,
    Answers,
    Bar,
    Bars,
    Block,
    Chart,
    Figures,
    Note,
    Section,
    Series,
    Table,
)
from theworld_train.report.files import objects, part
from theworld_train.report.run import EVALUATION_FILE, RunRecord, curve
from theworld_train.report.words import ABSENT, LOSS_UNIT, STEP, count, number, share, short

#: Format of `evaluation.json` that is read.
FORMAT = 1
#: Shares of samples by how an answer is held against the expected one, the strictest reading of a model first.
SHARES = {
    "correct": "answered correctly",
    "exact": "answered exactly",
    "normalized": "answered, normalised",
    "predicted": "predicted from the reference",
}
#: Answers shown of one kind, and in all.
ANSWERS_OF_KIND, ANSWERS = 6, 24
AS_TRAINED = "as_trained"

#: Given `data` and the answers' records, the media of each: frames as data URIs; or why there are none.
Pictures = Callable[[Mapping[str, Any], list[dict[str, Any]]], tuple[list[tuple[tuple[str, ...], ...]], str | None]]


def held_out(run: RunRecord) -> Section:
    """The held-out split over the steps, and with parts taken away."""
    blocks: list[Block] = []
    if charts := _over_steps(run):
        blocks.append(Figures(tuple(charts)))
    results = ablations(run.evaluation)
    if results:
        blocks += _ablations(results)
    elif run.evaluation is not None:
        blocks.append(Note(f"{EVALUATION_FILE} is of another format than {FORMAT}; to measure anew:", _command(run)))
    else:
        blocks.append(Note("Not measured with parts taken away. To do so:", _command(run)))
    if not run.evals:
        told = "The config names no held-out data (data.eval)." if not _has_held_out(run) else "Not measured yet."
        blocks.insert(0, Note(told))
    return Section("Evaluation", blocks)


def _has_held_out(run: RunRecord) -> bool:
    return part(run.config, "data").get("eval") is not None


def _command(run: RunRecord, *options: str) -> str:
    return " ".join(
        ["theworld-train evaluate", str(run.directory), *options, "--json", f"{run.directory}/{EVALUATION_FILE}"]
    )


def _over_steps(run: RunRecord) -> list[Chart]:
    """Returns a chart of each share of right answers, by kind of question, and one of the losses by kind."""
    keys = list(dict.fromkeys(key for row in run.evals for key in row))
    charts = []
    for name in share_names(keys):
        wanted = [key for key in keys if key == f"eval/{name}" or key.startswith(f"eval/{name}/")]
        series = [
            Series(key.removeprefix(f"eval/{name}").removeprefix("/") or "total", curve(run.evals, key), dotted=True)
            for key in wanted
        ]
        if series := [each for each in series if each.points]:
            title = f"Held out: {SHARES.get(name, name)}"
            charts.append(Chart(title, STEP, "share of samples", tuple(series)))
    losses = [key for key in keys if key.startswith("eval/loss")]
    if len(losses) > 1:
        series = [
            Series(key.removeprefix("eval/loss").removeprefix("/") or "total", curve(run.evals, key), dotted=True)
            for key in losses
        ]
        chart = Chart("Held out: loss", STEP, LOSS_UNIT, tuple(series), may_be_log=True)
        charts.append(chart)
    return charts


def share_names(keys: Iterable[str]) -> list[str]:
    """Returns the shares of samples that the keys of a measurement name and that are drawn, those that we know first.

    What is correct is exact or normalised by its kind, so those two stand in tables alone.
    """
    found = dict.fromkeys(key.split("/")[1] for key in keys if key.startswith("eval/"))
    known = [name for name in SHARES if name in found]
    if "correct" in known:
        known = [name for name in known if name not in ("exact", "normalized")]
    return [*known, *(name for name in found if name not in (*SHARES, "loss", "dropped"))]


def ablations(evaluation: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Returns the results of an `evaluation.json` by variant; none if it is of another format."""
    if evaluation is None or evaluation.get("format") != FORMAT:
        return {}
    return _parts(evaluation, "ablations")


def _parts(row: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Returns the objects of the object that a key holds."""
    return {name: each for name, each in part(row, key).items() if isinstance(each, dict)}


def measured(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns what a RESULT says of each kind of question, and of all (`total`), the only one if there is one kind."""
    found = _parts(result, "kinds")
    if len(found) != 1 and (total := part(result, "total")):
        found["total"] = total
    return found


def main_share(result: Mapping[str, Any]) -> str:
    """Returns the share that a result is judged by: answers where some were generated, else predictions."""
    total = part(result, "total")
    return next((name for name in SHARES if part(total, name)), "predicted")


def interval_text(found: Mapping[str, Any], write: Callable[[float | None], str]) -> str:
    """Writes a value with its interval: `93.0% (89.4% to 95.4%)`."""
    value, low, high = (number(found, key) for key in ("value", "low", "high"))
    if value is None:
        return ABSENT
    return write(value) if low is None or high is None else f"{write(value)} ({write(low)} to {write(high)})"


def _ablations(results: Mapping[str, dict[str, Any]]) -> list[Block]:
    """Returns the table of the variants, each kind of question with its interval, and bars of them."""
    first = next(iter(results.values()))
    name = main_share(results.get(AS_TRAINED, first))
    kinds = list(dict.fromkeys(kind for result in results.values() for kind in measured(result)))
    rows = []
    for variant, result in results.items():
        parts = measured(result)
        total = part(result, "total")
        loss = interval_text(part(total, "loss"), short)
        cells = [interval_text(part(parts.get(kind, {}), name), share) for kind in kinds]
        samples = count(number(total, "samples"))
        rows.append(
            (str(result.get("description") or variant), loss, *cells, samples, count(number(result, "dropped")))
        )
    title = f"Samples {SHARES[name]}, with 95% intervals"
    header = ("variant", "loss", *kinds, "samples", "left out")
    figures = [
        Bars(
            f"{kind}: {SHARES[name]}",
            tuple(
                bar
                for variant, result in results.items()
                for bar in _bar(variant, part(measured(result).get(kind, {}), name))
            ),
            most=1.0,
        )
        for kind in kinds
    ]
    blocks: list[Block] = [Table(header, tuple(rows), title), Figures(tuple(bars for bars in figures if bars.bars))]
    if kinds_table := _kinds(results.get(AS_TRAINED, first)):
        blocks.append(kinds_table)
    return blocks


def variant_name(key: str) -> str:
    """Returns the key of an ablation as words."""
    return key.replace("_", " ")


def _bar(name: str, found: Mapping[str, Any]) -> Iterator[Bar]:
    value, low, high = (number(found, key) for key in ("value", "low", "high"))
    if value is not None:
        yield Bar(variant_name(name), value, share(value), None if low is None or high is None else (low, high))


def _kinds(result: Mapping[str, Any]) -> Table | None:
    """Returns every share of one result by kind, if there is more than one share."""
    parts = measured(result)
    names = [name for name in SHARES if any(part(each, name) for each in parts.values())]
    if len(names) < 2:
        return None
    rows = tuple(
        (
            kind,
            *(interval_text(part(each, name), share) for name in names),
            interval_text(part(each, "loss"), short),
            count(number(each, "samples")),
        )
        for kind, each in parts.items()
    )
    return Table(
        ("kind", *(SHARES[name] for name in names), "loss", "samples"), rows, "As trained, by kind of question"
    )


# -- answers ----------------------------------------------------------------------------------------------------------


def answers(run: RunRecord, pictures: Pictures | None) -> Section:
    """Sample answers with their images and clips, the variants' beside one another."""
    results = ablations(run.evaluation)
    lead = results.get(AS_TRAINED) or next(iter(results.values()), {})
    chosen = _chosen(lead)
    if not chosen:
        text = "No sample answers are recorded. This has the model answer held-out questions, and keeps some answers:"
        return Section("Sample answers", [Note(text, _command(run, "evaluation.max_new_tokens=32"))])
    blocks: list[Block] = []
    if all(row.get("answer") is None for row in chosen):
        text = "No answers were generated: the marks say whether the reference was predicted. To generate them:"
        blocks.append(Note(text, _command(run, "evaluation.max_new_tokens=32")))
    media: list[tuple[tuple[str, ...], ...]] = [()] * len(chosen)
    data = part(run.evaluation, "data")
    if pictures is not None and data and any(row.get("media") for row in chosen):
        media, problem = pictures(data, chosen)
        if problem is not None:
            blocks.append(Note(f"Images and clips are missing: {problem}.", warns=True))
    given = {variant_name(name): {_key(row): row for row in _rows(result)} for name, result in results.items()}
    items = tuple(
        Answer(
            id=str(row.get("id")),
            kind=str(row.get("kind") or ""),
            question=str(row.get("question") or ""),
            expected=str(row.get("expected") or ""),
            given={name: _said(found[_key(row)]) for name, found in given.items() if _key(row) in found},
            right={name: bool(found[_key(row)].get("correct")) for name, found in given.items() if _key(row) in found},
            media=frames,
        )
        for row, frames in zip(chosen, media, strict=True)
    )
    return Section("Sample answers", [*blocks, Answers(items)])


def _said(row: Mapping[str, Any]) -> str:
    answer = row.get("answer")
    return f"loss {short(number(row, 'loss'))}" if answer is None else str(answer)


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row.get("index")), str(row.get("id"))


def _rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    return objects(result, "answers")


def _chosen(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the first answers of each kind, by kind."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(result):
        by_kind.setdefault(str(row.get("kind")), []).append(row)
    return [row for rows in by_kind.values() for row in rows[:ANSWERS_OF_KIND]][:ANSWERS]
