"""Wrong inputs end with an error that names the thing and how to mend it, before any weights are read."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.cli.app import app

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart" / "projection.yaml"


@pytest.fixture
def weightless(tiny: TinyCheckpoint, tmp_path: Path) -> list[str]:
    """Overrides for a base whose weights are gone: whatever reads them fails in another way."""
    root = tmp_path / "weightless"
    shutil.copytree(tiny.gemma, root / "gemma", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(tiny.cosmos, root / "cosmos", ignore=shutil.ignore_patterns("*.safetensors"))
    return [
        f"model.base={root / 'gemma'}",
        f"model.world.encoder={root / 'cosmos'}",
        f"output_dir={tmp_path / 'run'}",
        "data.num_workers=0",
    ]


def failing(*arguments: str) -> str:
    """Runs a command that has to end with a user's error, and returns that as one line."""
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit), f"{result.output}\n{result.exception!r}"
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def error_of(arguments: list[str]) -> str:
    """Runs `train` with the quickstart's config, and returns the error as one line."""
    return failing("train", str(QUICKSTART), *arguments)


def jsonl(tmp_path: Path, *rows: dict[str, object]) -> str:
    """Writes rows to a file and returns the override that trains on it."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={{source: jsonl, path: {path}}}"


def test_unknown_key_is_answered_with_the_nearest_one(weightless: list[str]) -> None:
    error = error_of([*weightless, "optimizer.learning_rate=1e-3", "training.max_step=5"])
    assert "training.max_step" in error
    assert "max_steps" in error
    assert "optimizer.learning_rate" in error, "all problems are listed at once"


def test_misspelt_component_is_answered_with_the_nearest_one(weightless: list[str]) -> None:
    error = error_of([*weightless, "trainable.world_projektor={}"])
    assert "world_projektor" in error
    assert "did you mean 'world_projector'" in error


def test_tied_head_is_no_component(weightless: list[str]) -> None:
    error = error_of([*weightless, "trainable={lm_head: {}}", "expect_trainable=null"])
    assert "lm_head" in error
    assert "language_model" in error


def test_missing_data_file_is_named(weightless: list[str], tmp_path: Path) -> None:
    missing = tmp_path / "absent.jsonl"
    error = error_of([*weightless, f"data.train={{source: jsonl, path: {missing}}}"])
    assert "absent.jsonl" in error
    assert "no such file" in error


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [("attention_dropout", 0.1, "set attention_dropout to 0"), ("use_bidirectional_attention", True, "causal Gemma 3")],
)
def test_base_that_attends_otherwise_is_refused(
    weightless: list[str], tmp_path: Path, field: str, value: object, named: str
) -> None:
    path = tmp_path / "weightless" / "gemma" / "config.json"
    stated = json.loads(path.read_text())
    stated["text_config"][field] = value
    path.write_text(json.dumps(stated))
    error = error_of(weightless)
    assert field in error
    assert named in error


def test_kernels_are_not_compiled_without_a_compiler(weightless: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    error = error_of([*weightless, "model.kernels=compiled"])
    assert "model.kernels" in error
    assert "needs a C++ compiler" in error


def test_ligers_kernels_are_not_taken_where_they_cannot_run(
    weightless: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theworld_train.model.liger.find_spec", lambda name: None)
    error = error_of([*weightless, "model.kernels=liger", "training.loss=liger"])
    for key in ("model.kernels", "training.loss"):
        assert f"{key}: needs the package 'liger-kernel', which is not installed (got 'liger')" in error
    assert "pip install 'theworld-train[liger]'" in error


def test_missing_base_is_named(weightless: list[str]) -> None:
    error = error_of([*weightless, "model.base=runs/nowhere/gemma"])
    assert "model.base" in error
    assert "runs/nowhere/gemma" in error


def test_row_without_an_answer_names_file_and_line(weightless: list[str], tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    bad = {"messages": [{"role": "user", "content": "hello"}]}
    error = error_of([*weightless, jsonl(tmp_path, good, bad), "data.max_bad_samples=0"])
    assert "rows.jsonl:2 messages" in error
    assert "assistant" in error


def test_more_wrong_rows_than_may_be_end_the_run_before_it_begins(weightless: list[str], tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    bad = [{"messages": "none"}, {"id": "x", **good}, {"id": "x", **good}]
    error = error_of([*weightless, jsonl(tmp_path, good, *bad), "data.max_bad_samples=1"])
    assert "rows.jsonl:2 messages: messages must be a list" in error
    assert "rows.jsonl:4 id: the id is already that of" in error
    assert "data.max_bad_samples: 2 rows are wrong, more than may (got 1)" in error


def test_rows_that_are_all_wrong_are_no_data_however_many_may_be(weightless: list[str], tmp_path: Path) -> None:
    error = error_of([*weightless, jsonl(tmp_path, {"message": []}), "data.max_bad_samples=null"])
    assert "rows.jsonl:1 messages: the row has no 'messages'; did you mean 'message'?" in error


def test_no_held_out_row_may_be_wrong(weightless: list[str], tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    rows = jsonl(tmp_path, good, {"messages": "none"}).replace("data.train", "data.eval")
    assert "rows.jsonl:2 messages" in error_of([*weightless, rows])


def test_budget_too_small_for_one_image_says_what_an_image_takes(weightless: list[str]) -> None:
    error = error_of([*weightless, "data.max_sequence_length=20"])
    assert "data.max_sequence_length" in error
    assert "tokens" in error


def test_empty_trainable_table_is_refused(weightless: list[str]) -> None:
    error = error_of([*weightless, "trainable={}", "expect_trainable=null"])
    assert "trainable" in error
    assert "at least one component" in error


def test_output_directory_that_is_a_file_is_refused(weightless: list[str], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    error = error_of([*weightless, f"output_dir={tmp_path / 'taken'}"])
    assert "output_dir" in error


def test_init_from_that_is_no_checkpoint_is_refused(weightless: list[str], tmp_path: Path) -> None:
    error = error_of([*weightless, f"init_from={tmp_path}"])
    assert "is no checkpoint" in error


def test_batch_that_does_not_divide_is_refused(weightless: list[str]) -> None:
    error = error_of([*weightless, "training.global_batch_size=30", "training.micro_batch_size=4"])
    assert "global_batch_size" in error
    assert "30" in error


def test_another_number_of_trainable_parameters_is_printed(weightless: list[str]) -> None:
    error = error_of([*weightless, "expect_trainable=1"])
    assert "expect_trainable" in error
    stated = error.split("state expect_trainable: ")[1].split()[0]
    assert f"makes {stated} parameters trainable (world_projector {int(stated):,}), not 1" in error
    then = error_of([*weightless, f"expect_trainable={stated}", f"init_from={QUICKSTART.parent}"])
    assert "expect_trainable" not in then
    assert "is no checkpoint" in then


def test_missing_weights_are_a_user_error(weightless: list[str]) -> None:
    error = error_of([*weightless, "training.max_steps=1"])
    assert "model.base: its weights cannot be read as safetensors" in error
    assert "gemma" in error


@pytest.mark.parametrize("kind", ["gemma", "nothing"])
def test_world_encoder_of_another_kind_is_named(weightless: list[str], tmp_path: Path, kind: str) -> None:
    (tmp_path / "nothing").mkdir()
    encoder = tmp_path / "weightless" / "gemma" if kind == "gemma" else tmp_path / "nothing"
    error = error_of([*weightless, f"model.world.encoder={encoder}"])
    reason = "_class_name is None, expected AutoencoderKLWan" if kind == "gemma" else "vae/config.json, cannot be read"
    assert "model.world.encoder: " in error
    assert reason in error


def test_tracker_that_is_not_installed_is_refused(weightless: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("theworld_train.train.metrics.find_spec", lambda name: None)
    error = error_of([*weightless, "tracking.trackers=[wandb, tensorboard]"])
    assert "pip install 'theworld-train[wandb]'" in error
    assert "pip install 'theworld-train[tensorboard]'" in error


def test_directory_instead_of_a_data_file_is_named(weightless: list[str], tmp_path: Path) -> None:
    error = error_of([*weightless, f"data.train={{source: jsonl, path: {tmp_path}}}"])
    assert "is a directory, expected a JSONL file" in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed: expected a whole number from 0 to 4294967295"),
        ("data.train.seed=4294967296", "data.train.seed: expected a whole number from 0 to 4294967295"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas[1]: expected a number from 0 to below 1"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay: expected a number >= 0"),
        ("optimizer.eps=0", "optimizer.eps: expected a number > 0"),
        ("training.micro_batch_size=64", "training.global_batch_size: must be a multiple of"),
        ("evaluation.max_samples=0", "evaluation.max_samples: expected a whole number > 0"),
        ("data.train.questions=[]", "questions must name at least one kind"),
        ("data.train.canvas=1", "data.train.canvas: expected a whole number from 16 to 4096"),
        ("data.train.frames=21", "max_world_steps is 4"),
        ("name=a/b", "name: expected 1 to 64 letters"),
        ("name=..", "name: expected 1 to 64 letters"),
        ("model.base=", "malformed override"),
        ("model.base=''", "model.base: expected text that is not empty"),
        ("resume=nowhere", "is no checkpoint"),
    ],
)
def test_wrong_value_is_answered_before_weights_are_read(weightless: list[str], override: str, message: str) -> None:
    assert message in error_of([*weightless, override])


# -- asking and measuring a checkpoint ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one step by whether they have a world path; their training file is gone."""
    root = tmp_path_factory.mktemp("trained")
    row = {"messages": [{"role": "user", "content": "left"}, {"role": "assistant", "content": "right"}]}
    runs = {}
    for name, extra in (("world", []), ("plain", ["model.world.enabled=false"])):
        data = root / f"{name}.jsonl"
        data.write_text(json.dumps(row) + "\n")
        arguments = [
            f"output_dir={root / name}",
            f"model.base={tiny.gemma}",
            f"model.world.encoder={tiny.cosmos}",
            "trainable={language_model: {}}",
            "expect_trainable=null",
            f"data.train={{source: jsonl, path: {data}}}",
            "data.eval.samples=4",
            "data.num_workers=0",
            "training.max_steps=1",
            "training.global_batch_size=1",
            "training.micro_batch_size=1",
            "training.verify_freezing=false",
            "schedule.warmup_steps=0",
        ]
        result = CliRunner().invoke(app, ["train", str(QUICKSTART), *arguments, *extra])
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
        data.unlink()
        runs[name] = root / name
    return runs


