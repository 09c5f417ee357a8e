"""Protects the words of errors: plain, all at once, at the right dotted key, with the nearest known name."""

from __future__ import annotations

import pytest

from theworld_train.config import COMPONENT_HINTS, ConfigError, load_pipeline_config, load_run_config

SOURCES = "jsonl, parquet, llava, sharegpt, captions, vsr, spatialrgpt, webdataset, clips, hub, moving_digits"
KEYS_OF_JSONL = "source, path, media_root, max_video_frames, present, window_s, sample_fps, directory_fps"


@pytest.mark.parametrize(
    ("text", "key", "message", "hint"),
    [
        ("seed: 5.0", "seed", "expected a whole number from 0 to 4294967295", "write 5"),
        ("seed: true", "seed", "expected a whole number from 0 to 4294967295", None),
        ("seed: '5'", "seed", "expected a whole number from 0 to 4294967295", "write it without quotes"),
        ("seed: 010", "seed", "expected a whole number from 0 to 4294967295", "write it without leading zeros"),
        ("seed: [1]", "seed", "expected a whole number from 0 to 4294967295", None),
        ("seed: -1", "seed", "expected a whole number from 0 to 4294967295", None),
        ("seed: 4294967296", "seed", "expected a whole number from 0 to 4294967295", None),
        ("optimizer: {lr: 0}", "optimizer.lr", "expected a number > 0", None),
        ("optimizer: {lr: .nan}", "optimizer.lr", "expected a number > 0", None),
        ("optimizer: {lr: .inf}", "optimizer.lr", "expected a number > 0", None),
        ("optimizer: {lr: '3e-4'}", "optimizer.lr", "expected a number > 0", "write it without quotes"),
        ("optimizer: {lr: true}", "optimizer.lr", "expected a number > 0", None),
        ("optimizer: {weight_decay: -1}", "optimizer.weight_decay", "expected a number >= 0", None),
        ("schedule: {min_lr_ratio: 2}", "schedule.min_lr_ratio", "expected a number from 0 to 1", None),
        ("schedule: {min_lr_ratio: .nan}", "schedule.min_lr_ratio", "expected a number from 0 to 1", None),
        (
            "optimizer: {betas: [0.9]}",
            "optimizer.betas",
            "expected a list of 2 values, each a number from 0 to below 1",
            None,
        ),
        (
            "optimizer: {betas: [0.9, 0.9, 0.9]}",
            "optimizer.betas",
            "expected a list of 2 values, each a number from 0 to below 1",
            None,
        ),
        (
            "optimizer: {betas: []}",
            "optimizer.betas",
            "expected a list of 2 values, each a number from 0 to below 1",
            None,
        ),
        ("optimizer: {betas: [0.9, 2]}", "optimizer.betas[1]", "expected a number from 0 to below 1", None),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas[1]", "expected a number from 0 to below 1", None),
        ("optimizer: {betas: [-0.1, 0.9]}", "optimizer.betas[0]", "expected a number from 0 to below 1", None),
        ("deterministic: yes", "deterministic", "expected true or false", "write true"),
        ("deterministic: 0", "deterministic", "expected true or false", "write false"),
        ("deterministic: 'true'", "deterministic", "expected true or false", "write it without quotes"),
        (
            "name: a b",
            "name",
            "expected 1 to 64 letters, digits, dots, underscores and hyphens, with no dot at the front",
            None,
        ),
        (
            "name: ..",
            "name",
            "expected 1 to 64 letters, digits, dots, underscores and hyphens, with no dot at the front",
            None,
        ),
        ("model: {base: ''}", "model.base", "expected text that is not empty", None),
        (
            "data: {eval: {source: moving_digits, split: eval, samples: 3, canvas: 1}}",
            "data.eval.canvas",
            "expected a whole number from 16 to 4096",
            None,
        ),
        ("output_dir: ''", "output_dir", "expected text that is not empty", None),
        ("model: {revision: 123}", "model.revision", "expected text, or null", "put it in quotes to make it text"),
        ("precision: bfloat16", "precision", "expected one of bf16, fp32, bf16_pure", "did you mean 'bf16'?"),
        ("precision: BF16", "precision", "expected one of bf16, fp32, bf16_pure", "did you mean 'bf16'?"),
        ("precision: int4", "precision", "expected one of bf16, fp32, bf16_pure", None),
        (
            "tracking: {trackers: wandb}",
            "tracking.trackers",
            "expected a list of values, each one of mlflow, tensorboard, trackio, wandb",
            "write [wandb]",
        ),
        (
            "tracking: {trackers: [wandb, tensorbord]}",
            "tracking.trackers[1]",
            "expected one of mlflow, tensorboard, trackio, wandb",
            "did you mean 'tensorboard'?",
        ),
        (
            "schedule: cosine",
            "schedule",
            "expected a mapping with keys such as kind, warmup_steps, min_lr_ratio",
            None,
        ),
        (
            "evaluation:",
            "evaluation",
            "expected a mapping with keys such as every_steps, max_samples, micro_batch_size, not null",
            "write {} for the defaults",
        ),
        (
            "data: {train: train.jsonl}",
            "data.train",
            f"expected a mapping whose 'source' is one of {SOURCES}, mixture",
            None,
        ),
        (
            "data: {train: {source: jsnl}}",
            "data.train.source",
            f"expected one of {SOURCES}, mixture",
            "did you mean 'jsonl'?",
        ),
        (
            "data: {eval: {path: x}}",
            "data.eval.source",
            f"is required but not stated, expected one of {SOURCES}",
            None,
        ),
        (
            "data: {eval: {source: jsonl}}",
            "data.eval.path",
            "is required but not stated, expected text that is not empty",
            None,
        ),
        (
            "data: {eval: {source: vsr, path: x, question: 'True or false?'}}",
            "data.eval.question",
            "expected a text that holds {caption}",
            None,
        ),
        (
            "data: {eval: {source: clips, path: x, questions: []}}",
            "data.eval.questions",
            "expected a list that is not empty, of values, each text that is not empty",
            None,
        ),
        (
            "data: {eval: {source: jsonl, path: x, max_video_frames: 4}}",
            "data.eval",
            "max_video_frames must be 1 + 4k, as the VAE compresses time by 4, got 4",
            None,
        ),
        (
            "trainable: {language_model: {r: 8, alpha: 16}}\nexpect_trainable: 1",
            "trainable.language_model",
            "r, alpha describe an adapter: set adapter: lora too",
            None,
        ),
        (
            "trainable: {world_encoder: {adapter: lora}}\nexpect_trainable: 1",
            None,
            "world_encoder takes no adapter, only language_model and vision_tower do: train it whole",
            None,
        ),
        (
            "trainable: {language_model: {adapter: lora, r: 0}}\nexpect_trainable: 1",
            "trainable.language_model.r",
            "expected a whole number > 0, or null",
            None,
        ),
        (
            "trainable: {language_model: {adapter: lora, dropout: 1}}\nexpect_trainable: 1",
            "trainable.language_model.dropout",
            "expected a number from 0 to below 1, or null",
            None,
        ),
        (
            "optimizer: {name: adam8bit}",
            "optimizer.name",
            "expected one of adamw, adamw_8bit",
            "did you mean 'adamw_8bit'?",
        ),
        (
            "training: {gradient_checkpointing: true}",
            "training.gradient_checkpointing",
            "expected none, full or selective, or a mapping of towers to them such as {vision_tower: none}; "
            "true is full now",
            None,
        ),
        (
            "training: {gradient_checkpointing: {vision_tower: some}}",
            "training.gradient_checkpointing.vision_tower",
            "expected one of none, full, selective",
            None,
        ),
        (
            "training: {activation_offload: true, gradient_checkpointing: none}",
            None,
            "training.activation_offload moves what checkpointed layers start from, and "
            "training.gradient_checkpointing is none for all towers that a gradient passes",
            None,
        ),
        (
            "training: {gradient_checkpointing: selective}\nruntime: {strategy: zero3}",
            None,
            "gradient_checkpointing: selective needs another strategy than zero3, which gathers weights inside of the "
            "layers that are computed again; fsdp2 shards as much",
            None,
        ),
        (
            "deterministic: true\nmodel: {kernels: compiled}",
            None,
            "deterministic: true needs model.kernels: lean or plain; what a compiler makes may differ",
            None,
        ),
        (
            "deterministic: true\ntraining: {loss: liger}",
            None,
            "deterministic: true needs training.loss: chunked; what a compiler makes may differ",
            None,
        ),
        (
            "training: {loss: liger}\nruntime: {strategy: zero3}",
            None,
            "training.loss: liger needs the head's weight whole on every rank, and runtime.strategy: zero3 divides it; "
            "use ddp, zero1 or zero2, or training.loss: chunked",
            None,
        ),
        (
            "model: {attention: sdpa, last_layers: needed}",
            None,
            "model.last_layers: needed takes model.attention: auto, banded or flex; got sdpa",
            None,
        ),
        (
            "model: {last_layers: needed}\ntraining: {loss: reference_4_56}",
            None,
            "model.last_layers: needed takes training.loss: chunked or liger; got reference_4_56",
            None,
        ),
        (
            "model: {attention: sdpa}\ntraining: {batching: packed}",
            None,
            "training.batching: packed needs model.attention: auto, banded or flex; sdpa would let the samples of a "
            "row see each other",
            None,
        ),
        (
            "training: {batching: packed}",
            None,
            "training.batching: packed needs data.max_sequence_length, the length of a row",
            None,
        ),
        (
            "data: {max_sequence_length: 512}\ntraining: {batching: packed, loss: reference_4_56}",
            None,
            "training.loss: reference_4_56 knows one sample a row; set training.batching: padded",
            None,
        ),
        ("training: {epochs: 1}", "training", "exactly one of max_steps and epochs must be set", None),
    ],
)
def test_a_wrong_value_is_answered_in_plain_words(write, the_problem_of, text, key, message, hint):
    problem = the_problem_of(write(text))
    assert (problem.key, problem.message, problem.hint) == (key, message, hint)
    assert problem.source == "child.yaml"


