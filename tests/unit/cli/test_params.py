"""Protects `theworld-train params`: the numbers of the shipped stages, the forms that it prints, and its errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.tiny import RESOLUTION, TinyCheckpoint

CONFIGS = Path(__file__).parents[3] / "configs"
STAGES = ("projection", "vision", "language", "full")
PATHS = [str(CONFIGS / "stages" / f"{stage}.yaml") for stage in STAGES]

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tiny_run(tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config on the tiny model, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    digits = {"source": "moving_digits", "split": "train", "samples": 8}
    config = {
        "name": "tiny",
        "output_dir": "run",
        "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": RESOLUTION}},
        "trainable": {"world_projector": {}},
        "data": {"train": digits},
        "training": {"max_steps": 1},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "tiny.yaml"


def cells(text: str) -> dict[str, list[str]]:
    """Returns the rows of a Markdown table by their first cell."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_four_stages_have_the_exact_numbers(call: Call):
    code, out, _ = call("params", *PATHS, "--json")
    assert code == 0
    found = json.loads(out)
    assert list(found) == list(STAGES)
    totals = {
        "vision_tower": 416_866_032,
        "multi_modal_projector": 2_950_272,
        "language_model": 3_880_263_168,
        "world_encoder": 53_595_872 + 1_056,
        "world_projector": 6_599_680 + (2 * 4 + 1) * 2560 + 2 * 2560,
    }
    trainable = {"projection": 6_627_840, "vision": 426_444_144, "language": 3_886_891_008, "full": 4_360_304_240}
    for stage, ledger in found.items():
        rows = {row["component"]: row for row in ledger["rows"]}
        assert {name: row["total"] for name, row in rows.items()} == totals
        assert ledger["total"] == sum(totals.values()) == 4_360_304_240
        assert ledger["trainable"] == sum(row["trainable"] for row in rows.values()) == trainable[stage]
        assert rows["world_encoder"]["parts"] == {"encoder": 53_595_872, "quant_conv": 1_056}
        assert rows["world_projector"]["parts"] == {"projection": 6_599_680, "temporal": 23_040, "boundary": 5_120}
        assert rows["language_model"]["ties"] == [["model.language_model.embed_tokens.weight", "lm_head.weight"]]
        assert rows["language_model"]["parts"]["embed_tokens"] == 262_208 * 2_560


def test_the_table_has_a_column_for_each_run(call: Call):
    code, out, _ = call("params", *PATHS, "--markdown")
    assert code == 0
    rows = cells(out)
    assert rows["component"] == ["parameters", *STAGES]
    assert rows["vision_tower"] == ["416,866,032", "frozen", "trains @ 2e-06", "frozen", "trains @ 1e-06"]
    assert rows["language_model"][1:] == ["frozen", "frozen", "trains @ 1e-05", "trains @ 5e-06"]
    assert rows["lm_head.weight"][0] == "tied"
    assert rows["total"] == ["4,360,304,240", "6,627,840", "426,444,144", "3,886,891,008", "4,360,304,240"]
    assert rows["trainable share"][1:] == ["0.15%", "9.78%", "89.14%", "100.00%"]
    assert rows["fp32 masters (GiB)"][1:] == ["0.025", "1.589", "14.480", "16.243"]
    _, plain, _ = call("params", *PATHS)
    lines = {" ".join(line.split()) for line in plain.splitlines()}
    assert "total 4,360,304,240 6,627,840 426,444,144 3,886,891,008 4,360,304,240" in lines


def test_a_table_of_many_runs_loses_no_digit(call: Call):
    _, plain, _ = call("params", *PATHS, str(CONFIGS / "stages" / "language-24gb.yaml"), *PATHS)
    lines = {" ".join(line.split()) for line in plain.splitlines()}
    first = "6,627,840 426,444,144 3,886,891,008 4,360,304,240 36,430,336"
    assert any(line.startswith(f"total 4,360,304,240 / 4,390,106,736 {first}") for line in lines)
    assert "adapter 29,802,496" in lines
    assert "…" not in plain


def test_components_of_different_size_show_both(call: Call, tiny_run: Path):
    (tiny_run.parent / "linear.yaml").write_text(
        "extends: tiny.yaml\nname: linear\nmodel: {world: {projection: linear}}"
    )
    rows = cells(call("params", "linear.yaml", "tiny.yaml", "--markdown")[1])
    assert rows["world_projector"][0] == "2,688 / 12,000"
    assert rows["vision_tower"][0] == "117,312"


