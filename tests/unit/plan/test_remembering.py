"""Protects the shortcut through fake operators: what is made again is what the operator itself would make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.planned import architecture, run_config
from theworld_train.plan.dry_run import dry_run
from theworld_train.plan.remembering import _RECIPES, RememberingFakeMode

Operation = Callable[..., Any]


@pytest.fixture(autouse=True)
def _forgetful() -> None:
    _RECIPES.clear()


def twice(operation: Operation) -> tuple[Any, Any]:
    """Returns what an operation makes of new tensors the first time and the second time."""
    with RememberingFakeMode():
        return tuple(operation(torch.empty(4, 6), torch.empty(6, 4)) for _ in range(2))


OPERATIONS: dict[str, Operation] = {
    "new": lambda a, b: a @ b,
    "strided": lambda a, b: torch.empty_like(b.t()),
    "view": lambda a, b: a[1:, ::2],
    "view of another dtype": lambda a, b: a.view(torch.int16),
    "expanded": lambda a, b: a[:1].expand(3, 6),
    "several": lambda a, b: a.max(0).values,
    "list": lambda a, b: torch._foreach_add([a, b], 1.0)[1],
    "split": lambda a, b: a.split(2)[1],
    "in place": lambda a, b: a.add_(1),
    "cast": lambda a, b: b.to(torch.bfloat16),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_what_is_made_again_is_alike(operation: Operation):
    first, second = twice(operation)
    for read in (Tensor.size, Tensor.stride, Tensor.storage_offset):
        assert read(first) == read(second)
    assert first.dtype == second.dtype
    assert first.device == second.device
    assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes()


def test_views_and_results_in_place_share_the_storage_of_their_input():
    with RememberingFakeMode():
        for _ in range(2):
            tensor, other = torch.empty(4, 6), torch.empty(4, 6)
            assert torch._foreach_mul_([other, tensor], 2.0)[1] is tensor
            assert tensor.add_(1) is tensor
            assert torch.add(tensor, 1, out=other) is other
            storages = [each.untyped_storage()._cdata for each in (tensor, tensor.t(), tensor + 1)]
            assert storages[0] == storages[1] != storages[2]


def test_numbers_that_are_equal_are_told_apart_by_their_kind():
    with RememberingFakeMode():
        tensor = torch.empty(4, dtype=torch.int64)
        assert [(tensor + value).dtype for value in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]


def test_an_operator_that_changes_the_shape_of_its_input_runs_every_time():
    with RememberingFakeMode():
        for _ in range(2):
            tensor = torch.empty(4, 6)
            tensor.t_()
            assert tensor.shape == (6, 4)


def test_constants_keep_their_values():
    with RememberingFakeMode():
        assert [torch.tensor(value).item() for value in (1, 2)] == [1, 2]


def test_a_dry_run_knows_the_ids_of_a_batch_of_any_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("theworld_train.plan.known_values.LARGEST_KNOWN", 1)
    assert dry_run(run_config(), architecture=architecture(), steps=1).trace.events


def test_a_dry_run_sees_what_it_sees_without(monkeypatch: pytest.MonkeyPatch):
    def births() -> list[tuple[int, str, int]]:
        run = dry_run(run_config(), architecture=architecture(), steps=1)
        alive = run.timeline().total.tolist()
        made = [(event, total) for event, total in zip(run.trace.events, alive, strict=True) if event.is_birth]
        return [(event.allocation.size, event.allocation.op, total) for event, total in made]

    quick = births()
    monkeypatch.setattr(RememberingFakeMode, "__torch_dispatch__", FakeTensorMode.__torch_dispatch__)
    assert births() == quick