def test_a_contradiction_of_the_whole_run_has_no_key(write, the_problem_of):
    problem = the_problem_of(write("model: {world: {enabled: false}}"))
    assert problem.key is None
    assert "world_projector cannot train while model.world.enabled is false" in problem.message


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("optimizer: {learn_rate: 1}", "optimizer.learn_rate", "known: name, lr, weight_decay, betas, eps"),
        ("optimizer: {weight_decai: 1}", "optimizer.weight_decai", "did you mean 'optimizer.weight_decay'?"),
        ("trainabel: {}", "trainabel", "did you mean 'trainable'?"),
        ("max_steps: 3", "max_steps", "did you mean 'training.max_steps'?"),
        ("lr: 3", "lr", "did you mean 'optimizer.lr'?"),
        ("learning_rate: 3", "learning_rate", "the key is 'optimizer.lr'"),
        ("stages: []", "stages", "a file with stages is a pipeline, not a run config"),
        ("optimizer.lr: 3", "optimizer.lr", "dotted keys are for the command line; in a file write nested mappings"),
        ("data: {train: {pth: x}}", "data.train.pth", "did you mean 'data.train.path'?"),
        ("data: {train: {jsonl: x}}", "data.train.jsonl", f"known: {KEYS_OF_JSONL}"),
        ("zzz: 1", "zzz", None),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(write, the_problem_of, text, key, hint):
    problem = the_problem_of(write(text))
    assert (problem.key, problem.message, problem.hint) == (key, "unknown key", hint)


