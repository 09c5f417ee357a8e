"""`theworld-train encode`: what it prints, what `train` then reads, and how it ends where there is nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.tiny import TinyCheckpoint, write_run

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(tiny: TinyCheckpoint, tmp_path: Path) -> str:
    return str(write_run(tiny, tmp_path, steps=2, batch=2))


def test_what_is_kept_is_printed_and_read(call: Call, config: str, tmp_path: Path):
    directory = f"data.encoded={tmp_path / 'encoded'}"
    code, out, _ = call("encode", config, directory, "--only", "world_encoder")
    assert code == 0
    assert "4 pictures to encode" in out
    assert "world_encoder: 4 encoded, 4 kept; 4,096 bytes, 1,024 each" in out
    assert "ms to encode one" in out
    assert "a pass over 4 pictures" in out
    assert "vision_tower" not in out
    code, out, _ = call("train", config, directory)
    assert code == 0
    assert "run: reads 0 entries of vision_tower, 4 entries of world_encoder from" in out


def test_wrong_inputs_end_with_problems(call: Call, config: str):
    code, _, err = call("encode", config, "data.encoded=here", "--only", "world_encodr")
    assert code == 2
    assert "--only: is no frozen encoder of this run (got 'world_encodr'); did you mean 'world_encoder'?" in err
    code, _, err = call("encode", config)
    assert code == 2
    assert "data.encoded: names the directory to fill, and is not set; such as data.encoded=runs/encoded" in err
