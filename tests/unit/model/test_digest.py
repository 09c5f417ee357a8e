"""A digest tells every change of a tensor, and nothing else."""

from __future__ import annotations

import pytest
import torch

from theworld_train.model import digest
from theworld_train.model.digest import combined_digest, digests, tensor_digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_equal_tensors_have_equal_digests(dtype: torch.dtype):
    tensor = torch.arange(12).to(dtype)
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())
    assert tensor_digest(tensor[::2]) == tensor_digest(tensor[::2].contiguous()), "layout in memory does not count"


def test_one_bit_changes_it():
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(0))
    before = tensor_digest(tensor)
    tensor.view(torch.int32)[57] ^= 1
    assert tensor_digest(tensor) != before
    tensor.view(torch.int32)[57] ^= 1
    assert tensor_digest(tensor) == before


def test_dtype_shape_and_the_sign_of_zero_count():
    zeros = torch.zeros(4)
    others = [zeros.view(2, 2), zeros.to(torch.float64)[:2], zeros.view(torch.int32), -zeros, torch.zeros(5)]
    assert len({tensor_digest(tensor) for tensor in [zeros, *others]}) == 6


def test_scalars_and_empty_tensors_have_one():
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor(2.0))
    assert tensor_digest(torch.empty(0)) == tensor_digest(torch.empty(0))


def test_tensors_that_need_several_chunks(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    whole = tensor_digest(tensor)
    monkeypatch.setattr(digest, "_CHUNK", 64)
    assert tensor_digest(tensor) == whole


def test_combined_digest_knows_names_and_not_their_order():
    a, b = torch.ones(2), torch.zeros(2)
    assert combined_digest({"a": a, "b": b}) == combined_digest({"b": b, "a": a})
    assert combined_digest({"a": a, "b": b}) != combined_digest({"a": b, "b": a})
    assert digests({"a": a}) == {"a": tensor_digest(a)}
