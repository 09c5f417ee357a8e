"""What the tests of every layer share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.helpers.tiny import TinyCheckpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """A tiny checkpoint, written once and only read by the tests."""
    from tests.helpers.tiny import write_tiny_checkpoint  # here, as most tests need no torch

    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")
