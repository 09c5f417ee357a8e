"""What is kept of frozen encoders changes nothing that a run computes, and is never read where it must not be."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import TinyCheckpoint
from tests.numerics.conftest import FinishedRun
from theworld_train import encode as encode_module
from theworld_train import encoded_files
from theworld_train.assemble import steps
from theworld_train.checkpoint_files import file_sha256
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig
from theworld_train.encode import Kept, encode
from theworld_train.encoded_files import EncodedFiles, ShardWriter
from theworld_train.train.metrics import read_metrics

Shipped = Callable[..., RunConfig]
Finish = Callable[[RunConfig], FinishedRun]


@pytest.fixture(autouse=True, scope="module")
def _small_shards() -> Iterator[None]:
    """Shards of a few entries, so that a directory can lose some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoded_files, "SHARD_BYTES", 20_000)
        yield


def settings(conversations: Path, directory: Path) -> dict[str, Any]:
    """What the runs of this module share; they keep their encoders' work in `directory/encoded`."""
    return {
        "data__train": {"source": "jsonl", "path": str(conversations)},
        "data__encoded": str(directory / "encoded"),
        "expect_trainable": None,
        "training__max_steps": 4,
        "training__global_batch_size": 6,
        "training__micro_batch_size": 3,
    }


@pytest.fixture
def stage(shipped: Shipped, conversations: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes the config of a run on images, clips and texts that keeps its encoders' work in `tmp_path/encoded`."""

    def make(name: str = "projection", directory: str = "run", **overrides: Any) -> RunConfig:
        return shipped(name, tmp_path / directory, **settings(conversations, tmp_path) | overrides)

    return make


@pytest.fixture(scope="module")
def filled_once(shipped: Shipped, conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("filled")
    fill(shipped("projection", directory / "run", **settings(conversations, directory)))
    return directory / "encoded"


@pytest.fixture
def filled(filled_once: Path, tmp_path: Path) -> Path:
    """`tmp_path/encoded` with all that a projection-only run in fp32 reads."""
    shutil.copytree(filled_once, tmp_path / "encoded")
    return tmp_path / "encoded"


def fill(config: RunConfig, *only: str, verify: bool = False) -> tuple[dict[str, Kept], str]:
    """Encodes, and returns what is kept by encoder and what has been said."""
    said = io.StringIO()
    kept = encode(config, Console(file=said, width=1000), only, verify=verify)
    return {item.component.value: item for item in kept}, said.getvalue()


def shards(directory: Path, kind: str = "*") -> list[Path]:
    return sorted(directory.glob(f"{kind}/*.safetensors"))


class Outcome(NamedTuple):
    """What has to be the same, bit for bit."""

    losses: list[str]
    norms: list[float]
    samples: list[Any]
    held_out: float
    projector: str


def outcome(finished: FinishedRun) -> Outcome:
    rows = finished.train
    return Outcome(
        [row["loss_hex"] for row in rows],
        [row["train/grad_norm"] for row in rows],
        [row["dropped"] for row in rows],
        finished.eval[-1]["eval/loss"],
        file_sha256(finished.checkpoint / "world_projector.safetensors"),
    )


def read_shares(finished: FinishedRun) -> list[float | None]:
    return [row.get("data/encoded_read") for row in finished.train]


# -- what a run computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_complete_partial_and_empty_directories_give_the_same_run(
    stage: Callable[..., RunConfig], finish: Finish, tmp_path: Path, precision: str
):
    (tmp_path / "encoded").mkdir()
    same = {"precision": precision, "data__num_workers": int(precision == "fp32"), "training__max_steps": 2}
    empty = finish(stage(directory="empty", **same))
    fill(stage(**same))
    complete = finish(stage(directory="complete", **same))
    for shard in shards(tmp_path / "encoded")[::2]:
        shard.unlink()
    partial = finish(stage(directory="partial", **same))
    assert read_shares(empty) == [0.0] * 2
    assert read_shares(complete) == [1.0] * 2
    assert 0 < min(read_shares(partial)) <= max(read_shares(partial)) < 1
    assert outcome(complete) == outcome(partial) == outcome(empty)
    without = finish(stage(directory="without", **same | {"data__encoded": None}))
    assert read_shares(without) == [None] * 2
    bound = 1e-5 if precision == "fp32" else 2e-2
    for ours, theirs in zip(complete.train, without.train, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=bound)


def test_run_goes_on_with_what_has_been_encoded_meanwhile(
    stage: Callable[..., RunConfig], finish: Finish, tmp_path: Path
):
    (tmp_path / "encoded").mkdir()
    same = {"schedule__kind": "constant", "directory": "halves"}
    finish(stage(training__max_steps=2, **same))
    fill(stage())
    halves = finish(stage(resume="latest", allow_changed=["training.max_steps"], **same))
    assert read_shares(halves) == [0.0, 0.0, 1.0, 1.0]
    assert outcome(halves) == outcome(finish(stage(**same | {"directory": "straight"})))


@pytest.mark.parametrize(
    ("name", "trainable"),
    [("vision", None), ("language", {"world_projector": {}, "vision_tower": {"adapter": "lora"}}), ("full", None)],
    ids=["vision", "vision adapter", "full"],
)
def test_component_that_trains_never_reads(
    stage: Callable[..., RunConfig],
    finish: Finish,
    filled: Path,
    tmp_path: Path,
    name: str,
    trainable: dict[str, Any] | None,
):
    """Entries of the right recipe hold nonsense: a run that read one of them would have another loss."""
    for folder in filled.glob("*-*"):
        files, writer = EncodedFiles(folder), ShardWriter(folder, {})
        entries = {digest: files.get(digest) for digest in files.digests}
        for shard in shards(filled, folder.name):
            shard.unlink()
        if folder.name.startswith("vision_tower") or name == "full":
            entries = {digest: torch.full_like(entry, 3.0) for digest, entry in entries.items()}
        for digest, entry in entries.items():
            writer.add(digest, entry, 0.0)
        writer.seal()
    same = {"training__max_steps": 2} | ({} if trainable is None else {"trainable": trainable})
    read = finish(stage(name, "read", **same))
    (tmp_path / "nothing").mkdir()
    encoded = finish(stage(name, "encoded", data__encoded=str(tmp_path / "nothing"), **same))
    assert [row["loss_hex"] for row in read.train] == [row["loss_hex"] for row in encoded.train]
    assert read_shares(read) == [None if name == "full" else 1.0] * 2
    if name == "vision":  # the nonsense is there for whoever may read it
        assert finish(stage(directory="fooled", **same)).train[0]["loss_hex"] != encoded.train[0]["loss_hex"]


# -- what is encoded --------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_encoded(stage: Callable[..., RunConfig], tmp_path: Path):
    first, said = fill(stage(training__max_steps=2))
    assert first["world_encoder"].new == first["world_encoder"].entries < 48
    whole, _ = fill(stage(training__max_steps=8))
    assert 0 < whole["world_encoder"].new < whole["world_encoder"].entries
    again, said = fill(stage(training__max_steps=8), verify=True)
    assert [item.new for item in again.values()] == [0, 0]
    assert "0 pictures to encode" in said
    assert f"verified {sum(item.entries for item in again.values())} entries" in said
    lost = shards(tmp_path / "encoded", "world_encoder-*")[0]
    number = len(json.loads(lost.read_bytes()[8 : 8 + int.from_bytes(lost.read_bytes()[:8], "little")])) - 1
    lost.unlink()
    assert {name: item.new for name, item in fill(stage(training__max_steps=8))[0].items()} == {
        "vision_tower": 0,
        "world_encoder": number,
    }


def test_planned_bytes_hold(stage: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoded_files, "SHARD_BYTES", 2**20)
    _, said = fill(stage(training__max_steps=8))
    planned = int(said.split("encoded: ")[1].split(" bytes")[0].replace(",", ""))
    written = sum(shard.stat().st_size for shard in shards(tmp_path / "encoded"))
    assert 0.9 * planned < written <= planned


def test_one_encoder_alone_may_be_kept(stage: Callable[..., RunConfig], finish: Finish, tmp_path: Path):
    kept, _ = fill(stage(), "world_encoder")
    assert list(kept) == ["world_encoder"]
    assert not shards(tmp_path / "encoded", "vision_tower-*")
    finished = finish(stage())
    assert all(0 < share < 1 for share in read_shares(finished))
    (resources,) = read_metrics(finished.directory / "metrics.jsonl", "resources")
    waited = [row["time/data_wait_s"] for row in finished.train[2:]]
    taken = [row["time/step_s"] for row in finished.train[2:]]
    assert resources["time/data_wait_share"] == pytest.approx(sum(waited) / sum(taken), rel=1e-6)


def test_repeated_pictures_are_kept_once(stage: Callable[..., RunConfig], conversations: Path):
    twice = conversations.with_name("twice.jsonl")
    rows = [json.loads(line) for line in conversations.read_text().splitlines()[:6]]
    copies = [row | {"id": f"{row['id']}-{copy}"} for copy in "ab" for row in rows]
    twice.write_text("".join(json.dumps(row) + "\n" for row in copies))
    kept, _ = fill(stage(data__train={"source": "jsonl", "path": str(twice)}, data__eval=None))
    assert kept["world_encoder"].uses == 2 * kept["world_encoder"].new == 10


def test_samples_that_training_leaves_out_are_told(
    stage: Callable[..., RunConfig], conversations: Path, tmp_path: Path
):
    rows = [json.loads(line) for line in conversations.read_text().splitlines()[:6]]
    for file in conversations.parent.glob("[0-5]*.png"):
        shutil.copy(file, tmp_path)
    (tmp_path / "0.png").write_bytes(b"no image")
    data = tmp_path / "some.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, said = fill(stage(data__train={"source": "jsonl", "path": str(data)}))
    assert "1 sample left out, as in training; the first one, image-0:" in said


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(steps, "load_model", load)


@pytest.mark.usefixtures("_no_model")
class TestBeforeAnyModelLoads:
    @pytest.mark.usefixtures("filled")
    @pytest.mark.parametrize(
        ("override", "problems"),
        [
            ({"model__world__resolution": 64}, ["world_encoder differs in resolution: 32 there, 64 in this run"]),
            ({"model__world__resize": "crop"}, ["world_encoder differs in resize: 'pad' there, 'crop' in this run"]),
            (
                {"model__world__encoder_dtype": "bfloat16"},
                ["world_encoder differs in dtype: 'float32' there, 'bfloat16' in this run"],
            ),
            ({"precision": "bf16"}, ["vision_tower differs in precision: 'fp32' there, 'bf16' in this run"]),
            ({"model__attention": "eager"}, ["vision_tower differs in attention: 'sdpa' there, 'eager' in this run"]),
        ],
        ids=str,
    )
    def test_stale_entries(
        self, stage: Callable[..., RunConfig], finish: Finish, override: dict[str, Any], problems: list[str]
    ):
        with pytest.raises(ConfigError) as caught:
            finish(stage(**override))
        assert [str(problem) for problem in caught.value.problems] == [
            f"data.encoded: its {problem}; add one for this run with `theworld-train encode CONFIG`, or set "
            "data.encoded=null"
            for problem in problems
        ]

    def test_directory_that_does_not_exist(self, stage: Callable[..., RunConfig], finish: Finish, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"data\.encoded: no such directory .*encoded'.*theworld-train encode"):
            finish(stage())
        (tmp_path / "encoded").write_text("")
        with pytest.raises(ConfigError, match=r"data\.encoded: is a file, expected a directory"):
            finish(stage())


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shift_weights(directory: Path, name: str) -> None:
    """Changes a single number of a tensor in a model's directory."""
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        found = [key for key in tensors if key.endswith(name)]
        if found:
            tensors[found[0]].view(-1)[0] += 1e-3
            save_file(tensors, file, {"format": "pt"})
            return
    raise AssertionError(name)


@pytest.fixture
def other_model(quickstart_model: TinyCheckpoint, tmp_path: Path) -> TinyCheckpoint:
    """A copy of the tiny model, to be changed."""
    shutil.copytree(quickstart_model.directory, tmp_path / "other")
    return TinyCheckpoint(tmp_path / "other")


def new_statistics(model: TinyCheckpoint) -> None:
    edit_json(Path(model.cosmos) / "vae/config.json", latents_mean=[0.5] * 16)


def new_means(model: TinyCheckpoint) -> None:
    (file,) = (path for path in Path(model.gemma).glob("*processor_config.json") if "image_mean" in path.read_text())
    file.write_text(file.read_text().replace("0.5", "0.25"))


def new_encoder(model: TinyCheckpoint) -> None:
    shift_weights(Path(model.cosmos) / "vae", "encoder.conv_in.weight")


def new_tower(model: TinyCheckpoint) -> None:
    shift_weights(Path(model.gemma), "patch_embedding.weight")


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (new_statistics, "world_encoder differs in architecture"),
        (new_encoder, "world_encoder differs in weights"),
        (new_means, "vision_tower differs in pixels.image_mean"),
        (new_tower, "vision_tower differs in weights"),
    ],
)
def test_entries_of_other_models_are_stale(
    stage: Callable[..., RunConfig],
    finish: Finish,
    other_model: TinyCheckpoint,
    change: Callable[[TinyCheckpoint], None],
    problem: str,
):
    change(other_model)
    other = {"model__base": other_model.gemma, "model__world__encoder": other_model.cosmos}
    with pytest.raises(ConfigError, match=f"its {problem}: .* there, .* in this run"):
        finish(stage(**other))