def test_a_component_that_only_one_run_has_is_absent_in_the_other(call: Call, tiny_run: Path):
    (tiny_run.parent / "plain.yaml").write_text("extends: tiny.yaml\nname: plain\nmodel: {world: {enabled: false}}")
    code, out, err = call("params", "plain.yaml", "tiny.yaml", "--markdown", "trainable={vision_tower: {}}")
    assert code == 0, err
    assert cells(out)["world_projector"] == ["12,000", "absent", "frozen"]


def test_a_difference_shows_nothing_else(call: Call, tiny_run: Path):
    (tiny_run.parent / "faster.yaml").write_text("extends: tiny.yaml\nname: faster\noptimizer: {lr: 1.0e-2}")
    code, out, _ = call("params", "tiny.yaml", "faster.yaml", "--diff", "--json")
    assert code == 0
    assert json.loads(out) == {"world_projector": {"lr": [1e-4, 1e-2]}}
    _, out, _ = call("params", "tiny.yaml", "faster.yaml", "--diff", "--markdown")
    assert out.splitlines()[2:] == ["| world_projector | lr | 0.0001 | 0.01 |"]
    assert call("params", "tiny.yaml", "tiny.yaml", "--diff")[1] == "no difference\n"


def test_a_difference_of_two_stages_names_what_it_costs(call: Call):
    found = json.loads(call("params", PATHS[0], PATHS[1], "--diff", "--json")[1])
    assert set(found) == {"vision_tower", "multi_modal_projector", "world_projector"}
    assert found["vision_tower"]["trainable"] == [0, 416_866_032]
    assert found["vision_tower"]["dtype"] == ["bfloat16", "float32"]
    assert found["vision_tower"]["weight_bytes"] == [2 * 416_866_032, 0]
    assert found["vision_tower"]["master_bytes"] == [0, 4 * 416_866_032]


def test_a_checkpoint_is_counted_as_the_run_that_wrote_it(call: Call, tiny_run: Path):
    checkpoint = tiny_run.parent / "run" / "step-1"
    checkpoint.mkdir(parents=True)
    shutil.copy(tiny_run, checkpoint / "config.yaml")
    (checkpoint / "manifest.json").write_text("{}")
    of_config = call("params", "tiny.yaml", "--json")
    assert of_config[0] == 0
    assert call("params", "run", "--json") == of_config
    assert call("params", "run/step-1", "--json") == of_config


def test_a_missing_tiny_model_is_to_be_written(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("params", str(CONFIGS / "quickstart" / "projection.yaml"))
    assert (code, out) == (2, "")
    assert "model.base" in err
    assert "`theworld-train tiny runs/tiny`" in err


@pytest.mark.usefixtures("tiny_run")
def test_a_model_that_was_never_fetched_is_to_be_fetched(call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = call("params", "tiny.yaml", "model.base=someone/gemma-3-12b-it")
    assert code == 2
    assert "someone/gemma-3-12b-it" in err
    assert "theworld-train fetch" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny.yaml", "optimizer.lrr=1"], "optimizer.lrr: unknown key; did you mean 'optimizer.lr'?"),
        (["tiny.yaml", "trainable.vision_towr={}"], "did you mean 'vision_tower'?"),
        (["absent.yaml"], "absent.yaml"),
        (["empty"], "is no checkpoint"),
        (["name=x"], "at least one config"),
        (["tiny.yaml", "--diff"], "compares two runs"),
    ],
)
def test_wrong_input_is_a_users_error(call: Call, tiny_run: Path, arguments: list[str], message: str):
    (tiny_run.parent / "empty").mkdir()
    code, out, err = call("params", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_it_needs_no_weights_no_network_and_no_token(call: Call, tiny_run: Path, tiny: TinyCheckpoint, tmp_path: Path):
    for name in ("gemma", "cosmos"):
        bare = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(getattr(tiny, name), tmp_path / "bare" / name, ignore=bare)
    places: list[Any] = [f"model.base={tmp_path}/bare/gemma", f"model.world.encoder={tmp_path}/bare/cosmos"]
    assert call("params", "tiny.yaml", "--json", *places) == call("params", "tiny.yaml", "--json")
