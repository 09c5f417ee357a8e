"""Protects loading as others use it: types, round trips, pipelines, the JSON Schema, and no framework imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from theworld_train.config import (
    Component,
    ConfigError,
    RunConfig,
    config_json_schema,
    config_kind,
    dump_config,
    format_overrides,
    load_pipeline_config,
    load_run_config,
    load_stage_configs,
    parse_run_config,
)
from theworld_train.config.outline import outline_of

PIPELINE = """\
name: chain
output_dir: runs/chain
launcher: [accelerate, launch, --num_processes, "8"]
stages:
  - config: ../base.yaml
  - config: ../base.yaml
    overrides: {name: second, trainable.vision_tower.lr: 1e-5, expect_trainable: null, training: {epochs: 0.5}}
"""


@pytest.fixture
def pipeline(folder: Path) -> str:
    (folder / "pipelines").mkdir()
    (folder / "pipelines" / "chain.yaml").write_text(PIPELINE)
    return "pipelines/chain.yaml"


def test_yaml_types_become_the_schema_s_types(write):
    config = load_run_config(write("optimizer: {lr: 1, betas: [0, 0.5]}\ntraining: {gradient_clip_norm: 2}"))
    assert isinstance(config.optimizer.lr, float)
    assert config.optimizer.betas == (0.0, 0.5)
    assert list(config.trainable) == [Component.WORLD_PROJECTOR, Component.VISION_TOWER]


def test_a_path_object_serves_as_well(folder):
    assert load_run_config(folder / "base.yaml") == load_run_config("base.yaml")


def test_a_dump_loads_to_an_equal_config(write):
    path = write(
        "name: '1e5'\noutput_dir: 'on'\nmodel: {revision: '010', base: 'null', world: {encoder: '12:30'}}\n"
        "optimizer: {lr: 1e-5, eps: 1e-10}\ntraining: {gradient_clip_norm: null}\nresume: '{a: b} # é'\n"
        "data: {eval: {source: moving_digits, split: eval, samples: 3}}"
    )
    config = load_run_config(path)
    Path("dump.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_run_config("dump.yaml") == config


def test_a_dump_states_the_defaults(folder):
    text = dump_config(load_run_config("base.yaml"))
    assert "gradient_clip_norm: 1.0" in text
    assert "&" not in text


def test_a_dump_of_a_pipeline_loads_to_an_equal_config_from_anywhere(pipeline, folder):
    config = load_pipeline_config(pipeline)
    (folder / "dump.yaml").write_text(dump_config(config))
    assert load_pipeline_config("dump.yaml") == config


def test_parsing_follows_the_rules_of_files(folder):
    config = load_run_config("base.yaml")
    assert parse_run_config(json.loads(config.model_dump_json())) == config
    with pytest.raises(ConfigError, match="metadata: seed: expected a whole number"):
        parse_run_config({**config.model_dump(mode="json"), "seed": "3"}, source="metadata")


def test_parsing_refuses_secrets(folder):
    data = load_run_config("base.yaml").model_dump(mode="json")
    with pytest.raises(ConfigError, match="looks like a secret"):
        parse_run_config({**data, "token": "correct-horse"})


@pytest.mark.parametrize(
    "overrides",
    [
        {"optimizer.lr": 3e-4, "optimizer.eps": 1e-10},
        {"name": "1e5", "model.revision": "on", "init_from": "a b: #c", "output_dir": ""},
        {"optimizer.betas": [0.9, 0.95], "expect_trainable": None, "trainable.vision_tower": {}},
        {"data.train": {"source": "hub", "id": "x"}, "deterministic": True, "model.base": "line\nline"},
    ],
)
def test_formatted_overrides_are_read_back_as_they_were(overrides):
    from theworld_train.config.layers import Findings, override_layer

    outline, findings = outline_of(RunConfig), Findings()
    arguments = format_overrides(overrides)
    assert override_layer(arguments, outline, "x", findings) == override_layer(overrides, outline, "x", findings)
    assert not findings.problems
    assert all(argument.count("=") >= 1 and "\n" not in argument for argument in arguments)


class TestPipelines:
    def test_stage_configs_are_found_from_the_pipeline_file(self, pipeline, folder):
        config = load_pipeline_config(pipeline)
        assert [stage.config for stage in config.stages] == [str(folder / "base.yaml")] * 2
        assert all(os.path.isabs(stage.config) for stage in config.stages)
        assert config.launcher[-1] == "8"

    def test_the_kind_of_a_file_is_told_by_its_stages(self, pipeline, write):
        assert config_kind(pipeline) == "pipeline"
        assert config_kind("base.yaml") == "run"
        assert config_kind(write("name: other", "derived.yaml", extends=pipeline)) == "pipeline"

    def test_problems_of_stages_name_the_stage(self, pipeline):
        config = load_pipeline_config(pipeline)
        with pytest.raises(ConfigError) as caught:
            load_stage_configs(config, source=pipeline)
        (problem,) = caught.value.problems
        assert problem.source == "pipelines/chain.yaml: stages[1].overrides"
        assert problem.key == "training"

    def test_stages_load_with_their_overrides(self, pipeline, folder):
        text = PIPELINE.replace("training: {epochs: 0.5}", "training.max_steps: 7")
        (folder / pipeline).write_text(text)
        first, second = load_stage_configs(load_pipeline_config(pipeline), source=pipeline)
        assert (first.name, second.name) == ("base", "second")
        assert (first.training.max_steps, second.training.max_steps) == (10, 7)
        assert second.trainable[Component.VISION_TOWER].lr == 1e-5

    def test_a_file_that_two_stages_share_is_reported_once(self, folder):
        (folder / "wrong.yaml").write_text("seed: x")
        (folder / "p.yaml").write_text("name: p\noutput_dir: o\nstages: [{config: wrong.yaml}, {config: wrong.yaml}]")
        with pytest.raises(ConfigError) as caught:
            load_stage_configs(load_pipeline_config("p.yaml"), "p.yaml")
        assert len(caught.value.problems) == len(set(map(str, caught.value.problems)))

    def test_a_missing_stage_config_is_answered_with_the_nearest_name(self, folder):
        (folder / "p.yaml").write_text("name: p\noutput_dir: o\nstages: [{config: bose.yaml}]")
        with pytest.raises(ConfigError, match=r"no such file; did you mean 'base\.yaml'"):
            load_stage_configs(load_pipeline_config("p.yaml"), "p.yaml")

    def test_overrides_of_the_pipeline_itself_work(self, pipeline):
        assert load_pipeline_config(pipeline, ["name=other"]).name == "other"


class TestJsonSchema:
    @pytest.mark.parametrize("kind", ["run", "pipeline"])
    def test_every_key_has_a_description(self, kind):
        schema = config_json_schema(kind)
        for section in [schema, *schema.get("$defs", {}).values()]:
            for name, node in section.get("properties", {}).items():
                referred = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
                assert node.get("description") or referred.get("description"), name

    def test_a_part_of_a_config_that_extends_another_is_no_error(self):
        schema = config_json_schema("run")
        assert {"required": ["extends"]} in schema["anyOf"]
        assert "extends" in schema["properties"]
        assert '"required"' not in json.dumps(schema["$defs"])

    def test_it_can_be_written_as_json(self):
        assert json.loads(json.dumps(config_json_schema("pipeline")))["title"] == "PipelineConfig"


def test_the_outline_knows_the_keys_of_every_variant():
    outline = outline_of(RunConfig)
    known = (
        "data.train.id",
        "data.train.path",
        "data.eval.canvas",
        "trainable.world_encoder.lr",
        "optimizer",
        "model.world.tokens",
    )
    assert all(outline.knows(key.split(".")) for key in known)
    assert not any(
        outline.knows(key.split(".")) for key in ("data.train.jsonl", "trainable.lm_head", "optimizer.lr.x", "")
    )


@pytest.mark.parametrize("module", ["theworld_train", "theworld_train.config", "theworld_train.cli.validate"])
def test_no_framework_is_imported(module):
    heavy = ("torch", "transformers", "datasets", "accelerate")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
