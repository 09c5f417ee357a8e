"""What a run records of itself and sends to trackers: once, under one id, and without a secret."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.helpers.tiny import RESOLUTION, TinyCheckpoint
from theworld_train.accounting.gpus import Range
from theworld_train.assemble import run
from theworld_train.assemble.record import git_state
from theworld_train.config import parse_run_config
from theworld_train.config.schema import RunConfig
from theworld_train.train.metrics import Forecast, read_metrics

SECRETS = {
    "WANDB_API_KEY": "canary-0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_canarycanarycanary",
    "MLFLOW_TRACKING_PASSWORD": "canary-password",
    "AWS_SECRET_ACCESS_KEY": "canary-of-the-cloud",
}
#: Those that decide where trackers write.
ADDRESSES = (
    "MLFLOW_TRACKING_URI",
    "TRACKIO_DIR",
    "TRACKIO_SPACE_ID",
    "TRACKIO_SERVER_URL",
    "WANDB_MODE",
    "WANDB_RUN_ID",
)
TRACKERS = [name for name in ("tensorboard", "wandb", "mlflow", "trackio") if find_spec(name)]
#: Steps that are done at the end of each launch; the rate is told of those after the first two.
FIRST, LAST = 2, 6
PLAN = Forecast(2**30, Range(best=0.1, expected=0.2, worst=0.4))


def configured(tiny: TinyCheckpoint, directory: Path, steps: int) -> RunConfig:
    digits = {"source": "moving_digits", "samples": 16}
    return parse_run_config(
        {
            "name": "tracked",
            "output_dir": str(directory),
            "precision": "fp32",
            "resume": "latest",
            "allow_changed": ["training.max_steps"],
            "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": RESOLUTION}},
            "trainable": {"world_projector": {}, "multi_modal_projector": {}},
            "data": {"train": digits | {"split": "train"}, "eval": digits | {"split": "eval"}, "num_workers": 0},
            "training": {"max_steps": steps, "global_batch_size": 4, "micro_batch_size": 4},
            "evaluation": {"max_samples": 4},
            "tracking": {"trackers": TRACKERS, "project": "protected"},
        }
    )


@dataclass(frozen=True)
class Tracked:
    directory: Path
    config: RunConfig
    first_record: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.directory / "run.json").read_text())

    def rows(self, *events: str) -> list[dict[str, Any]]:
        return read_metrics(self.directory / "metrics.jsonl", *events)


@pytest.fixture(scope="module")
def tracked(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    """A run that was launched twice, with secrets in its environment and every tracker that is installed."""
    directory = tmp_path_factory.mktemp("tracked") / "run"
    before = dict(os.environ)
    for name in ADDRESSES:
        os.environ.pop(name, None)
    os.environ.update(SECRETS)
    try:
        config = configured(tiny, directory, FIRST)
        run.train(config, Console(file=io.StringIO()))
        first = json.loads((directory / "run.json").read_text())
        config = configured(tiny, directory, LAST)
        run.train(config, Console(file=io.StringIO()), lambda _config, _taken: PLAN)
        yield Tracked(directory, config, first)
    finally:
        os.environ.clear()
        os.environ.update(before)


def scalars(rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Returns the metrics of each step, as trackers get them."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        numbers = {key: value for key, value in row.items() if "/" in key}
        if row["event"] == "resources":
            numbers.pop("time/step_s", None)  # it is there already, of each step
        found.setdefault(row["step"], {}).update(numbers)
    return found


# -- run.json --------------------------------------------------------------------------------------------------------


def test_a_run_records_itself_once_and_keeps_its_id(tracked: Tracked):
    record, first = tracked.record, tracked.first_record
    assert (record["format"], record["name"], record["id"]) == (1, "tracked", first["id"])
    assert record["trackers"] == first["trackers"]
    assert set(record["trackers"]) == set(TRACKERS)
    assert [launch["step"] for launch in record["launches"]] == [0, FIRST]
    assert record["launches"][0] == first["launches"][0]
    assert record["config"] == tracked.config.model_dump(mode="json")
    assert record["ledger"]["trainable"] == sum(row["trainable"] for row in record["ledger"]["rows"]) > 0
    assert first["plan"] is None
    assert record["plan"] == {"peak_bytes": 2**30, "step_s": {"best": 0.1, "expected": 0.2, "worst": 0.4}}
    launch = record["launches"][-1]
    assert {"python", "theworld-train", "torch", "transformers", "accelerate"} <= set(launch["versions"])
    assert launch["hardware"]["ranks"] == launch["hardware"]["nodes"] == 1
    assert launch["hardware"]["memory_bytes"] > 2**30
    assert launch["git"] == git_state(Path.cwd())
    assert socket.gethostname() not in (tracked.directory / "run.json").read_text()


def test_git_state_is_of_tracked_files_and_none_outside_of_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import subprocess

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "init.defaultBranch=trunk"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    assert git_state(tmp_path) is None, "without a commit there is nothing to go back to"
    (tmp_path / "a.yaml").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    clean = {"commit": git("rev-parse", "HEAD"), "branch": "trunk", "dirty": False}
    (tmp_path / "not-tracked").write_text("2")
    assert git_state(tmp_path) == clean
    (tmp_path / "a.yaml").write_text("3")
    assert git_state(tmp_path) == clean | {"dirty": True}
    git("checkout", "--detach")
    assert git_state(tmp_path) == clean | {"branch": None, "dirty": True}


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_named_after_one_scheme(tracked: Tracked):
    """`group/quantity[/part]`, and norms of components make up that of the whole gradient."""
    (row, *_) = rows = tracked.rows("train")
    assert len(rows) == LAST
    names = {name for each in tracked.rows("train", "eval", "resources") for name in each if "/" in name}
    groups = {"train", "lr", "time", "eval", "memory"}
    assert {name.split("/")[0] for name in names} == groups
    assert all(2 <= len(name.split("/")) <= 3 for name in names)
    for name in ("train/grad_norm", "train/weight_norm", "lr"):
        parts = {key.removeprefix(f"{name}/") for key in row if key.startswith(f"{name}/")}
        assert parts == {"world_projector", "multi_modal_projector"}, name
    parts = [row[f"train/grad_norm/{name}"] for name in ("world_projector", "multi_modal_projector")]
    assert math.hypot(*parts) == pytest.approx(row["train/grad_norm"], rel=1e-5)
    assert row["time/tokens_per_s"] == pytest.approx(row["train/tokens"] / row["time/step_s"])


def test_weight_norms_are_those_of_the_saved_weights(tracked: Tracked):
    from safetensors.torch import load_file

    saved = load_file(tracked.directory / f"step-{LAST}" / "multi_modal_projector.safetensors")
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in saved.values()))
    assert tracked.rows("train")[-1]["train/weight_norm/multi_modal_projector"] == pytest.approx(norm, rel=1e-6)


# -- trackers --------------------------------------------------------------------------------------------------------


def wandb_records(path: Path) -> Iterator[Any]:
    """Yields what an offline run's file holds: LevelDB's log format behind a header, a record's parts in its blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, head = 32768, 7
    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + head <= len(data):
        if block - place % block < head:
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + head])
        parts += data[place + head : place + head + length]
        place += head + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.skipif("wandb" not in TRACKERS, reason="needs wandb")
