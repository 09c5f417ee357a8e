"""Protects `fetch`: configs and pipelines are read whole, directories need nothing, and the check stays offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from theworld_train import hub
from theworld_train.hub import Lock, LockedModel

LOCK = Lock(models={"x/y": LockedModel(revision="main", commit="a" * 40, files={})})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Notes what is to be fetched instead of fetching it."""
    calls: list[Any] = []

    def note(configs: list[Any], lock_path: str, *, update: bool, say: Any) -> None:
        calls.append(([(path, config.name) for path, config in configs], lock_path, update))
        say("model x/y main: fetched")

    monkeypatch.setattr(hub, "fetch", note)
    return calls


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Undoes what a check sets, and keeps it off this machine's cache."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_configs_and_the_stages_of_pipelines_are_fetched(folder, call, asked):
    code, out, _ = call("fetch", "good.yaml", "pipeline.yaml")
    assert (code, out) == (0, "model x/y main: fetched\nlock: theworld.lock.json\n")
    wanted = [("good.yaml", "good"), ("pipeline.yaml", "good"), ("pipeline.yaml", "b")]
    assert asked == [(wanted, "theworld.lock.json", False)]


def test_options_and_overrides_are_passed_on(folder, call, asked):
    assert call("fetch", "good.yaml", "name=other", "--lock", "l.json", "--update")[0] == 0
    assert asked == [([("good.yaml", "other")], "l.json", True)]


def test_all_wrong_configs_are_reported_at_once(folder, call, asked):
    code, _, err = call("fetch", "wrong.yaml", "missing.yaml")
    assert code == 2
    assert "2 problems in wrong.yaml" in err
    assert "1 problem in missing.yaml" in err
    assert asked == []


@pytest.mark.parametrize("arguments", [(), ("seed=1",), ("--check", "seed=1")])
def test_no_config_is_an_error(folder, call, asked, arguments):
    assert call("fetch", *arguments)[0] == 2


def test_directories_need_nothing(folder, call):
    base = (f"model.base={folder}", f"model.world.encoder={folder}")
    code, out, _ = call("fetch", "good.yaml", *base)
    assert (code, out) == (0, "nothing to fetch: no hub repository is named\n")
    assert not (folder / "theworld.lock.json").exists()


def test_a_missing_tiny_model_is_named_with_the_file(folder, call):
    base = ("model.base=runs/tiny/gemma", "model.world.encoder=runs/tiny/cosmos")
    code, _, err = call("fetch", "good.yaml", *base)
    assert code == 2
    assert err.startswith("2 problems in good.yaml\n  model.base: neither a directory nor a hub id")
    assert "theworld-train tiny runs/tiny" in err


def test_the_check_needs_a_lock(folder, call):
    code, _, err = call("fetch", "--check")
    assert code == 2
    assert "no such lock file; run `theworld-train fetch CONFIG`" in err


def test_the_check_names_what_is_not_here(folder, call):
    hub.write_lock("theworld.lock.json", LOCK)
    code, _, err = call("fetch", "--check", "good.yaml")
    assert code == 2
    assert "1 problem in theworld.lock.json\n  models: commit " + "a" * 40 + " is not in the local cache" in err
    assert "2 problems in good.yaml" in err


def test_the_check_is_content_with_what_is_here(folder, call):
    snapshot = folder / "cache" / "models--x--y" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_text("123")
    entry = {"revision": "main", "commit": "a" * 40, "files": {"model.safetensors": 3}}
    Path("theworld.lock.json").write_text(json.dumps({"version": 1, "models": {"x/y": entry}}))
    assert call("fetch", "--check") == (0, "ok     theworld.lock.json: 1 model(s), 0 dataset(s), all here\n", "")
