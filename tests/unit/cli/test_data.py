"""Protects `theworld-train data`: its counts are those of the batches that training sees, and its page shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.helpers.tiny import RESOLUTION, TinyCheckpoint
from theworld_train.assemble.inputs import Inputs, open_inputs
from theworld_train.batch import Batch
from theworld_train.config import load_run_config
from theworld_train.config.schema import RunConfig
from theworld_train.data import Batching, Window, measure_lengths, part_ends, training_batches
from theworld_train.inspection.token_ledger import count_tokens

Call = Callable[..., tuple[int, str, str]]


def turns(question: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [*question, {"type": "text", "text": "Which digit is it?"}]},
        {"role": "assistant", "content": answer},
    ]


@pytest.fixture
def config(tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run whose data hold samples that are cut, dropped, doubled, damaged and excluded."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), (200, 0, 0)).save("red.png")
    Image.new("RGB", (30, 30), (0, 200, 0)).save("green.png")
    Path("broken.png").write_bytes(b"\x89PNG no more")
    red, green, broken = ({"type": "image", "path": f"{name}.png"} for name in ("red", "green", "broken"))
    rows = [
        {"id": "plain", "messages": turns([], "up")},
        {"id": "red", "messages": turns([red], "left")},
        {"id": "again", "messages": turns([red], "left")},
        {"id": "green", "messages": turns([green], "left right up")},
        {"id": "long", "messages": turns([green], " ".join(["up"] * 100))},
        {"id": "many", "messages": turns([green] * 4, "up")},
        {"id": "broken", "messages": turns([broken], "up")},
        {"id": "left out", "messages": turns([], "down")},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("exclude.jsonl").write_text('{"id": "rows/left out"}\n')
    digits = {"source": "moving_digits", "split": "train", "samples": 8, "frames": 5}
    parts = {"rows": {"data": {"source": "jsonl", "path": "rows.jsonl"}}, "digits": {"data": digits}}
    values = {
        "name": "counted",
        "output_dir": "run",
        "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": RESOLUTION}},
        "trainable": {"world_projector": {}},
        "data": {
            "train": {"source": "mixture", "parts": parts},
            "max_sequence_length": 100,
            "exclude": ["exclude.jsonl"],
            "num_workers": 0,
        },
        "training": {"epochs": 1, "global_batch_size": 4, "micro_batch_size": 2},
    }
    Path("config.yaml").write_text(yaml.safe_dump(values))
    return "config.yaml"


def test_what_becomes_of_each_sample(call: Call, config: str):
    code, out, _ = call("data", config, "--json", "--media")
    assert code == 0
    found = json.loads(out)
    assert found["parts"]["rows"]["samples"] == {"kept": 4, "trimmed": 1, "dropped": 2, "excluded": 1}
    assert found["parts"]["digits"]["samples"]["kept"] == 8
    assert found["trimmed"] == ["rows/long"]
    assert set(found["dropped"]) == {"rows/many", "rows/broken"}
    assert "tokens do not fit 100" in found["dropped"]["rows/many"]
    assert "broken.png" in found["dropped"]["rows/broken"]
    assert found["excluded"] == ["rows/left out"]
    assert found["duplicates"] == [["rows/red", "rows/again"]]
    assert found["image_sizes"]["64x48"] == 2
    assert found["steps"] == 4


def test_without_opening_media_only_what_they_hide_is_missed(call: Call, config: str):
    found = json.loads(call("data", config, "--json")[1])
    assert set(found["dropped"]) == {"rows/many"}
    assert found["duplicates"] == []
    assert found["image_sizes"] == {}


def windows_of(config: RunConfig, inputs: Inputs, steps: int) -> list[Window]:
    """Returns what the first steps of a run see."""
    kind, length = config.training.batching, inputs.max_length
    lengths = None if kind == "padded" else measure_lengths(inputs.train, inputs.collator, range(len(inputs.train)), 0)
    windows = training_batches(
        inputs.train,
        inputs.collator,
        inputs.order,
        Batching(kind, length, lengths, tuple(part_ends(inputs.train))),
        rank=0,
        world_size=1,
        micro_batch_size=2,
        start_step=0,
        num_steps=steps,
        num_workers=0,
        pin_memory=False,
    )
    return list(windows)


def batches(path: str, *overrides: str) -> list[Batch]:
    """Returns what one pass of training sees."""
    config = load_run_config(path, overrides)
    return [batch for window in windows_of(config, open_inputs(config), 4) for batch in window.micro_batches]


@pytest.mark.parametrize("batching", ["padded", "grouped", "packed"])
def test_counts_are_those_of_the_batches_that_training_sees(call: Call, config: str, batching: str, tmp_path: Path):
    # One source of samples that are all usable, so that a pass takes each of them once.
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    usable = [row for row in rows if row["id"] in ("plain", "red", "green", "long")] * 4
    lines = [json.dumps(row | {"id": str(number)}) for number, row in enumerate(usable)]
    Path("usable.jsonl").write_text("\n".join(lines))
    overrides = ["data.train={source: jsonl, path: usable.jsonl}", "data.exclude=[]", f"training.batching={batching}"]
    code, out, err = call("data", config, *overrides, "--json")
    assert code == 0, err
    found = json.loads(out)
    total = found["parts"]["total"]
    seen = batches(config, *overrides)
    assert sum(len(batch.sample_ids) for batch in seen) == 16 == sum(total["samples"].values())
    assert total["tokens"]["all"] == sum(batch.num_tokens for batch in seen)
    assert total["tokens"]["supervised"] == sum(batch.num_supervised for batch in seen)
    assert total["tokens"]["image"] == sum(int(batch.token_type_ids.sum()) for batch in seen)
    assert total["samples"]["trimmed"] >= 2
    positions = sum(batch.input_ids.numel() for batch in seen)
    assert found["padding_share"] == pytest.approx(1 - total["tokens"]["all"] / positions, abs=1e-12)


def with_wrong_rows() -> None:
    """Adds a row without an answer, and one whose image is not there, to those of the run."""
    wrong = [
        {"id": "open", "messages": turns([], "up")[:1]},
        {"id": "gone", "messages": turns([{"type": "image", "path": "gone.png"}], "up")},
    ]
    with Path("rows.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in wrong)


def test_wrong_rows_are_listed_by_file_row_and_field(call: Call, config: str):
    with_wrong_rows()
    code, out, err = call("data", config, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["parts"]["rows"]["samples"]["dropped"] == 3
    assert found["dropped"]["rows/rows.jsonl:9"].startswith("rows.jsonl:9: messages: no assistant turn")
    expected = "rows.jsonl:10: messages[0].content[0].path: no such file (got 'gone.png')"
    assert found["dropped"]["rows/gone"].startswith(expected)


def test_more_wrong_rows_than_training_would_take_are_listed_and_end_with_an_error(call: Call, config: str):
    with_wrong_rows()
    code, out, err = call("data", config, "data.max_bad_samples=1")
    assert code == 2
    assert "dropped: rows/rows.jsonl:9: rows.jsonl:9: messages: no assistant turn" in out
    assert "data.max_bad_samples: 2 rows are wrong, more than may" in " ".join(err.split())


@pytest.mark.parametrize("batching", ["padded", "grouped", "packed"])
def test_counts_are_those_of_each_sample_that_training_takes_of_a_mixture(call: Call, config: str, batching: str):
    with_wrong_rows()
    overrides = [
        f"training.batching={batching}",
        "data.train.parts.rows.weight=2",
        "data.train.parts.digits.weight=1",
        "training.epochs=3",
    ]
    run_config = load_run_config(config, overrides)
    inputs = open_inputs(run_config)
    ledger = count_tokens(run_config, inputs, media=True, num_workers=0)
    entries = {entry.id: entry for entry in ledger.entries}
    assert len(entries) == len(ledger.entries) == 18
    windows = windows_of(run_config, inputs, ledger.steps)
    assert ledger.steps == len(windows) == 14
    seen = [batch for window in windows for batch in window.micro_batches]
    world = inputs.processor.tokenizer.convert_tokens_to_ids("<world>")
    for batch in seen:
        taken = [entries[name] for name in batch.sample_ids]
        assert {entry.outcome for entry in taken} <= {"kept", "trimmed"}
        assert batch.num_tokens == sum(entry.tokens for entry in taken)
        assert batch.num_supervised == sum(entry.supervised for entry in taken)
        assert int(batch.token_type_ids.sum()) == sum(entry.image for entry in taken)
        assert int((batch.input_ids == world).sum()) == sum(entry.world for entry in taken)
    names = [name for batch in seen for name in batch.sample_ids]
    assert set(names) == {entry.id for entry in ledger.entries if entry.outcome in ("kept", "trimmed")}
    assert sum(window.trimmed for window in windows) == names.count("rows/long")
    dropped = {item.sample_id: item.reason for window in windows for item in window.dropped}
    assert (
        dropped.keys() == ledger.ids("dropped").keys() == {"rows/many", "rows/broken", "rows/gone", "rows/rows.jsonl:9"}
    )
    if batching == "padded":  # the others are laid out before anything knows of the damaged image
        tokens, positions = sum(batch.num_tokens for batch in seen), sum(batch.input_ids.numel() for batch in seen)
        assert ledger.padding == pytest.approx(1 - tokens / positions, abs=1e-12)


def test_the_table_says_it_in_words(call: Call, config: str):
    code, out, _ = call("data", config, "--media")
    assert code == 0
    words = " ".join(out.split())
    assert "digits rows total" in words
    assert "cut: rows/long" in words
    assert "dropped: rows/many" in words
    assert "the same: rows/red, rows/again" in words
    assert "64 x 48 (2)" in words
    assert "4 steps of 4 samples" in words


def test_a_page_shows_samples_as_the_model_sees_them(call: Call, config: str):
    code, out, _ = call("data", config, "--show", "16", "--page", "page.html")
    assert code == 0
    assert "16 samples are shown in page.html" in out
    page = Path("page.html").read_text()
    assert page.count("<article>") == 16
    assert re.search(r'<span class="image">\S+ . 16</span>', page)
    assert '<span class="supervised">left</span>' in page
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    assert "cut off" in page
    assert "not used" in page


def test_a_picture_of_the_lengths(call: Call, config: str):
    pytest.importorskip("matplotlib")
    assert call("data", config, "--plot", "lengths.png")[0] == 0
    assert Path("lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--page", "absent/page.html", "--show", "1"], "cannot be written"),
        (["--plot", "absent/lengths.png"], "cannot be written"),
        (["data.max_sequence_length=10"], "too small for a single image"),
        (["data.exclude=[absent.jsonl]"], "absent.jsonl"),
        (["data.train.parts.rows.weight=2"], "for all parts or for none; missing: digits"),
        (
            ["data.train.parts.rows.max_epochs=1", "data.train.parts.digits.max_epochs=1", "training.epochs=2"],
            "draws 32",
        ),
    ],
)
def test_wrong_input_is_answered_with_what_would_do(call: Call, config: str, arguments: list[str], answer: str):
    pytest.importorskip("matplotlib")
    code, _, err = call("data", config, *arguments)
    assert code == 2
    assert answer in " ".join(err.split())
