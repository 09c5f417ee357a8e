"""Protects `validate`: every file is reported, the exit code tells, and overrides hold for all files."""

from __future__ import annotations

import json

from theworld_train.data import open_source

FRAMES = ["image", "future"]


def test_a_good_config_is_ok(folder, call):
    assert call("validate", "good.yaml") == (0, "ok     good.yaml: run 'good' trains world_projector\n", "")


def test_a_wrong_one_is_listed_with_all_its_problems(folder, call):
    code, out, err = call("validate", "wrong.yaml")
    assert (code, out) == (2, "wrong  wrong.yaml\n")
    assert err.splitlines() == [
        "2 problems in wrong.yaml",
        "  seed: expected a whole number from 0 to 4294967295 (got 'x')",
        "  optimizer.lr: expected a number > 0 (got -1)",
    ]


def test_every_file_is_reported_though_one_is_wrong(folder, call):
    code, out, err = call("validate", "wrong.yaml", "missing.yaml", "good.yaml", "pipeline.yaml")
    assert code == 2
    assert [line.split()[0] for line in out.splitlines()] == ["wrong", "wrong", "ok", "ok"]
    assert "1 problem in missing.yaml" in err


def test_overrides_hold_for_every_file(folder, call):
    code, out, _ = call("validate", "good.yaml", "pipeline.yaml", "name=other")
    assert code == 0
    assert "run 'other'" in out
    assert "pipeline 'other'" in out


def test_an_override_can_be_wrong(folder, call):
    code, _, err = call("validate", "good.yaml", "optimizer.lrr=1")
    assert code == 2
    assert "1 problem on the command line\n  optimizer.lrr: unknown key; did you mean 'optimizer.lr'?" in err


def test_a_pipeline_is_checked_with_its_stages(folder, call):
    assert call("validate", "pipeline.yaml") == (0, "ok     pipeline.yaml: pipeline 'chain' of good, b\n", "")
    (folder / "pipeline.yaml").write_text(
        "name: chain\noutput_dir: o\nstages: [{config: wrong.yaml}, {config: good.yaml, overrides: {optimizer.lr: x}}]"
    )
    code, _, err = call("validate", "pipeline.yaml")
    assert code == 2
    assert "2 problems in wrong.yaml" in err
    assert "1 problem in pipeline.yaml: stages[1].overrides\n  optimizer.lr: expected a number > 0 (got 'x')" in err


def test_a_pipeline_that_run_refuses_is_wrong(folder, call):
    head = "name: chain\noutput_dir: o\n"
    for text, said in (
        ("stages: [{config: good.yaml}, {config: good.yaml}]", "stages: two stages are called 'good'"),
        ("stages: [{config: good.yaml}]\nevaluation: {stages: [god]}", "no stage is called 'god'; did you mean 'good'"),
    ):
        (folder / "pipeline.yaml").write_text(f"{head}{text}\n")
        code, out, err = call("validate", "pipeline.yaml")
        assert (code, out) == (2, "wrong  pipeline.yaml\n")
        assert said in err


def test_a_config_in_another_folder_is_named_as_the_user_named_it(folder, call):
    (folder / "sub").mkdir()
    (folder / "sub" / "c.yaml").write_text("extends: ../wrong.yaml")
    code, _, err = call("validate", "sub/c.yaml")
    assert code == 2
    assert "2 problems in wrong.yaml" in err


def test_overrides_alone_are_no_configs(folder, call):
    assert call("validate", "seed=3")[0] == 2


def test_no_argument_is_a_usage_error(call):
    code, _, err = call("validate")
    assert code == 2
    assert "Missing argument" in err


def test_with_the_data_every_wrong_row_is_named(folder, call):
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "this"}]
    rows = [{"messages": turns}, {"id": "open", "messages": turns[:1]}, {"id": "x", "messages": turns}]
    folder.joinpath("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[-1]]))
    data = ["data.train={source: jsonl, path: rows.jsonl}", "data.eval={source: jsonl, path: absent.jsonl}"]
    assert call("validate", "good.yaml", *data)[0] == 0
    code, out, err = call("validate", "--data", "good.yaml", *data)
    assert (code, out) == (2, "wrong  good.yaml\n")
    assert "problem in rows.jsonl:2\n  messages: no assistant turn" in err
    assert "problem in rows.jsonl:4\n  id: the id is already that of rows.jsonl:3 (got 'x')" in err
    assert "absent.jsonl" in err

    folder.joinpath("out.jsonl").write_text('{"id": "rows.jsonl:4"}\n{"id": "rows.jsonl:2"}\n')
    assert call("validate", "--data", "good.yaml", data[0], "data.eval=null", "data.exclude=[out.jsonl]") == (
        0,
        "ok     good.yaml: run 'good' trains world_projector; 4 rows checked\n",
        "",
    )


def test_data_that_stages_take_other_frames_of_are_checked_for_each(folder, call, monkeypatch):
    opened = []

    def noted(data, world=None):
        opened.append(world and world.frames)
        return open_source(data, world)

    monkeypatch.setattr("theworld_train.data.open_source", noted)
    (folder / "good.yaml").write_text(
        "name: good\noutput_dir: o\ntrainable: {world_projector: {}}\ntraining: {max_steps: 10}\n"
        "data: {train: {source: moving_digits, split: train, samples: 8, later_frames: 4}}\n"
    )
    others = ", ".join(f"{{config: good.yaml, overrides: {{name: {x}, data.world.frames: {x}}}}}" for x in FRAMES)
    (folder / "pipeline.yaml").write_text(f"name: chain\noutput_dir: o\nstages: [{others}]\n")
    assert call("validate", "--data", "pipeline.yaml")[0] == 0
    assert opened == FRAMES
