"""Protects the rules of `extends` and of overrides: what merges, what is replaced, and who is to blame for a value."""

from __future__ import annotations

import pytest

from theworld_train.config import Component, ConfigError, RunConfig, load_run_config
from theworld_train.config.layers import Findings, override_layer
from theworld_train.config.outline import outline_of


def test_a_child_states_only_what_differs(write):
    config = load_run_config(write("name: child\ntraining: {global_batch_size: 16}"))
    assert config.name == "child"
    assert (config.training.max_steps, config.training.global_batch_size) == (10, 16)


def test_extends_is_relative_to_the_file_that_states_it(write):
    write("name: middle", "deep/middle.yaml", extends="../base.yaml")
    path = write("seed: 1", "deep/er/leaf.yaml", extends="../middle.yaml")
    assert load_run_config(path).name == "middle"


def test_a_list_extends_in_order_and_later_files_win(write):
    write("seed: 1\nname: first", "first.yaml", extends=None)
    write("seed: 2", "second.yaml", extends=None)
    config = load_run_config(write("", extends="[base.yaml, first.yaml, second.yaml]"))
    assert (config.name, config.seed) == ("first", 2)


def test_a_base_that_two_parents_share_does_not_undo_the_first_one(write):
    write("name: first", "first.yaml")
    write("seed: 2", "second.yaml")
    config = load_run_config(write("", extends="[first.yaml, second.yaml]"))
    assert (config.name, config.seed) == ("first", 2)


def test_a_circle_is_refused_and_named(write, the_problem_of):
    write("", "a.yaml", extends="b.yaml")
    write("", "b.yaml", extends="a.yaml")
    problem = the_problem_of("a.yaml")
    assert "a.yaml -> b.yaml -> a.yaml" in problem.message
    assert (problem.source, problem.key) == ("b.yaml", "extends")


def test_a_file_that_extends_itself_is_a_circle(write, the_problem_of):
    assert "circle" in the_problem_of(write("", extends="child.yaml")).message


def test_a_missing_parent_is_blamed_on_the_file_that_names_it(write, the_problem_of):
    problem = the_problem_of(write("", extends="bas.yaml"))
    assert (problem.source, problem.key) == ("child.yaml", "extends")
    assert problem.hint == "did you mean 'base.yaml'?"


def test_all_parents_that_cannot_be_read_are_named_at_once(write, problems_of):
    assert len(problems_of(write("", extends="[x.yaml, y.yaml]"))) == 2


@pytest.mark.parametrize("extends", ["3", "{a: 1}", "[base.yaml, 3]", "''"])
def test_extends_takes_paths_only(write, problems_of, extends):
    assert "expected a path or a list of paths" in problems_of(write("", extends=extends))[0].message


def test_lists_are_replaced(write):
    write("tracking: {trackers: [wandb, tensorboard]}", "middle.yaml")
    assert load_run_config(write("tracking: {trackers: [wandb]}", extends="middle.yaml")).tracking.trackers == (
        "wandb",
    )


def test_null_is_a_value_where_the_field_allows_it(write):
    config = load_run_config(write("training: {gradient_clip_norm: null, max_steps: null, epochs: 1}"))
    assert config.training.gradient_clip_norm is None
    assert config.training.epochs == 1.0


def test_null_is_an_error_where_the_field_needs_a_value(write, the_problem_of):
    assert the_problem_of(write("seed: null")).message == "expected a whole number from 0 to 4294967295, not null"


def test_a_child_replaces_the_trainable_table_as_a_whole(write):
    config = load_run_config(write("trainable: {language_model: {}}\nexpect_trainable: null"))
    assert list(config.trainable) == [Component.LANGUAGE_MODEL]


def test_an_override_changes_one_entry_of_the_trainable_table(folder):
    config = load_run_config("base.yaml", ["trainable.world_projector.weight_decay=0.1"])
    assert config.trainable[Component.WORLD_PROJECTOR].lr == 1e-4
    assert config.trainable[Component.WORLD_PROJECTOR].weight_decay == 0.1
    assert Component.VISION_TOWER in config.trainable


def test_an_override_with_a_mapping_merges_as_in_a_file(write):
    config = load_run_config(write("optimizer: {eps: 1}"), ["optimizer={lr: 2}"])
    assert (config.optimizer.eps, config.optimizer.lr) == (1.0, 2.0)