def test_wandb_offline_holds_what_a_sync_would_send(tracked: Tracked):
    own = tracked.record["trackers"]["wandb"]
    assert own == tracked.record["id"]
    launches = sorted((tracked.directory / "wandb").glob("offline-run-*"))
    assert len(launches) == 2
    history: dict[int, dict[str, float]] = {}
    for launch, steps in zip(launches, (FIRST, LAST), strict=True):
        records = list(wandb_records(launch / f"run-{own}.wandb"))
        (begun,) = [record.run for record in records if record.HasField("run")]
        assert (begun.run_id, begun.project, begun.display_name) == (own, "protected", "tracked")
        config = {item.key: json.loads(item.value_json) for item in begun.config.update}
        assert config["config.training.max_steps"] == steps
        assert config["ledger.world_projector.trainable"] > 0
        assert "versions.torch" in config
        assert "hardware.device" in config
        assert any(record.HasField("exit") and record.exit.exit_code == 0 for record in records)
        for record in records:
            if record.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = int(items.pop("_step"))
                numbers = {key: value for key, value in items.items() if not key.startswith("_")}
                history.setdefault(step, {}).update(numbers)
    expected = scalars(tracked.rows("train", "eval", "resources"))
    assert history == expected
    assert list(history) == list(range(1, LAST + 1))
    assert history[LAST]["time/planned_step_s/expected"] == 0.2
    assert history[LAST]["time/measured_over_planned"] > 0