@pytest.mark.usefixtures("filled")
def test_entries_of_several_models_are_kept_side_by_side(
    stage: Callable[..., RunConfig], finish: Finish, other_model: TinyCheckpoint
):
    new_encoder(other_model)
    other = {"model__world__encoder": other_model.cosmos}
    kept, _ = fill(stage(**other))
    assert kept["vision_tower"].new == 0
    assert kept["world_encoder"].new == kept["world_encoder"].entries > 0
    for directory, model in (("first", {}), ("second", other)):
        assert read_shares(finish(stage(directory=directory, **model))) == [1.0] * 4


def test_damaged_entry_ends_the_run_and_names_its_file(stage: Callable[..., RunConfig], finish: Finish, filled: Path):
    for shard in shards(filled, "world_encoder-*"):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 128
        shard.write_bytes(data)
    with pytest.raises(ConfigError, match=r"data\.encoded: .*\.safetensors is damaged: entry \w{32}.*remove the file"):
        finish(stage(data__num_workers=1))
    with pytest.raises(ConfigError) as caught:
        fill(stage(), verify=True)
    assert len(caught.value.problems) == len(shards(filled, "world_encoder-*"))
    for shard in shards(filled, "world_encoder-*"):
        shard.unlink()
    finish(stage(directory="mended"))


