"""Fetching and pinning: what is asked of the hub, what the lock records, what is found offline, what errors say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from theworld_train import hub
from theworld_train.cli.generate import _future
from theworld_train.config import ConfigError, RunConfig, parse_run_config
from theworld_train.config.rollout import RolloutRules
from theworld_train.config.sources import WorldFrames
from theworld_train.evaluate.answer import AnsweringModel
from theworld_train.hub import Lock, LockedDataset, LockedModel

BASE, ENCODER, DATA = "google/gemma-3-4b-it", "nvidia/Cosmos-Predict2-2B-Video2World", "someone/pictures"
A, B = "a" * 40, "b" * 40
FILES = {
    BASE: ["config.json", "model.safetensors", "tokenizer.model", "README.md", "pytorch_model.bin", "run.py"],
    ENCODER: ["vae/config.json", "vae/model.safetensors", "vae/model.pth", "model.safetensors", "t5/model.safetensors"],
    DATA: ["README.md", "data/train-00000-of-00001.parquet", "data/train.zip", "load.py"],
}


def config_of(data: str | None = None, revision: str | None = None, streaming: bool = False, **model: Any) -> RunConfig:
    source: dict[str, Any] = {"source": "moving_digits", "split": "train", "samples": 4}
    if data is not None:
        source = {"source": "hub", "id": data, "streaming": streaming}
    return parse_run_config(
        {
            "name": "a",
            "output_dir": "o",
            "trainable": {"language_model": {}},
            "model": {"revision": revision, **model},
            "data": {"train": source},
            "training": {"max_steps": 1},
        }
    )


class Hub:
    """Stands in for the hub: writes snapshots into the cache as its client does, or fails as that does."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.commits = {"main": A}
        self.failures: dict[str, Exception] = {}
        self.gated: dict[str, Exception] = {}
        self.calls: list[str] = []
        self.local = huggingface_hub.snapshot_download

    def repo_info(self, name: str, *, repo_type: str, revision: str, timeout: float) -> SimpleNamespace:
        self.calls.append(f"info {name} {revision}")
        if name in self.failures:
            raise self.failures[name]
        return SimpleNamespace(
            sha=self.commits.get(revision, revision), gated="manual" if name in self.gated else False
        )

    def auth_check(self, name: str, *, repo_type: str) -> None:
        raise self.gated[name]

    def snapshot_download(
        self, name: str, *, repo_type: str, revision: str, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        assert repo_type == ("dataset" if name == DATA else "model")
        if local_files_only:
            return self.local(
                name, repo_type=repo_type, revision=revision, allow_patterns=allow_patterns, local_files_only=True
            )
        self.calls.append(f"download {name} {revision}")
        return str(self.write(name, revision, allow_patterns))

    def write(self, name: str, revision: str = "main", patterns: list[str] | None = None) -> Path:
        """Fills the cache in the hub's layout, the listing of the whole repository included."""
        commit = self.commits.get(revision, revision)
        folder = self.cache / f"{'datasets' if name == DATA else 'models'}--{name.replace('/', '--')}"
        listed = {file: {"size": 5, "blob_id": "0" * 40} for file in FILES[name]}
        wanted = huggingface_hub.utils.filter_repo_objects(FILES[name], allow_patterns=patterns)
        contents = {f"snapshots/{commit}/{file}": "12345" for file in wanted}
        contents[f"trees/{commit}.json"] = json.dumps({"format_version": 1, "files": listed})
        if revision != commit:
            contents[f"refs/{revision}"] = commit
        for path, text in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        return folder / "snapshots" / commit


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub without a network, an empty cache and no token."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    server = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", server.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: server)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    return server


Fetch = Callable[..., Lock]


@pytest.fixture
def fetch(server: Hub) -> Fetch:
    def run(*configs: RunConfig, **options: Any) -> Lock:
        named = [(f"{index}.yaml", config) for index, config in enumerate(configs)]
        return hub.fetch(named, "theworld.lock.json", **options)

    return run