def test_a_key_of_another_source_names_the_source_that_does_not_know_it(write, the_problem_of):
    problem = the_problem_of(write("data: {train: {samples: 3}}"))
    assert problem.key == "data.train.samples"
    assert problem.message == "unknown key when source is 'jsonl'"


@pytest.mark.parametrize("name", sorted(COMPONENT_HINTS))
def test_names_from_elsewhere_are_answered_with_the_component(write, problems_of, name):
    problem = problems_of(write(f"trainable: {{{name}: {{x: 1}}}}\nexpect_trainable: null"))[0]
    assert (problem.key, problem.message) == (f"trainable.{name}", "unknown component")
    assert problem.hint == COMPONENT_HINTS[name]


def test_lm_head_is_refused_on_the_command_line_too(folder, the_problem_of):
    problem = the_problem_of("base.yaml", "trainable.lm_head.lr=1e-5")
    assert "tied to the token embedding" in (problem.hint or "")


def test_an_unknown_component_is_one_problem_whatever_it_holds(write, the_problem_of):
    problem = the_problem_of(write("trainable: {vision_towr: {lr: -1, zzz: 1}}\nexpect_trainable: null"))
    assert problem.hint == "did you mean 'vision_tower'?"


def test_a_component_without_settings_is_told_how_to_write_them(write, the_problem_of):
    problem = the_problem_of(write("trainable:\n  vision_tower:\nexpect_trainable: 3"))
    assert problem.key == "trainable.vision_tower"
    assert problem.hint == "write {} for the defaults"