@pytest.mark.parametrize(
    ("run", "arguments", "message"),
    [
        ("world", ["--max-frames", "33"], "takes at most 17 frames, 1 + 4 x its max_world_steps of 4 (got 33)"),
        ("world", ["--max-frames", "4"], "must be 1 + 4k"),
        ("world", ["--image", __file__], "not an image"),
        ("world", ["--image", "nowhere.png"], "nowhere.png: no such file"),
        ("world", ["--prompt", " "], "--prompt: the question is empty"),
        ("world", ["--prompt", "a <start_of_image>"], "reserved token"),
        ("plain", ["--world"], "the model has no world path"),
    ],
)
def test_generate_names_what_is_wrong(trained: dict[str, Path], run: str, arguments: list[str], message: str) -> None:
    assert message in failing("generate", str(trained[run]), "--prompt", "left", *arguments)


def test_generate_refuses_a_directory_of_another_kind(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    assert "is no checkpoint" in failing("generate", str(tmp_path), "--prompt", "left")
    vae = str(Path(tiny.cosmos) / "vae")
    assert "expected 'theworld' or 'gemma3'" in failing("generate", vae, "--prompt", "left")


def test_generate_names_damage(trained: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(trained["world"] / "step-1", tmp_path / "step-1")
    (tmp_path / "step-1" / "world_projector.safetensors").unlink()
    assert "world_projector.safetensors" in failing("generate", str(tmp_path), "--prompt", "left")
    (tmp_path / "step-1" / "config.json").write_text("{")
    assert "config.json" in failing("generate", str(tmp_path / "step-1"), "--prompt", "left")


@pytest.mark.parametrize(("run", "option"), [("plain", []), ("plain", ["--no-world"]), ("world", ["--no-world"])])
def test_generate_answers_without_world_tokens(
    trained: dict[str, Path], tmp_path: Path, run: str, option: list[str]
) -> None:
    for number in range(33):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number:02}.png")
    arguments = ["--prompt", "left", "--video", str(tmp_path), "--max-frames", "33", "--max-new-tokens", "1", *option]
    result = CliRunner().invoke(app, ["generate", str(trained[run]), *arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ablation", "as_trainde"], "did you mean 'as_trained'?"),
        (["--json", "nowhere/x.json"], "the directory 'nowhere' does not exist"),
        (["--json", "."], "is a directory, expected a file to write"),
        (["data.eval.sample=1"], "did you mean 'data.eval.samples'?"),
        (["data.eval=null"], "the run has no held-out split"),
        (["data.eval={source: jsonl, path: nowhere.jsonl}"], "nowhere.jsonl"),
        (["another"], "evaluate takes one checkpoint, got 2"),
    ],
)
def test_evaluate_names_what_is_wrong(trained: dict[str, Path], arguments: list[str], message: str) -> None:
    assert message in failing("evaluate", str(trained["world"]), *arguments)


def test_evaluate_needs_the_held_out_samples_alone(trained: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ["--ablation", "as_trained", "--samples", "2", "--json", str(file)]
    result = CliRunner().invoke(app, ["evaluate", str(trained["world"]), "data.eval.canvas=32", *arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    measured = json.loads(file.read_text())["ablations"]["as_trained"]
    assert measured["total"]["samples"] == 2
    assert measured["dropped"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "nothing else is left behind"


def test_evaluate_tells_what_it_had_to_drop(trained: dict[str, Path], tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "right"}
    good = {"messages": [{"role": "user", "content": "left"}, answer]}
    image = {"role": "user", "content": [{"type": "image", "path": "damaged.png"}, {"type": "text", "text": "left"}]}
    (tmp_path / "damaged.png").write_text("no image")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (good, {"messages": [image, answer]}))
    )
    source = f"data.eval={{source: jsonl, path: {tmp_path / 'rows.jsonl'}}}"
    arguments = ["--ablation", "as_trained", "--json", str(tmp_path / "results.json")]
    result = CliRunner().invoke(app, ["evaluate", str(trained["world"]), source, *arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    measured = json.loads((tmp_path / "results.json").read_text())["ablations"]["as_trained"]
    assert (measured["kinds"]["all"]["samples"], measured["dropped"]) == (1, 1)
    assert "dropped" in result.output


def test_metrics_that_do_not_fit_the_held_out_samples_are_refused(trained: dict[str, Path]) -> None:
    kinds = "{digits: numeric, digit: numeric, direction: {metric: choice, choices: [north, south]}}"
    arguments = ["evaluate", str(trained["world"]), "evaluation.max_new_tokens=2", f"evaluation.metrics={kinds}"]
    said = failing(*arguments)
    assert "evaluation.metrics.digits: no held-out sample is of this kind; did you mean 'digit'?" in said
    assert "evaluation.metrics.direction" in said
    assert "names none, or several, of the choices north, south" in said
    assert "evaluation.metrics.digit:" not in said
    assert "metrics are for generated answers: set max_new_tokens too" in failing(*arguments[:2], *arguments[3:])
    wrong = "evaluation.metrics={digit: {metric: exact, tolerance: 1}, direction: {metric: choice}, other: exakt}"
    said = failing(*arguments[:3], wrong)
    assert "tolerance and relative_tolerance belong to the metric numeric" in said
    assert "choices are needed by the metric choice, and by it alone" in said
    assert "did you mean 'exact'?" in said


def test_only_the_main_rank_prints_and_writes(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theworld_train.cli.ranks.is_main_rank", lambda: False)
    arguments = ["--ablation", "as_trained", "--json", str(tmp_path / "results.json")]
    result = CliRunner().invoke(app, ["evaluate", str(trained["world"]), *arguments])
    assert (result.exit_code, result.stdout) == (0, "")
    assert not list(tmp_path.iterdir())


def test_run_and_train_say_which_of_them_a_file_is_for(tmp_path: Path) -> None:
    assert "theworld-train train" in failing("run", str(QUICKSTART))
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(f"name: p\noutput_dir: o\nlauncher: [nosuchprogram]\nstages: [{{config: {QUICKSTART}}}]\n")
    assert "theworld-train run" in failing("train", str(pipeline))
    assert "launcher: no such program (got 'nosuchprogram')" in failing("run", str(pipeline))


def test_tiny_model_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert "cannot be written to" in failing("tiny", str(tmp_path / "taken" / "tiny"))
    assert "taken" in failing("tiny", str(tmp_path / "taken"))


LORA = ["expect_trainable=null", "trainable={language_model: {adapter: lora}}"]


def test_layers_that_no_adapter_fits_are_answered_with_the_nearest_name(weightless: list[str]) -> None:
    error = error_of([*weightless, *LORA, "trainable.language_model.target_modules=[qproj]"])
    assert "trainable.language_model.target_modules: names no linear layer of the component (got 'qproj')" in error
    assert "did you mean 'q_proj'?" in error


def test_packages_that_are_not_installed_are_named(weightless: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    error = error_of([*weightless, *LORA])
    assert "trainable.language_model: needs the package 'peft'" in error
    assert "pip install 'theworld-train[adapters]'" in error
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    error = error_of([*weightless, "optimizer.name=adamw_8bit"])
    assert "optimizer.name: needs the package 'bitsandbytes'" in error
    assert "pip install 'theworld-train[adapters]'" in error