def test_nothing_to_encode_is_said(stage: Callable[..., RunConfig]):
    with pytest.raises(ConfigError, match="trainable: nothing to encode: every encoder of this run trains"):
        fill(stage("full"))
    with pytest.raises(ConfigError, match=r"--only: is no frozen encoder of this run \(got 'vision_tower'\)"):
        fill(stage("vision"), "vision_tower")
    with pytest.raises(ConfigError, match=r"data\.encoded: names the directory to fill, and is not set"):
        fill(stage(data__encoded=None))


def test_directory_that_cannot_be_written_to_is_refused(stage: Callable[..., RunConfig], tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.encoded: cannot be written to: Not a directory"):
        fill(stage(data__encoded=str(tmp_path / "file/encoded")))


def test_full_disk_is_told_before_anything_is_encoded(
    stage: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encode_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ConfigError, match=r"what is missing takes [\d,]+ bytes, but 1,000 are free there"):
        fill(stage())
    assert not list((tmp_path / "encoded").glob("*-*"))


@pytest.fixture
def _held(tmp_path: Path) -> Iterator[None]:
    """Another process holds the directory."""
    (tmp_path / "encoded").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
    hold += 'f.write(\'{"host": "h", "pid": 7, "run": "r"}\'); f.flush(); print(flush=True); sys.stdin.read()'
    command = [sys.executable, "-c", hold, str(tmp_path / "encoded/.run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.communicate()


@pytest.mark.usefixtures("_held")
def test_two_launches_never_write_into_one_directory(stage: Callable[..., RunConfig]):
    with pytest.raises(ConfigError, match=r"data\.encoded: is being written by run r, process 7 on h"):
        fill(stage())