def test_a_list_of_components_is_told_to_be_a_mapping(write, the_problem_of):
    problem = the_problem_of(write("trainable: [vision_tower]\nexpect_trainable: 3"))
    assert problem.message.startswith("expected a mapping whose keys are among vision_tower, ")


def test_an_empty_table_is_refused(write, the_problem_of):
    assert "the trainable table is empty" in the_problem_of(write("trainable: {}\nexpect_trainable: null")).message


def test_an_empty_table_on_the_command_line_is_not_the_files(folder, the_problem_of):
    problem = the_problem_of("base.yaml", "trainable={}", "expect_trainable=null")
    assert (problem.source, problem.key) == ("command line", "trainable")
    assert "the trainable table is empty" in problem.message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epochs=2", "exactly one of max_steps and epochs"),
        ("model.world.enabled=false", "cannot train while model.world.enabled is false"),
        ("optimizer.name=adamw_8bit", "needs runtime.strategy ddp"),
        ("runtime.hybrid=true", "hybrid sharding needs strategy fsdp2"),
    ],
)
def test_a_contradiction_is_blamed_on_the_last_that_had_a_part_in_it(write, the_problem_of, override, words):
    """What the file states is right by itself, and what the override changes elsewhere is not to blame."""
    path = write("runtime: {strategy: zero2}" if "hybrid" not in override else "seed: 1")
    problem = the_problem_of(path, override, "data.num_workers=0")
    assert words in problem.message
    assert problem.source == "command line"


def test_a_contradiction_of_a_file_stays_the_files(write, the_problem_of):
    path = write("training: {epochs: 2}")
    assert the_problem_of(path, "training.global_batch_size=4").source == path


def test_all_problems_come_at_once(write, problems_of):
    path = write(
        "seed: x\nzzz: 1\nname: a\nname: b\ntrainable: {lm_head: {}}\noptimizer: {lr: -1, betas: [0.9]}\n"
        "data: {train: {source: hub, pth: 1}}\nmodel: !env X\nresume: 3\n"
    )
    keys = {problem.key for problem in problems_of(path, "bad", "sead=1")}
    assert keys == {
        "seed",
        "zzz",
        "name",
        "trainable.lm_head",
        "expect_trainable",
        "optimizer.lr",
        "optimizer.betas",
        "data.train.id",
        "data.train.pth",
        "model",
        "resume",
        "sead",
        None,
    }


def test_what_is_refused_already_is_not_judged_again(write, the_problem_of):
    assert "tag" in the_problem_of(write("optimizer: !custom {lr: -1}")).message


def test_long_values_are_cut(write, the_problem_of):
    problem = the_problem_of(write(f"seed: {'x' * 500}"))
    assert len(str(problem)) < 200


def test_a_file_without_any_needed_key_names_them_all(write, problems_of):
    problems = problems_of(write("seed: 1", extends=None))
    assert [problem.key for problem in problems] == ["name", "output_dir", "trainable", "data", "training"]


