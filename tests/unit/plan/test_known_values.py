"""Protects fake tensors that know small integer values: the reads of a step get their answers, and no wrong ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from theworld_train.plan.known_values import LARGEST_KNOWN, KnowingFakeMode


@pytest.fixture(autouse=True)
def fake_mode():
    with KnowingFakeMode():
        yield


def test_values_are_computed_through_views_and_operators():
    labels = torch.tensor([[-100, 3, -100, 5]])
    assert isinstance(labels + 0, FakeTensor)
    assert int((labels[:, 1:] != -100).sum()) == 2


def test_changes_in_place_are_followed():
    ids = torch.zeros(4, dtype=torch.int64)
    view = ids[1:3]
    view += 7
    assert int(ids.sum()) == 14


def test_an_unknown_value_overwrites_a_known_one():
    ids = torch.zeros(4, dtype=torch.int64)
    ids.copy_(torch.randint(9, (4,)))
    with pytest.raises(DataDependentOutputException):
        ids.sum().item()


def test_floats_read_as_nan():
    assert math.isnan(float(torch.ones(3).sum()))


def test_large_tensors_are_not_followed():
    with pytest.raises(DataDependentOutputException):
        torch.ones(LARGEST_KNOWN + 1, dtype=torch.int64).sum().item()


def test_masks_select_as_many_elements_as_they_hold():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    hidden = torch.empty(2, 3, 8)
    assert hidden[mask].shape == (3, 8)
    assert mask.nonzero().shape == (3, 2)
    assert hidden.masked_select(mask.unsqueeze(-1)).shape == (24,)
    assert torch.tensor([[1, 2, 3], [4, 5, 6]])[mask].sum().item() == 10


def test_gradients_flow_through_a_mask():
    mask = torch.tensor([True, False, True])
    hidden = torch.empty(3, 8, requires_grad=True)
    hidden[mask].sum().backward()
    assert hidden.grad.shape == hidden.shape
    embeds = torch.empty(3, 8, requires_grad=True)
    features = torch.empty(2, 8, requires_grad=True)
    embeds.masked_scatter(mask.unsqueeze(-1), features).sum().backward()
    assert features.grad.shape == features.shape