def test_an_override_replaces_the_trainable_table_or_an_entry_of_it(folder):
    config = load_run_config("base.yaml", ["trainable.world_projector={}"])
    assert config.trainable[Component.WORLD_PROJECTOR].lr is None
    config = load_run_config("base.yaml", ["trainable={world_encoder: {}}", "expect_trainable=5"])
    assert list(config.trainable) == [Component.WORLD_ENCODER]


def test_another_source_drops_the_keys_of_the_former_one(write):
    config = load_run_config(write("data: {train: {source: hub, id: some/data}, num_workers: 0}"))
    assert config.data.train.source == "hub"
    assert config.data.num_workers == 0


def test_another_source_on_the_command_line_does_so_too_in_any_order(folder):
    for overrides in (["data.train.source=hub", "data.train.id=a/b"], ["data.train.id=a/b", "data.train.source=hub"]):
        assert load_run_config("base.yaml", overrides).data.train.source == "hub"


def test_the_same_source_merges(write):
    config = load_run_config(write("data: {train: {source: jsonl, max_video_frames: 5}}"))
    assert config.data.train.model_dump(exclude_unset=True) == {
        "source": "jsonl",
        "path": "train.jsonl",
        "max_video_frames": 5,
    }


class TestExpectTrainable:
    """A number that was counted for another table must not survive it."""

    def test_a_child_that_trains_other_components_restates_it(self, write, the_problem_of):
        problem = the_problem_of(write("trainable: {language_model: {}}"))
        assert (problem.source, problem.key) == ("child.yaml", "expect_trainable")
        assert "must be restated" in problem.message
        assert "1000" in problem.message
        assert "null" in (problem.hint or "")

    def test_an_override_does_so_too(self, folder, the_problem_of):
        assert the_problem_of("base.yaml", "trainable.language_model={}").source == "command line"

    @pytest.mark.parametrize("stated", ["5", "null", "1000"])
    def test_restating_it_is_enough(self, folder, stated):
        load_run_config("base.yaml", ["trainable.language_model={}", f"expect_trainable={stated}"])

    def test_a_later_layer_may_restate_it(self, write):
        path = write("trainable: {language_model: {}}")
        assert load_run_config(path, ["expect_trainable=5"]).expect_trainable == 5

    def test_other_rates_train_the_same_parameters(self, write):
        path = write("trainable: {vision_tower: {lr: 1e-5}, world_projector: {}}")
        assert load_run_config(path, ["trainable.vision_tower.lr=1e-6"]).expect_trainable == 1000

    def test_without_a_number_there_is_nothing_to_restate(self, write):
        write("expect_trainable: null", "middle.yaml")
        load_run_config(write("trainable: {language_model: {}}", extends="middle.yaml"))


class TestOverrides:
    def test_values_are_yaml(self, folder):
        config = load_run_config(
            "base.yaml",
            [
                "optimizer.lr=3e-4",
                "tracking.trackers=[wandb]",
                "deterministic=true",
                "init_from=a=b",
                "model.revision='12'",
            ],
        )
        assert config.optimizer.lr == 3e-4
        assert config.tracking.trackers == ("wandb",)
        assert config.deterministic is True
        assert config.init_from == "a=b"
        assert config.model.revision == "12"

    def test_a_section_that_no_file_states_is_made(self, folder):
        config = load_run_config("base.yaml", ["data.eval.source=jsonl", "data.eval.path=eval.jsonl"])
        assert config.data.eval is not None

    def test_a_mapping_serves_as_well(self, folder):
        assert (
            load_run_config("base.yaml", {"optimizer.lr": 1e-3, "tracking.trackers": ("wandb",)}).optimizer.lr == 1e-3
        )

    @pytest.mark.parametrize("text", ["seed", "=3", "seed=", "seed= ", "a b=3", "--seed=3", "optimizer..lr=3", ".lr=3"])
    def test_a_malformed_one_is_answered_with_the_form(self, folder, problems_of, text):
        problem = problems_of("base.yaml", text)[0]
        assert problem.message in ("malformed override", "unknown key")
        if problem.message == "malformed override":
            assert problem.hint == "write key=value, such as optimizer.lr=3e-4"

    def test_an_unknown_key_is_answered_with_the_nearest(self, folder, the_problem_of):
        problem = the_problem_of("base.yaml", "optimiser.lr=3")
        assert (problem.source, problem.key) == ("command line", "optimiser.lr")
        assert problem.hint == "did you mean 'optimizer.lr'?"

    def test_a_value_that_is_no_yaml_is_a_problem_of_its_key(self, folder, the_problem_of):
        problem = the_problem_of("base.yaml", "name=[")
        assert problem.key == "name"
        assert "not valid YAML" in problem.message

    def test_tags_and_doubled_keys_are_refused_here_too(self, folder, problems_of):
        assert "refused" in problems_of("base.yaml", "seed=!!python/name:os.system x")[0].message
        assert "twice" in problems_of("base.yaml", "optimizer={lr: 1, lr: 2}")[0].message

    def test_extends_cannot_be_overridden(self, folder, the_problem_of):
        assert "for files" in the_problem_of("base.yaml", "extends=base.yaml").message

    def test_problems_of_values_name_the_command_line(self, write, the_problem_of):
        assert the_problem_of(write("optimizer: {eps: 1}"), "optimizer.lr=-1").source == "command line"

    def test_a_text_is_one_override(self):
        layer = override_layer("seed=3", outline_of(RunConfig), "command line", Findings())
        assert layer.data == {"seed": 3}