def test_a_pipeline_without_stages_is_refused(folder):
    (folder / "p.yaml").write_text("name: p\noutput_dir: o\nstages: []\n")
    with pytest.raises(ConfigError, match=r"p\.yaml: stages: expected a list that is not empty"):
        load_pipeline_config("p.yaml")


def test_a_pipeline_stage_is_named_by_its_place(folder):
    (folder / "p.yaml").write_text("name: p\noutput_dir: o\nstages: [{config: a}, {confg: b}, 3]\n")
    with pytest.raises(ConfigError) as caught:
        load_pipeline_config("p.yaml")
    assert [problem.key for problem in caught.value.problems] == ["stages[1].config", "stages[1].confg", "stages[2]"]


@pytest.mark.parametrize(
    ("training", "key", "said"),
    [
        ("stop_when: {threshold: {metric: eval/los, at_most: 1}}", "threshold.metric", "did you mean 'eval/loss'?"),
        ("stop_when: {threshold: {metric: train/loss}}", "threshold", "exactly one of at_least and at_most"),
        (
            "advance_when: {plateau: {metric: train/loss, mode: min, patience: 0}}",
            "plateau.patience",
            "a whole number > 0",
        ),
        ("advance_when: {platoe: {}}", "advance_when.platoe", "did you mean"),
        ("advance_when: {steps: 10}", "training", "advance_when.steps: 10 can never end a run of max_steps: 10"),
        ("stop_when: {threshold: {metric: eval/loss, at_most: 1}}", None, "there is no data.eval to measure it on"),
    ],
)
def test_a_gate_that_cannot_work_is_refused(write, the_problem_of, training, key, said):
    problem = the_problem_of(write(f"training: {{max_steps: 10, {training}}}"))
    assert (problem.key or "").endswith(key or "")
    assert said in str(problem)


def test_a_gate_that_is_measured_at_the_end_alone_cannot_end_a_run(write, the_problem_of):
    data = "data: {train: {source: jsonl, path: a}, eval: {source: jsonl, path: b}}\n"
    gate = "training: {max_steps: 9, advance_when: {threshold: {metric: eval/loss, at_most: 1}}}"
    assert "measured at the end alone: set evaluation.every_steps" in str(the_problem_of(write(data + gate)))
    load_run_config(write(data + gate.replace("advance_when", "stop_when")))


@pytest.mark.parametrize("metric", ["eval/exact", "eval/normalized/digit", "eval/correct"])
def test_a_gate_that_reads_answers_needs_them_generated(write, the_problem_of, metric):
    data = "data: {train: {source: jsonl, path: a}, eval: {source: jsonl, path: b}}\n"
    gate = f"training: {{max_steps: 9, stop_when: {{threshold: {{metric: {metric}, at_least: 1}}}}}}\n"
    said = f"stop_when.threshold reads {metric}, which is of generated answers: set evaluation.max_new_tokens"
    assert said in str(the_problem_of(write(data + gate)))
    load_run_config(write(data + gate + "evaluation: {max_new_tokens: 4}"))
    load_run_config(write(data + gate.replace(metric, "eval/predicted/digit")))


def test_a_gate_of_a_stage_is_stated_once(folder):
    stage = "{config: a, advance_when: {steps: 3}, overrides: {training.advance_when.tokens: 5}}"
    (folder / "p.yaml").write_text(f"name: p\noutput_dir: o\nstages: [{stage}]\n")
    with pytest.raises(ConfigError, match=r"advance_when is stated twice, as advance_when and in overrides"):
        load_pipeline_config("p.yaml")


def test_no_pydantic_words_reach_the_user(write):
    with pytest.raises(ConfigError) as caught:
        load_run_config(write("seed: x\ndata: {train: {source: x}}\nzzz: 1\ntraining: {max_steps: null}\nname:"))
    text = str(caught.value)
    assert not any(word in text for word in ("Input should", "Value error", "pydantic", "type=", "discriminator"))
