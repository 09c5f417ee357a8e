"""Protects what a report says of a run, a pipeline, a sweep and several runs: every figure is one of their files'."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from tests.helpers import reported
from tests.unit.report.conftest import blocks, charts, facts, markdown_of, notes, page_of, report_of, section
from theworld_train.config.errors import ConfigError
from theworld_train.report.blocks import Answers, Parallel, Table
from theworld_train.report.page import render_page


def table(report: object, title: str, number: int = 0) -> Table:
    found: Table = blocks(report, title, Table)[number]  # type: ignore[arg-type]
    return found


def row_of(table: Table, name: str) -> dict[str, str]:
    (found,) = [row for row in table.rows if row[0] == name]
    return dict(zip(table.header, found, strict=True))


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_is_told_with_every_part_of_the_issue(run: Path) -> None:
    report = report_of(run)
    assert [each.title for each in report.sections] == [
        "Overview",
        "Training",
        "Evaluation",
        "Sample answers",
        "Speed and memory",
        "Token budget",
        "Parameters",
        "Incidents",
        "Versions and config",
    ]
    told = facts(report, "Overview")
    assert told["optimizer steps"] == "40 of 40"
    assert told["ended because"] == "eval/loss has not fallen by 0.01 for 3 measurements"
    assert told["time in steps"] == "12 s"


def test_the_curves_are_those_of_the_metrics(run: Path) -> None:
    drawn = charts(report_of(run), "Training")
    loss = {series.name: series.points for series in drawn["Loss"].series}
    written = {row["step"]: row["train/loss"] for row in reported.metrics() if row["event"] == "train"}
    assert len(loss["training loss"]) == 40
    assert all(value == written[step] for step, value in loss["training loss"] if step != 12)
    assert math.isnan(dict(loss["training loss"])[12])
    held_out = [row for row in reported.metrics() if row["event"] == "eval"]
    assert loss["held-out loss"] == tuple((row["step"], row["eval/loss"]) for row in held_out)
    assert len(held_out) == 4
    assert drawn["Loss"].marks == ((20, "restart"),)
    assert {series.name for series in drawn["Learning rate"].series} == {"vision_tower", "world_projector"}
    norms = [series.name for series in drawn["Gradient norm before clipping"].series]
    assert norms == ["whole gradient", "vision_tower", "world_projector"]
    assert drawn["Gradient norm before clipping"].levels == ((1.0, "clipped to 1"),)
    assert {series.name for series in drawn["Weight norm"].series} == {"vision_tower", "world_projector"}


def test_a_metric_that_nobody_knows_is_drawn_too(run: Path) -> None:
    rows = [row | {"train/new": 1.0} if row["event"] == "train" else row for row in reported.metrics()]
    reported.write_lines(run / "metrics.jsonl", rows)
    assert "train/new" in charts(report_of(run), "Training")


def test_memory_and_time_stand_beside_the_plan(run: Path) -> None:
    against = table(report_of(run), "Speed and memory")
    assert against.title == "Measured and planned, on 2 ranks of NVIDIA H100 80GB HBM3"
    peak = row_of(against, "peak memory of a rank")
    assert (peak["measured"], peak["planned"], peak["off"]) == ("21.00 GiB", "20.00 GiB", "+5%")
    step = row_of(against, "median time of a step")
    assert (step["planned"], step["off"]) == ("0.28 s (0.2 to 0.4)", "+7%")


def test_tokens_add_up_to_the_positions(run: Path) -> None:
    budget = table(report_of(run), "Token budget")
    assert row_of(budget, "positions computed")["in all"] == "80,000"  # 1500 tokens are 3/4 of 2000 positions
    assert row_of(budget, "padding")["share"] == "25.0%"
    told = facts(report_of(run), "Token budget")
    assert (told["samples"], told["samples cut"], told["samples replaced by others"]) == ("640", "1", "1")


def test_the_ledger_adds_up(run: Path) -> None:
    total = row_of(table(report_of(run), "Parameters"), "total")
    assert (total["parameters"], total["trainable"]) == ("4,300,043,520", "417,043,520")
    assert row_of(table(report_of(run), "Parameters"), "vision_tower")["dtype"] == "float32"
    assert total["peak rate"] == f"{417_043_520 / 4_300_043_520:.2%} train"


def test_ablations_are_one_table_with_intervals(run: Path) -> None:
    ablations = table(report_of(run), "Evaluation")
    assert ablations.title == "Samples answered correctly, with 95% intervals"
    assert ablations.header == ("variant", "loss", "direction", "digit", "total", "samples", "left out")
    assert row_of(ablations, "as trained")["total"] == "88.0% (78.0% to 98.0%)"
    assert row_of(ablations, "world tokens masked")["loss"] == "1.7 (1.65 to 1.75)"


def test_correct_answers_and_predictions_are_drawn_over_the_steps(run: Path) -> None:
    drawn = charts(report_of(run), "Evaluation")
    titles = ["Held out: answered correctly", "Held out: predicted from the reference", "Held out: loss"]
    assert list(drawn)[:3] == titles
    assert {series.name for series in drawn[titles[0]].series} == {"total", "direction", "digit"}
    assert "Held out: answered exactly" not in drawn


def test_answers_of_all_variants_stand_together(run: Path) -> None:
    (answers,) = blocks(report_of(run), "Sample answers", Answers)
    assert [answer.kind for answer in answers.items] == ["direction"] * 4 + ["digit"] * 4
    first = answers.items[0]
    assert first.given == {"as trained": "right", "world masked": "left"}
    assert first.right == {"as trained": True, "world masked": False}


def test_what_went_wrong_is_listed(run: Path) -> None:
    incidents, launches, quarantined = blocks(report_of(run), "Incidents", Table)
    assert [row[:2] for row in incidents.rows] == [
        ("12", "skipped, gradient not finite"),
        ("25", "loss stands out"),
    ]
    assert incidents.rows[1][4] == "clip-17, clip-18"
    assert [row[1] for row in launches.rows] == ["0", "20"]
    assert quarantined.rows == (("damaged-3", "7", "no image"),)


def test_versions_and_git_are_told_and_secrets_are_not(run: Path) -> None:
    config = reported.config("projection", run)
    config["tracking"] = {"api_key": "sk-0123456789abcdef0123456789abcdef"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    told = facts(report_of(run), "Versions and config")
    assert told["git"] == "b0cc46d6a3b0 on main, with uncommitted changes"
    assert told["torch"] == "2.10.0"
    assert told["memory"] == "256.00 GiB"
    assert row_of(table(report_of(run), "Versions"), "tracking.api_key")["value"] == "(hidden)"
    assert "sk-0123456789abcdef" not in page_of(run).text


def test_a_run_that_was_stopped_is_told_as_far_as_it_came(run: Path) -> None:
    (run / "result.json").unlink()
    shutil.rmtree(run / "step-40")
    text = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(text[:20]) + '\n{"event": "train", "st')
    report = report_of(run)
    assert report.about == "Run, not complete: 18 of 40 optimizer steps are recorded, and no checkpoint is saved."
    assert "The last line of metrics.jsonl is incomplete" in notes(report, "Overview")
    assert f"theworld-train train {run}/config.yaml resume=latest" in notes(report, "Overview")
    assert "recorded when a run ends" in notes(report, "Speed and memory")


def test_an_older_run_is_a_shorter_report(run: Path) -> None:
    """As runs of the first versions were: no record, another evaluation, no norms."""
    (run / "run.json").unlink()
    (run / "quarantine.jsonl").unlink()
    reported.write_json(run / "evaluation.json", {"as_trained": {"loss": 0.5, "accuracy": {"total": 0.6}}})
    rows = [
        {"event": "train", "step": step, "train/loss": 3.0 / step, "lr/world_projector": 1e-3} for step in range(1, 5)
    ]
    old = {"event": "eval", "step": 4, "eval/loss": 0.5, "eval/accuracy/digit": 0.25}
    reported.write_lines(run / "metrics.jsonl", [*rows, old])
    report = report_of(run)
    assert list(charts(report, "Training")) == ["Loss", "Learning rate"]
    assert list(charts(report, "Evaluation")) == ["Held out: accuracy"]
    assert "evaluation.json is of another format" in notes(report, "Evaluation")
    assert "has recorded no versions" in notes(report, "Versions and config")
    assert page_of(run).text


@pytest.mark.parametrize("kept", ["config.yaml", "metrics.jsonl"])
def test_one_file_is_enough_for_a_report(run: Path, kept: str) -> None:
    for path in run.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = report_of(run)
    assert report.title == ("projection" if kept == "config.yaml" else "run")
    assert "theworld-train evaluate" in notes(report, "Evaluation")
    assert "theworld-train params" in notes(report, "Parameters")
    assert page_of(run).text
    assert markdown_of(run)


# -- several runs -----------------------------------------------------------------------------------------------------


def test_runs_are_compared_by_results_curves_and_configs(run: Path, tmp_path: Path) -> None:
    other = reported.write_run(tmp_path / "other", "other", 0.25, global_batch_size=32)
    report = report_of(run, other)
    assert [each.title for each in report.sections] == ["Results", "Differences of the configs", "Curves", "Ablations"]
    results = table(report, "Results")
    assert row_of(results, "other")["samples/s"] == "106.6"
    assert table(report, "Differences").rows == (("training.global_batch_size", "16", "32"),)
    assert {series.name for series in charts(report, "Curves")["Training loss"].series} == {"projection", "other"}
    assert [row[:2] for row in table(report, "Ablations").rows[:2]] == [
        ("as trained", "projection"),
        ("as trained", "other"),
    ]


def test_runs_of_one_name_are_told_apart_by_their_directories(run: Path, tmp_path: Path) -> None:
    other = reported.write_run(tmp_path / "again" / "run", "projection")
    report = report_of(run, other)
    assert [row[0] for row in table(report, "Results").rows] == [f"{tmp_path.name}/run", "again/run"]
    assert "the configs are the same" in notes(report, "Differences")


# -- a pipeline -------------------------------------------------------------------------------------------------------


def test_a_pipeline_is_told_stage_by_stage(pipeline: Path) -> None:
    report = report_of(pipeline)
    assert report.about == "Pipeline: 2 of 4 stages complete; skipped: 2."
    stages = table(report, "Stages")
    assert [row[:4] for row in stages.rows] == [
        ("projection", "complete", "2", "40"),
        ("vision", "complete", "1", "40"),
        ("language", "skipped", "0", "-"),
        ("full", "skipped", "0", "-"),
    ]
    assert row_of(stages, "full")["reason"] == "stop_when: eval/correct is at least 0.8"
    told = facts(report, "Stages")
    assert told["gates that fired"] == "projection: advance_when.plateau, vision: advance_when.plateau"
    assert told["from first to last line of the journal"] == "8 min 00 s"


def test_the_curves_of_stages_lie_one_after_the_other(pipeline: Path) -> None:
    loss = charts(report_of(pipeline), "Training")["Loss"]
    assert loss.marks == ((0.0, "projection"), (40.0, "vision"))
    assert [step for step, _ in loss.series[0].points] == [float(step) for step in range(1, 81)]


def test_each_stage_stands_beside_its_plan_and_its_ablations(pipeline: Path) -> None:
    report = report_of(pipeline)
    assert row_of(table(report, "Speed"), "vision")["off"] == "+5%"
    assert [row[:2] for row in table(report, "Evaluation").rows] == [
        (stage, variant) for stage in ("projection", "vision") for variant in ("as trained", "world tokens masked")
    ]
    assert blocks(report, "Sample answers of vision", Answers)


def test_a_pipeline_that_has_just_begun_has_a_report(pipeline: Path) -> None:
    for name in ("projection", "vision"):
        shutil.rmtree(pipeline / name)
    (pipeline / "summary.json").unlink()
    first = (pipeline / "journal.jsonl").read_text().splitlines()[0]
    (pipeline / "journal.jsonl").write_text(first + "\n")
    report = report_of(pipeline)
    assert report.about == "Pipeline: 0 of 4 stages complete; pending: 4."
    assert "theworld-train run" in notes(report, "Stages")
    assert page_of(pipeline).text


def test_a_pipeline_without_a_journal_is_told_from_its_summary(pipeline: Path) -> None:
    (pipeline / "journal.jsonl").unlink()
    assert report_of(pipeline).about == "Pipeline: 2 of 4 stages complete; skipped: 2."


def test_a_stage_named_like_a_path_leads_nowhere(pipeline: Path, run: Path) -> None:
    reported.write_lines(pipeline / "journal.jsonl", reported.journal(["../run", str(run)]))
    assert section(report_of(pipeline), "Stages").blocks[1].rows[0][3] == "-"


# -- a sweep ----------------------------------------------------------------------------------------------------------


def test_a_sweep_is_told_with_trials_importance_and_the_best_config(sweep: Path) -> None:
    report = report_of(sweep)
    written = reported.sweep()
    best = next(trial for trial in written["trials"] if trial["number"] == written["best"])
    assert report.about == "Sweep of 12 trials: 9 complete, 1 pruned, 1 does not fit, 1 failed."
    assert facts(report, "Overview")["best value"] == f"{best['value']:.4g} (trial {best['number']})"
    searched = table(report, "Best trial")
    assert row_of(searched, reported.LR)["best"] == str(best["values"][reported.LR])
    importance = charts(report, "Search")["Importance: share of the variance of eval/loss"]
    assert [(bar.name, bar.value) for bar in importance.bars] == [
        (reported.LR, 0.71),
        (reported.PROJECTION, 0.21),
        (reported.WARMUP, 0.08),
    ]
    trials = table(report, "Trials")
    assert trials.rows[0][0] == str(best["number"])
    assert trials.marked == {0}
    assert [row[1] for row in trials.rows[-3:]] == ["pruned", "does not fit", "failed"]
    assert "ValueError: <no>" in notes(report, "Trials")


def test_parallel_axes_place_values_and_results(sweep: Path) -> None:
    (parallel,) = blocks(report_of(sweep), "Search", Parallel)
    assert [axis.name for axis in parallel.axes] == [reported.LR, reported.PROJECTION, reported.WARMUP, "eval/loss"]
    lines = {line.name.split(",")[0]: line for line in parallel.lines}
    written = reported.sweep()
    best = lines[f"trial {written['best']}"]
    assert best.best
    assert (best.places[3], best.shade) == (0.0, 0.0)
    lr = next(trial for trial in written["trials"] if trial["number"] == written["best"])["values"][reported.LR]
    assert best.places[0] == pytest.approx((math.log10(lr) + 4) / 2)
    assert lines["trial 8"].shade is None
    assert lines["trial 8"].places[3] is None
    assert {line.places[1] for line in parallel.lines} == {0.0, 1.0}


def test_of_a_sweep_that_maximises_the_largest_value_is_the_best_shade(sweep: Path) -> None:
    summary = reported.sweep() | {"direction": "maximize"}
    complete = [trial for trial in summary["trials"] if trial["value"] is not None]
    summary["best"] = max(complete, key=lambda trial: trial["value"])["number"]
    reported.write_json(sweep / "sweep.json", summary)
    (parallel,) = blocks(report_of(sweep), "Search", Parallel)
    (best,) = [line for line in parallel.lines if line.best]
    assert (best.shade, best.places[3]) == (0.0, 1.0)
    assert table(report_of(sweep), "Trials").rows[0][0] == str(summary["best"])


def test_a_sweep_that_has_just_begun_has_a_report(sweep: Path) -> None:
    reported.write_json(sweep / "sweep.json", reported.sweep() | {"trials": [], "best": None, "importance": {}})
    report = report_of(sweep)
    assert f"theworld-train sweep resume {sweep}" in notes(report, "Overview")
    assert page_of(sweep).text
    running = reported.trial(0, "running") | {"intermediate": [[10, 1.5], [20, None]]}
    reported.write_json(sweep / "sweep.json", reported.sweep() | {"trials": [running], "best": None, "importance": {}})
    report = report_of(sweep)
    assert "No trial is complete" in notes(report, "Best trial")
    assert page_of(sweep).text


def test_keys_of_stages_are_found_in_the_base_of_a_pipelines_sweep(sweep: Path) -> None:
    """Their configs lie beside the pipeline's."""
    key = f"stages.vision.{reported.LR}"
    summary = reported.sweep() | {"kind": "pipeline", "space": {key: {"values": [1e-3, 2e-3]}}, "importance": {}}
    for trial in summary["trials"]:
        trial["values"] = {key: 2e-3}
    reported.write_json(sweep / "sweep.json", summary)
    (sweep / "base" / "stages").mkdir()
    (sweep / "base" / "stages" / "01-vision.yaml").write_text(yaml.safe_dump(reported.config("vision", sweep)))
    assert table(report_of(sweep), "Best trial").rows == ((key, "0.002", "0.0005"),)