class TestBlame:
    """Every problem names the file of the chain that stated the value."""

    def test_each_value_is_blamed_on_its_file(self, write, problems_of):
        write("optimizer: {lr: -1, eps: -1}", "middle.yaml")
        problems = problems_of(
            write("optimizer: {eps: -2}\nseed: x", extends="middle.yaml"), "optimizer.weight_decay=-1"
        )
        assert {problem.key: problem.source for problem in problems} == {
            "optimizer.lr": "middle.yaml",
            "optimizer.eps": "child.yaml",
            "seed": "child.yaml",
            "optimizer.weight_decay": "command line",
        }

    def test_the_file_that_the_user_named_comes_first(self, write, problems_of):
        write("optimizer: {lr: -1}", "middle.yaml")
        sources = [problem.source for problem in problems_of(write("model: 3", extends="middle.yaml"), "seed=x")]
        assert sources == ["child.yaml", "middle.yaml", "command line"]

    def test_a_missing_key_is_blamed_on_the_file_that_opened_the_section(self, write, the_problem_of):
        write("data: {eval: {source: hub}}", "middle.yaml")
        problem = the_problem_of(write("data: {eval: {source: hub, split: x}}", extends="middle.yaml"))
        assert (problem.source, problem.key) == ("middle.yaml", "data.eval.id")

    def test_a_missing_top_key_is_blamed_on_the_file_that_the_user_named(self, write, problems_of):
        write("seed: 1", "part.yaml", extends=None)
        assert {p.source for p in problems_of(write("name: a", extends="part.yaml"))} == {"child.yaml"}

    def test_a_contradiction_is_blamed_on_the_last_to_touch_the_section(self, folder, the_problem_of):
        problem = the_problem_of("base.yaml", "training.epochs=1")
        assert (problem.source, problem.key) == ("command line", "training")

    def test_a_replaced_section_no_longer_blames_its_former_file(self, write, the_problem_of):
        write("data: {train: {source: hub, id: 3}}", "middle.yaml")
        problem = the_problem_of(write("data: {train: {source: jsonl, path: 3}}", extends="middle.yaml"))
        assert (problem.source, problem.key) == ("child.yaml", "data.train.path")


@pytest.mark.parametrize(
    ("overrides", "lr", "weight_decay"),
    [
        (["optimizer.lr=1e-4", "optimizer.lr=2e-4"], 2e-4, None),
        (["optimizer={weight_decay: 0.1}", "optimizer.lr=2e-4"], 2e-4, 0.1),
        (["optimizer.weight_decay=0.3", "optimizer={lr: 2e-4, weight_decay: 0.1}"], 2e-4, 0.1),
    ],
)
def test_of_several_overrides_the_last_wins(folder, overrides, lr, weight_decay):
    optimizer = load_run_config("base.yaml", overrides).optimizer
    assert optimizer.lr == lr
    assert weight_decay is None or optimizer.weight_decay == weight_decay


def test_a_config_error_carries_every_problem_as_text(write):
    with pytest.raises(ConfigError) as caught:
        load_run_config(write("seed: x\noptimizer: {lr: -1}"))
    assert str(caught.value).splitlines() == [
        "child.yaml: seed: expected a whole number from 0 to 4294967295 (got 'x')",
        "child.yaml: optimizer.lr: expected a number > 0 (got -1)",
    ]
