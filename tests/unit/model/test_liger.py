"""What surrounds Liger's kernels: which head computes its loss, and where the kernels cannot run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from theworld_train.model import liger
from theworld_train.model.liger import LigerHead, find_obstacle, fuse_head


def test_a_fused_head_still_gives_logits_by_the_same_weight():
    head = nn.Linear(4, 9, bias=False)
    weight, states = head.weight, torch.randn(2, 3, 4)
    logits = head(states)
    fuse_head(head)
    assert isinstance(head, LigerHead)
    assert head.weight is weight
    assert torch.equal(head(states), logits)


@pytest.mark.parametrize(
    ("installed", "gpu", "obstacle"),
    [
        (False, True, "needs the package 'liger-kernel', which is not installed"),
        (True, False, "needs a GPU, and there is none"),
        (True, True, None),
    ],
)
def test_what_stands_in_the_way(installed: bool, gpu: bool, obstacle: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(liger, "find_spec", lambda _name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert find_obstacle() == obstacle