def test_a_sweep_of_a_later_format_is_not_guessed_at(sweep: Path) -> None:
    reported.write_json(sweep / "sweep.json", reported.sweep() | {"format": 2})
    assert "of format 2, and this version reads format 1" in notes(report_of(sweep), "Overview")


def test_the_best_config_is_looked_for_in_the_sweep_alone(sweep: Path, run: Path) -> None:
    summary = reported.sweep()
    for trial in summary["trials"]:
        trial["directory"] = "../run"
    reported.write_json(sweep / "sweep.json", summary)
    assert "The whole config" not in page_of(sweep).text


# -- what no report can be made of ------------------------------------------------------------------------------------


def test_a_path_that_is_nothing_is_answered_with_what_it_holds(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        report_of(tmp_path)
    assert f"it holds {run}" in str(error.value)
    with pytest.raises(ConfigError) as error:
        report_of(run / "step-40")
    assert f"try {run}" in str(error.value)


def test_all_wrong_paths_are_told_at_once(run: Path, pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        report_of(run, pipeline, tmp_path / "absent", run / "config.yaml")
    said = str(error.value)
    assert "several runs can be compared, not pipelines" in said
    assert "there is no such directory" in said
    assert "is a file" in said


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "pipeline", "sweep"])
def test_damaged_files_are_left_out_and_named(kind: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(kind)
    shutil.rmtree(directory / "vision", ignore_errors=True)
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json"]
    for path in files:
        whole = path.read_bytes()
        for damaged in (b"", b"{", b"\xff\xfe\x00", b"[1, 2]\n", b"null\n", whole[: len(whole) // 2]):
            path.write_bytes(damaged)
            text = page_of(directory).text
            lines = path.suffix == ".jsonl"
            if damaged == b"{" and path.suffix == ".json":
                assert f"{path.name} is damaged and left out" in text, path
            if damaged == b"null\n" and lines:
                assert f"1 damaged line is left out of {path.name}" in text, path
            assert markdown_of(directory)
        path.write_bytes(whole)


def shortened(value: object) -> object:
    """Returns a record with one item of each list, for a search through all of its places."""
    if isinstance(value, dict):
        return {key: shortened(each) for key, each in value.items()}
    return [shortened(each) for each in value[:1]] if isinstance(value, list) else value


def places(value: object, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, each in inner for place in places(each, (*at, key)))]


def replaced(value: object, at: tuple[str | int, ...], new: object) -> object:
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)  # type: ignore[call-overload]
    copy[at[0]] = replaced(copy[at[0]], at[1:], new)
    return copy


def test_no_value_of_another_type_stops_a_report(run: Path, sweep: Path) -> None:
    """Every value of every record in turn is something else: another version's, or a mistake."""
    others = [None, "x", -1, [], {}, math.inf, True, [None], 10**400]
    reported.write_lines(run / "metrics.jsonl", reported.metrics(4))
    tried = 0
    for directory, name in ((run, "run.json"), (run, "evaluation.json"), (run, "result.json"), (sweep, "sweep.json")):
        path = directory / name
        record = shortened(json.loads(path.read_text()))
        for number, place in enumerate(places(record)):
            path.write_text(json.dumps(replaced(record, place, others[number % len(others)])))
            assert render_page(report_of(directory)), (name, place)
            tried += 1
    assert tried > 200