@pytest.mark.skipif("tensorboard" not in TRACKERS, reason="needs tensorboard")
def test_tensorboard_has_every_step_once(tracked: Tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked.directory / "tensorboard"))
    events.Reload()
    expected = scalars(tracked.rows("train", "eval", "resources"))
    for name in ("train/loss", "eval/predicted/digit", "train/grad_norm/world_projector", "memory/planned_bytes"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({step: row[name] for step, row in expected.items() if name in row}), name
    hyperparameters = [path.read_text() for path in (tracked.directory / "tensorboard").rglob("hparams.yml")]
    assert any("config.training.max_steps: 6" in text for text in hyperparameters)


@pytest.mark.skipif("mlflow" not in TRACKERS, reason="needs mlflow")
def test_mlflow_goes_on_with_its_run(tracked: Tracked):
    from mlflow import MlflowClient

    client = MlflowClient((tracked.directory / "mlflow").as_uri())
    (experiment,) = [each for each in client.search_experiments() if each.name == "protected"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == tracked.record["trackers"]["mlflow"]
    assert found.info.status == "FINISHED"
    assert found.data.params["config.name"] == "tracked"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, LAST + 1))
    assert [point.value for point in history] == [row["train/loss"] for row in tracked.rows("train")]
    names = {key for row in scalars(tracked.rows("train", "eval", "resources")).values() for key in row}
    assert {key.replace(".", "/") for key in found.data.metrics} == names


@pytest.mark.skipif("trackio" not in TRACKERS, reason="needs trackio")
def test_trackio_goes_on_with_its_run(tracked: Tracked):
    import sqlite3

    (database,) = (tracked.directory / "trackio").glob("protected*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, *_ in rows} == {tracked.record["trackers"]["trackio"]}
    losses = {step: json.loads(text)["train/loss"] for _, step, text in rows if "train/loss" in json.loads(text)}
    assert losses == {row["step"]: row["train/loss"] for row in tracked.rows("train")}


def test_secrets_are_nowhere(tracked: Tracked):
    files = [path for path in tracked.directory.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".json", ".jsonl", ".yaml", ".safetensors"}
    assert "wandb" not in TRACKERS or any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_a_tracker_that_cannot_be_started_is_told_and_one_that_fails_is_left_out(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch
):
    from theworld_train.config.errors import ConfigError
    from theworld_train.train import trackers

    class Broken:
        finished = False

        def __init__(self, *_: object) -> None:
            pass

        def start(self) -> None:
            if not working:
                raise OSError("no route to host")

        def log(self, values: dict[str, float], step: int) -> None:
            raise OSError("connection lost")

        def finish(self) -> None:
            Broken.finished = True

    monkeypatch.setitem(trackers._OPENERS, "wandb", lambda *_: (Broken(), "id"))
    config = tracked.config.model_copy(
        update={"tracking": tracked.config.tracking.model_copy(update={"trackers": ("wandb",)})}
    )
    said: list[str] = []
    working = False
    with trackers.Trackers(config, said.append, main=True) as broken, pytest.raises(ConfigError, match="no route to"):
        broken.start("id", {}, {}, 0)
    working = True
    with trackers.Trackers(config, said.append, main=True) as broken:
        assert broken.start("id", {}, {}, 0) == {"wandb": "id"}
        broken.log({"train/loss": 1.0}, 1)
        broken.log({"train/loss": 1.0}, 2)
    assert Broken.finished, "it is ended all the same"
    assert said == ["wandb gets no metrics from step 1 on: OSError: connection lost"]
    with trackers.Trackers(config, said.append, main=False) as none:
        assert none.start("id", {}, {}, 0) == {}
        none.log({"train/loss": 1.0}, 1)


def test_measured_rate_is_held_against_the_plan(tracked: Tracked):
    (row,) = tracked.rows("resources")[-1:]
    assert row["time/planned_step_s/expected"] == 0.2
    assert row["time/measured_over_planned"] == pytest.approx(row["time/step_s"] / 0.2)