def problems_of(call: Callable[[], object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call()
    return [str(problem) for problem in caught.value.problems]


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


# -- what is downloaded and recorded ------------------------------------------------------------------------------


def test_weights_and_words_are_downloaded_and_nothing_that_runs_code(fetch: Fetch) -> None:
    lock = fetch(config_of())
    assert lock.models[BASE].files == {"config.json": 5, "model.safetensors": 5, "tokenizer.model": 5}
    assert lock.models[ENCODER].files == {"vae/config.json": 5, "vae/model.safetensors": 5}


def test_the_lock_says_what_was_asked_for_and_what_it_was(fetch: Fetch) -> None:
    lock = fetch(config_of())
    assert hub.read_lock("theworld.lock.json") == lock.model_copy(
        update={"created_by": hub.read_lock("theworld.lock.json").created_by}
    )
    written = json.loads(Path("theworld.lock.json").read_text())
    assert written["version"] == 1
    assert written["created_by"].startswith("theworld-train ")
    assert (written["models"][BASE]["revision"], written["models"][BASE]["commit"]) == ("main", A)
    assert [path.name for path in Path().iterdir() if path.is_file()] == ["theworld.lock.json"]


def test_a_second_fetch_takes_the_locked_commit_and_needs_no_network(server: Hub, fetch: Fetch) -> None:
    fetch(config_of())
    server.commits["main"] = B
    server.calls.clear()
    assert fetch(config_of()).models[BASE].commit == A
    assert server.calls == []


def test_another_node_fetches_the_locked_commit(server: Hub, fetch: Fetch) -> None:
    hub.write_lock("theworld.lock.json", Lock(models={BASE: LockedModel(revision="main", commit=B, files={})}))
    assert fetch(config_of(world={"enabled": False})).models[BASE].commit == B
    assert f"download {BASE} {B}" in server.calls


def test_update_takes_what_a_branch_stands_for_now(server: Hub, fetch: Fetch) -> None:
    fetch(config_of())
    server.commits["main"] = B
    lines: list[str] = []
    assert fetch(config_of(), update=True, say=lines.append).models[BASE].commit == B
    assert f"(the lock held {A})" in lines[0]


def test_entries_of_other_configs_stay(fetch: Fetch) -> None:
    other = LockedModel(revision="main", commit=B, files={"config.json": 1})
    hub.write_lock("theworld.lock.json", Lock(models={"x/y": other}))
    assert fetch(config_of()).models["x/y"] == other


def test_directories_are_left_alone(server: Hub, fetch: Fetch, tmp_path: Path) -> None:
    assert fetch(config_of(base=str(tmp_path), world={"encoder": str(tmp_path)})) == Lock()
    assert server.calls == []
    assert not Path("theworld.lock.json").exists()


def test_the_encoder_of_a_complete_model_is_not_needed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "theworld"}')
    assert [use.id for use in hub.required_repositories(config_of(base=str(tmp_path)))] == [str(tmp_path)]


def test_a_checkpoint_needs_the_bases_that_it_names(tmp_path: Path) -> None:
    record = {"base": {"id": BASE, "revision": A}, "encoder": {"id": ENCODER, "revision": None}}
    (tmp_path / "components.json").write_text(json.dumps(record))
    uses = hub.required_repositories(config_of(base=str(tmp_path)))
    assert [(use.id, use.revision) for use in uses] == [(str(tmp_path), None), (BASE, A), (ENCODER, None)]


def test_a_generator_is_needed_by_who_generates_alone(tmp_path: Path) -> None:
    base = str(tmp_path)
    pipeline = str(tmp_path / "nothing/at/all")
    plain = config_of(base=base, world={"encoder": base})
    assert not any(use.generates for use in hub.required_repositories(plain))
    world = WorldFrames(frames="rollout", steps=1, rollout=RolloutRules(pipeline=pipeline))
    config = plain.model_copy(update={"data": plain.data.model_copy(update={"world": world, "encoded": base})})
    (use,) = [use for use in hub.required_repositories(config) if use.generates]
    assert (use.id, use.key) == (pipeline, "data.world.rollout.pipeline")
    assert {"model_index.json", "vae/*.safetensors", "transformer/*.safetensors"} < set(use.patterns)
    assert hub.ensure_local(config, Lock()) == []
    (problem,) = hub.ensure_local(config, Lock(), generating=True)
    assert problem.key == "data.world.rollout.pipeline"


def test_two_configs_cannot_lock_two_revisions(fetch: Fetch) -> None:
    (problem,) = problems_of(lambda: fetch(config_of(), config_of(revision="v2")))
    assert problem.startswith("1.yaml: model.base: revision 'v2', while 0.yaml asks for 'main'")


def test_datasets_are_fetched_at_the_commit_that_is_locked(
    server: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("theworld_train.data.hub.fetch_dataset", asked.append)
    assert fetch(config_of(DATA)).datasets == {DATA: LockedDataset(revision="main", commit=A)}
    assert [(source.id, source.revision, source.config_name) for source in asked] == [(DATA, A, None)]


def test_of_a_stream_its_parquet_files_are_fetched_and_nothing_that_runs_code(
    server: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theworld_train.data.hub.fetch_dataset", None)
    config = config_of(DATA, streaming=True)
    (problem,) = [problem for problem in hub.ensure_local(config, Lock()) if problem.key == "data.train.id"]
    assert problem.message == "revision 'main' is not in the local cache"
    lock = fetch(config)
    sizes = {"README.md": 5, "data/train-00000-of-00001.parquet": 5}
    assert lock.datasets == {DATA: LockedDataset(revision="main", commit=A, configs=(), files=sizes)}
    folder = server.cache / "datasets--someone--pictures" / "snapshots" / A
    assert {path.name for path in folder.rglob("*.*")} == {"README.md", "train-00000-of-00001.parquet"}
    assert hub.ensure_local(config, lock) == hub.check_lock(lock) == []
    server.calls.clear()
    assert (fetch(config).datasets, server.calls) == (lock.datasets, [])
    (folder / "data" / "train-00000-of-00001.parquet").write_text("123")
    for problems in (hub.ensure_local(config, lock), hub.check_lock(lock)):
        assert ["3 bytes instead of 5; delete " in problem.message for problem in problems] == [True]


def test_a_stream_of_no_parquet_files_is_refused(server: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, DATA, ["README.md", "train.jsonl"])
    (problem,) = problems_of(lambda: fetch(config_of(DATA, streaming=True)))
    assert "no Parquet in" in problem


# -- what training asks -------------------------------------------------------------------------------------------


LOCK = Lock(models={BASE: LockedModel(revision="main", commit=A, files={})})


@pytest.mark.parametrize("requested", [None, "main", A])
def test_the_lock_pins_what_it_agrees_with(requested: str | None) -> None:
    assert hub.pinned_revision(LOCK, BASE, requested) == A


def test_a_full_commit_needs_no_lock_and_a_branch_has_no_commit_without() -> None:
    assert hub.pinned_revision(Lock(), BASE, B) == B
    assert hub.pinned_revision(Lock(), BASE, "main") is None


@pytest.mark.parametrize("requested", ["v2", B])
def test_a_contradiction_names_both_values(requested: str) -> None:
    (problem,) = problems_of(lambda: hub.pinned_revision(LOCK, BASE, requested))
    assert repr(requested) in problem
    assert "'main', which is commit " + A in problem
    (problem,) = problems_of(lambda: hub.pin_revisions(config_of(revision=requested), LOCK))
    assert problem.startswith("model.revision: ")


def test_a_config_is_pinned_as_far_as_the_lock_goes() -> None:
    lock = LOCK.model_copy(update={"datasets": {DATA: LockedDataset(revision="main", commit=B)}})
    pinned = hub.pin_revisions(config_of(DATA), lock)
    assert (pinned.model.revision, pinned.model.world.encoder_revision) == (A, None)
    assert pinned.data.train == config_of(DATA).data.train.model_copy(update={"revision": B})
    assert hub.pin_revisions(pinned, lock) == pinned


def test_live_rollouts_are_generated_by_the_pinned_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "read_lock", lambda path: LOCK)
    source = AnsweringModel(tmp_path, enable_world=True, max_frames=5)
    monkeypatch.setattr("theworld_train.evaluate.answer.find_rules", lambda path: RolloutRules(pipeline=BASE))
    future = _future(source, 1, None)
    assert future is not None
    assert future.rules.revision == A
    unlocked, own = RolloutRules(pipeline="someone/else"), RolloutRules(pipeline=str(tmp_path))
    assert hub.pin_rules(unlocked, LOCK) == unlocked
    assert hub.pin_rules(own, LOCK) == own
    (problem,) = problems_of(lambda: hub.pin_rules(RolloutRules(pipeline=BASE, revision=B), LOCK))
    assert problem.startswith("data.world.rollout.revision: ")


def test_what_was_fetched_is_here_though_most_of_the_repository_is_not(fetch: Fetch) -> None:
    lock = fetch(config_of())
    assert hub.ensure_local(config_of(), lock) == []
    assert hub.ensure_local(config_of(), Lock()) == [], "the cache knows what main stood for"
    assert hub.ensure_local(hub.pin_revisions(config_of(), lock), lock) == []
    assert hub.check_lock(lock) == []


def test_an_empty_cache_is_to_be_filled_by_fetch(server: Hub) -> None:
    base, encoder = map(str, hub.ensure_local(config_of(), Lock(), "run.yaml"))
    assert base == (
        f"run.yaml: model.base: revision 'main' is not in the local cache (got {BASE!r}); "
        "run `theworld-train fetch CONFIG` once where the network is reachable"
    )
    assert encoder.startswith("run.yaml: model.world.encoder: ")
    assert server.calls == []


def test_another_commit_than_the_locked_one_is_not_enough(server: Hub) -> None:
    server.write(BASE)
    lock = Lock(models={BASE: LockedModel(revision="main", commit=B, files={})})
    (problem,) = hub.ensure_local(config_of(world={"enabled": False}), lock)
    assert problem.message == f"commit {B} is not in the local cache"


@pytest.mark.parametrize(("content", "words"), [(None, "only partly"), ("123", "3 bytes instead of 5; delete ")])
def test_a_lost_or_damaged_file_is_noticed(server: Hub, fetch: Fetch, content: str | None, words: str) -> None:
    lock = fetch(config_of())
    (file,) = server.cache.glob("models--google*/snapshots/*/model.safetensors")
    file.unlink() if content is None else file.write_text(content)
    for problems in (hub.ensure_local(config_of(), lock), hub.check_lock(lock)):
        assert [words in problem.message for problem in problems] == [True]


def test_split_weights_are_counted_by_their_index(server: Hub) -> None:
    folder = server.write(BASE)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (problem,) = hub.ensure_local(config_of(world={"enabled": False}), Lock())
    assert "model-00002-of-00002.safetensors missing" in problem.message


@pytest.mark.parametrize("name", ["runs/tiny/gemma", "./tiny/gemma", "/nowhere/tiny/gemma"])
def test_a_missing_tiny_model_is_to_be_written(server: Hub, name: str) -> None:
    (problem,) = hub.ensure_local(config_of(base=name, world={"enabled": False}), Lock())
    assert "neither a directory nor a hub id" in problem.message
    assert problem.hint == f"if it is the quickstart's, write it: `theworld-train tiny {Path(name).parent}`"


def test_a_name_that_could_be_either_gets_both_hints(server: Hub) -> None:
    (problem,) = hub.ensure_local(config_of(base="tiny/gemma", world={"enabled": False}), Lock())
    assert "fetch CONFIG" in str(problem)
    assert "theworld-train tiny tiny" in str(problem)


def test_prepared_datasets_are_found_with_their_shards(server: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    config = config_of(DATA, base=str(tmp_path), world={"enabled": False})
    lock = Lock(datasets={DATA: LockedDataset(revision="main", commit=A)})
    assert [problem.key for problem in hub.ensure_local(config, lock)] == ["data.train.id"]
    folder = tmp_path / "prepared" / "someone___pictures" / "default" / "0.0.0" / A
    folder.mkdir(parents=True)
    split = {"name": "train", "dataset_name": "pictures", "shard_lengths": [2, 1]}
    (folder / "dataset_info.json").write_text(json.dumps({"splits": {"train": split}}))
    (folder / "pictures-train-00000-of-00002.arrow").touch()
    (problem,) = hub.ensure_local(config, lock)
    assert problem.message.startswith("pictures-train-00001-of-00002.arrow missing")
    (folder / "pictures-train-00001-of-00002.arrow").touch()
    assert hub.ensure_local(config, lock) == hub.check_lock(lock) == []
    other = Lock(datasets={DATA: LockedDataset(revision="main", commit=B)})
    assert len(hub.check_lock(other)) == 1


# -- what goes wrong ----------------------------------------------------------------------------------------------


def connect_error() -> Exception:
    # The package of the client's transport has changed its name, and its errors have no base in common.
    return type("ConnectError", (Exception,), {"__module__": "httpx"})("[Errno -2] Name or service not known")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError("x", response=response(404)), "no such model.*check its name.*HF_TOKEN"),
        (errors.RevisionNotFoundError("x", response=response(404)), "no revision 'main'"),
        (errors.HfHubHTTPError("x", response=response(401)), "refuses the token.*hf auth login"),
        (errors.HfHubHTTPError("x", response=response(503)), "status 503.*try again"),
        (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE.*unset it"),
        (connect_error(), "cannot be reached.*HTTPS_PROXY"),
        (OSError(28, "No space left on device"), "No space left on device.*free some space"),
    ],
)
def test_every_failure_says_how_to_mend_it(server: Hub, fetch: Fetch, error: Exception, words: str) -> None:
    server.failures = {BASE: error, ENCODER: error}
    with pytest.raises(ConfigError, match=words) as caught:
        fetch(config_of())
    assert [problem.key for problem in caught.value.problems] == ["model.base", "model.world.encoder"]
    assert not Path("theworld.lock.json").exists()


@pytest.mark.parametrize(
    ("token", "words"), [(None, "no token says who asks.*HF_TOKEN or `hf auth login`"), ("hf_x", "account has not")]
)
def test_a_gated_model_is_found_before_anything_is_downloaded(
    server: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch, token: str | None, words: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    server.gated = {BASE: errors.GatedRepoError("x", response=response(403))}
    with pytest.raises(ConfigError, match=words) as caught:
        fetch(config_of())
    assert f"huggingface.co/{BASE}" in str(caught.value)
    assert not any(call.startswith("download") for call in server.calls)


def test_the_cause_below_a_failed_download_counts(server: Hub, fetch: Fetch) -> None:
    outer = errors.LocalEntryNotFoundError("cannot find the files")
    outer.__cause__ = connect_error()
    server.failures = {BASE: outer}
    assert "cannot be reached (ConnectError)" in problems_of(lambda: fetch(config_of()))[0]


def test_what_was_fetched_before_a_failure_stays_locked(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_source: object) -> None:
        raise ConfigError("the dataset has no such configuration")

    monkeypatch.setattr("theworld_train.data.hub.fetch_dataset", fails)
    assert problems_of(lambda: fetch(config_of(DATA))) == ["the dataset has no such configuration"]
    assert set(hub.read_lock("theworld.lock.json").models) == {BASE, ENCODER}


def test_a_repository_without_safe_weights_is_refused(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, BASE, ["config.json", "pytorch_model.bin"])
    assert "no safetensors weights" in problems_of(lambda: fetch(config_of()))[0]


@pytest.mark.parametrize("secret", ["hf_abcdefghijklmnopqrstuvwxyz", "a-token-of-another-form"])
def test_no_error_and_no_lock_holds_a_token(
    server: Hub, fetch: Fetch, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: secret)
    server.failures = {BASE: ValueError(f"bad header {secret}")}
    assert secret not in "".join(problems_of(lambda: fetch(config_of())))
    server.failures = {}
    fetch(config_of())
    assert secret not in Path("theworld.lock.json").read_text()


def test_an_exception_that_nobody_expects_stays_one(server: Hub, fetch: Fetch) -> None:
    server.failures = {BASE: KeyError("a fault of ours")}
    with pytest.raises(KeyError):
        fetch(config_of())


# -- the file -----------------------------------------------------------------------------------------------------


def test_no_file_is_an_empty_lock(tmp_path: Path) -> None:
    assert hub.read_lock(tmp_path / "none.json") == Lock()


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"version": 2}', '{"models": {"a": {"revision": "main", "commit": "x"}}}']
)
def test_a_damaged_lock_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock.json").write_text(text)
    (problem,) = problems_of(lambda: hub.read_lock(tmp_path / "lock.json"))
    assert problem.startswith(f"{tmp_path / 'lock.json'}: ")
    assert "delete it and run `theworld-train fetch CONFIG`" in problem


def test_a_lock_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.write_lock(tmp_path / "lock.json", LOCK)

    def fails(_self: Path, _target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", fails)
    assert "Permission denied" in problems_of(lambda: hub.write_lock(tmp_path / "lock.json", Lock()))[0]
    assert hub.read_lock(tmp_path / "lock.json").models == LOCK.models
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]
