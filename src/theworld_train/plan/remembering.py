"""Fake tensors made quickly: what an operator has made of tensors of some shapes, it makes of others of these shapes.

A step of a large model repeats a few thousand operations many times. PyTorch has such a cache itself, whose keys allow
for symbolic shapes, several devices and sparse layouts, and take longer than all the rest of an operation. A plan's
tensors are dense, on one device, and their sizes are numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class _Made(NamedTuple):
    """How to make a tensor again.

    Attributes:
        source: Number of the input whose storage it shares; None if it has its own.
        is_source: Whether it is that input itself.
        shape: Its shape.
        stride: Its strides.
        offset: Elements of the storage before it.
        dtype: Its dtype.
        device: Its device.
    """

    source: int | None
    is_source: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _Recipe(NamedTuple):
    """How to make a result again.

    Attributes:
        container: What holds the results of an operator; None if it has one.
        parts: The results; None stands for itself.
    """

    container: type[tuple[Any, ...]] | type[list[Any]] | None
    parts: tuple[_Made | None, ...]


#: What is known of operations, None where they have to run every time. All modes share it.
_RECIPES: dict[tuple[Any, ...], _Recipe | None] = {}


class RememberingFakeMode(FakeTensorMode):
    """Fake tensors that are dense and on one device; the result of an operation is worked out once."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to keep the compiler out costs more than an operator

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 (an operator)
        types: Any,  # noqa: ANN401
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> Any:  # noqa: ANN401
        """Runs one operator, or makes again what it has made."""
        tensors: list[FakeTensor] = []
        key = _key(func, args, kwargs, tensors)
        if key is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if key not in _RECIPES:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            reshaped = _key(func, args, kwargs, []) != key
            _RECIPES[key] = None if reshaped else _recipe(result, tensors)
            return result
        recipe = _RECIPES[key]
        if recipe is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        results = [None if part is None else self._make(part, tensors) for part in recipe.parts]
        return results[0] if recipe.container is None else recipe.container(results)

    def _make(self, made: _Made, tensors: Sequence[FakeTensor]) -> FakeTensor:
        if made.source is None:
            element = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
            return FakeTensor(self, element, made.device)
        source = tensors[made.source]
        if made.is_source:
            return source
        element = torch.empty(0, dtype=made.dtype, device="meta")
        element.set_(source.untyped_storage(), made.offset, made.shape, made.stride)
        return FakeTensor(self, element, made.device)


def _key(
    func: Any,  # noqa: ANN401 (an operator)
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: list[FakeTensor],
) -> tuple[Any, ...] | None:
    """Returns what a result follows from, and collects the inputs that are tensors; None if that is not all."""
    values: list[Any] = [func, torch.get_default_dtype()]
    if not _describe(args, values, tensors) or not _describe(kwargs.items(), values, tensors):
        return None
    return tuple(values)


def _describe(inputs: Iterable[Any], values: list[Any], tensors: list[FakeTensor]) -> bool:
    """Adds inputs to a key, and says whether the key holds all that matters of them."""
    for value in inputs:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.dtype.is_complex:  # its values or a lazy conjugation matter
                return False
            values += (value.dtype, value.shape, value.stride(), value.storage_offset())
            tensors.append(value)
        elif kind is tuple or kind is list:
            values += (kind, len(value))
            if not _describe(value, values, tensors):
                return False
        elif isinstance(value, Tensor):
            return False
        else:
            values += (kind, value)  # with the kind, for 1, 1.0 and True are equal
    return True


def _recipe(result: Any, tensors: Sequence[FakeTensor]) -> _Recipe | None:  # noqa: ANN401 (whatever operators return)
    """Returns how to make a result again from inputs of the same shapes, or None if that cannot be said."""
    container = type(result) if type(result) in (tuple, list) else None
    results = (result,) if container is None else result
    if not all(each is None or (type(each) is FakeTensor and each.constant is None) for each in results):
        return None
    parts = tuple(None if each is None else _made(each, tensors) for each in results)
    own = [each for each, part in zip(results, parts, strict=True) if part is not None and part.source is None]
    storages = {each.untyped_storage()._cdata for each in own}
    if len(storages) < len(own) or not all(_fills_storage(each) for each in own):
        return None
    return _Recipe(container, parts)


def _made(result: FakeTensor, tensors: Sequence[FakeTensor]) -> _Made:
    storage = result.untyped_storage()._cdata
    same = [number for number, tensor in enumerate(tensors) if tensor is result]
    sharing = [number for number, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == storage]
    return _Made(
        source=next(iter(same + sharing), None),
        is_source=bool(same),
        shape=tuple(result.shape),
        stride=result.stride(),
        offset=int(result.storage_offset()),
        dtype=result.dtype,
        device=result.fake_device,
    )


def _fills_storage(tensor: Tensor) -> bool:
    """Whether a tensor's storage is as large as that of a new tensor of its shape and strides."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    elements = last + 1 if tensor.numel() else 0
    return tensor.untyped_storage().nbytes() == elements * tensor.element_size()
