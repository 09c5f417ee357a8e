"""A rank's view of its process group: random draws of its own, patience with others, and the way out of it."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from theworld_train.cli.ranks import offline
from theworld_train.config.errors import ConfigError
from theworld_train.train.runtime import Runtime
from theworld_train.train.stopping import StoppedError


class Rank(Runtime):
    """A rank without a process group."""

    world_size = 2
    device = torch.device("cpu")

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._patient: Any = "the patient group"
        self.left = ""

    @property
    def rank(self) -> int:
        return self._rank

    def close(self) -> None:
        self.left = "closed"

    def abort(self) -> None:
        self.left = "aborted"


def drawn(rank: int, seed: int, step: int) -> float:
    Rank(rank).seed(seed, step)
    return float(torch.rand(()))


def test_ranks_seeds_and_starting_steps_draw_differently_and_again_the_same():
    with torch.random.fork_rng(devices=[]):
        starts = [(rank, seed, step) for rank in range(3) for seed in range(3) for step in (0, 1, 5)]
        values = [drawn(*start) for start in starts]
        assert len(set(values)) == len(starts)
        assert [drawn(*start) for start in starts] == values


def test_ranks_agree_patiently_but_step_in_time(monkeypatch: pytest.MonkeyPatch):
    groups: list[Any] = []

    def all_gather(every: list[torch.Tensor], own: torch.Tensor, group: Any = None) -> None:
        groups.append(group)
        for tensor in every:
            tensor.copy_(own)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    runtime = Rank()
    with runtime.agreement():
        pass
    assert groups == ["the patient group"], "a save may take longer than runtime.timeout_s"
    runtime.exchange([1.0])
    assert groups == ["the patient group", None]


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (None, "closed"),
        (StoppedError(3), "closed"),
        (RuntimeError("out of memory"), "aborted"),
        (ConfigError("wrong"), "aborted"),
        (KeyboardInterrupt(), "aborted"),
    ],
)
def test_only_what_ends_on_all_ranks_together_waits_for_them(error: BaseException | None, left: str):
    runtime = Rank()
    with nullcontext() if error is None else pytest.raises(type(error)), runtime:
        if error is not None:
            raise error
    assert runtime.left == left


def test_what_bitsandbytes_says_at_every_start_is_left_out_and_no_more(caplog: pytest.LogCaptureFixture):
    offline()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no such module")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
