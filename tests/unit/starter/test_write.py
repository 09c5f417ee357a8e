"""Protects `init`: its configs are right and say what they are, its examples are data, and nothing is overwritten."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers.pages import our_commands
from theworld_train.cli.app import load_command
from theworld_train.config import ConfigError, load_pipeline_config, load_run_config, load_stage_configs
from theworld_train.config.schema import RunConfig
from theworld_train.starter.write import Project, project_files, source_of, write_project

ROOT = Path(__file__).parents[3]
STAGES = ("projection", "vision", "language", "full")
ROW = {"messages": [{"role": "user", "content": "left"}, {"role": "assistant", "content": "right"}]}
LLAVA = {"id": 1, "conversations": [{"from": "human", "value": "left"}, {"from": "gpt", "value": "right"}]}


@pytest.fixture(params=[False, True], ids=["real", "tiny"])
def project(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A written project, which is the working directory."""
    made = Project(tmp_path / "mine", tiny=request.param)
    write_project(made)
    monkeypatch.chdir(made.directory)
    return made


def stages() -> dict[str, RunConfig]:
    return {stage.name: stage for stage in load_stage_configs(load_pipeline_config("configs/pipeline.yaml"))}


def test_the_pipeline_is_right_and_leads_from_stage_to_stage(project: Project):
    found = stages()
    assert tuple(found) == STAGES
    for before, after in pairwise(STAGES):
        assert found[after].init_from == found[before].output_dir == f"runs/{before}"
    assert {stage.model.world.projection for stage in found.values()} == {found["full"].model.world.projection}


def test_stages_train_what_the_shipped_ones_train(project: Project):
    shipped = ROOT / "configs" / ("quickstart" if project.tiny else "stages")
    for name, stage in stages().items():
        other = load_run_config(shipped / f"{name}.yaml")
        assert stage.trainable == other.trainable
        if project.tiny:
            assert f"| {name} | {stage.expect_trainable:,} |" in (ROOT / "docs" / "quickstart.md").read_text()
        else:
            assert stage.expect_trainable == other.expect_trainable


def test_every_config_begins_with_a_comment_that_says_what_it_is(project: Project):
    files = sorted(Path("configs").rglob("*.yaml"))
    assert len(files) == 7
    for path in files:
        assert path.read_text().startswith("# ")


def test_commands_and_files_of_the_readme_exist(project: Project):
    commands = our_commands(Path("README.md"))
    assert len(commands) >= 6
    for name, *words in commands:
        load_command(name).make_context(name, list(words))
        files = [word for word in words if word.startswith(("configs/", "data/"))]
        assert all(Path(file).exists() for file in files)
        if files and files[0].startswith("configs/stages"):
            load_run_config(files[0], [word for word in words if re.match(r"[a-z_.]+=", word)])


def test_examples_are_conversations_whose_media_are_there(project: Project):
    from theworld_train.data import open_source

    data = load_run_config("configs/stages/projection.yaml").data
    assert data.eval is not None
    for part in (data.train, data.eval):
        source = open_source(part)
        assert list(source.check()) == []
        assert len(source) == 32
        kinds = {json.loads(line)["kind"] for line in Path(part.path).read_text().splitlines()}
        assert kinds == {"direction", "colour"}
    clips = [{path.parent.name for path in Path("data/clips").rglob("*.png") if ("-eval" in str(path)) is held}
             for held in (False, True)]  # fmt: skip
    assert len(clips[0]) == len(clips[1]) == 16


def test_the_square_moves_as_the_answer_says(project: Project):
    from PIL import Image

    def corner(frame: int) -> tuple[int, int]:
        image = Image.open(f"data/clips/red-left/{frame}.png")
        found = [(x, y) for x in range(64) for y in range(64) if image.getpixel((x, y)) == (214, 40, 40)]
        assert len(found) == 16 * 16
        return min(found)

    first, last = corner(0), corner(4)
    assert last[0] - first[0] == -24
    assert last[1] == first[1]


def test_nothing_is_overwritten(project: Project):
    kept = Path("configs/pipeline.yaml")
    kept.write_text("mine")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        write_project(Project(Path(), tiny=project.tiny))
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_project_may_be_written_beside_other_files(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    write_project(Project(tmp_path, tiny=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_same_project_is_written_twice_alike(tmp_path: Path):
    assert project_files(Project(tmp_path / "a")) == project_files(Project(tmp_path / "a"))


@pytest.mark.parametrize("name", ["rows.jsonl", "odd name, {x}.jsonl"])
@pytest.mark.parametrize("inside", [True, False])
def test_own_rows_are_what_the_configs_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inside: bool
):
    target = tmp_path / "mine"
    rows = (target if inside else tmp_path) / name
    rows.parent.mkdir(exist_ok=True)
    rows.write_text(json.dumps(ROW))
    written = write_project(Project(target, tiny=True, data=rows))
    assert not any(path.startswith("data/") for path in written)
    monkeypatch.chdir(target)
    data = load_run_config("configs/stages/projection.yaml").data
    assert (data.train.source, data.eval) == ("jsonl", None)
    assert data.train.path == (name if inside else str(rows))


@pytest.mark.parametrize(
    ("name", "content", "source"),
    [
        ("a.jsonl", "\n" + json.dumps(ROW), "jsonl"),
        ("a.json", json.dumps([LLAVA, LLAVA], indent=1), "llava"),
        ("a.json", json.dumps([LLAVA | {"images": []}]), "sharegpt"),
        ("a.parquet", "anything", "parquet"),
    ],
)
def test_the_source_is_told_by_the_first_row(tmp_path: Path, name: str, content: str, source: str):
    (tmp_path / name).write_text(content)
    assert source_of(tmp_path / name) == source


@pytest.mark.parametrize("content", ["", "x", "[1, 2]", '{"text": "a"}'])
def test_rows_that_are_no_conversations_are_refused(tmp_path: Path, content: str):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match="its first row is no conversation"):
        write_project(Project(tmp_path / "mine", data=path))
    assert not (tmp_path / "mine").exists()


def test_held_out_rows_go_with_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target, rows = tmp_path / "mine", tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROW))
    with pytest.raises(ConfigError, match="--eval: goes with --data"):
        write_project(Project(target, eval_data=rows))
    with pytest.raises(ConfigError, match="--eval: no such file"):
        write_project(Project(target, data=rows, eval_data=tmp_path / "absent.jsonl"))
    write_project(Project(target, data=rows, eval_data=rows))
    monkeypatch.chdir(target)
    data = load_run_config("configs/stages/projection.yaml").data
    assert data.eval is not None
    assert data.eval.path == data.train.path == str(rows)


def test_rows_that_are_not_there_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--data: no such file \(got .*absent\.jsonl"):
        write_project(Project(tmp_path / "mine", data=tmp_path / "absent.jsonl"))
