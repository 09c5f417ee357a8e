"""Real values of small integer tensors under fake tensors, so that code which reads them runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_map_only

from theworld_train.plan.remembering import RememberingFakeMode

#: Elements of the largest tensor whose values are followed in any case; masks over pairs of positions are larger.
LARGEST_KNOWN = 2**18

_ATEN = torch.ops.aten
_VALUE = "_known_value"


class KnowingFakeMode(RememberingFakeMode):
    """Fake tensors, with the values of small integer ones computed for real beside them.

    A step reads a few values: which positions are supervised, whether placeholders and features agree in number. They
    all come from ids and masks, which a plan knows. Floating-point values are not known; one that is read is NaN, which
    no branch of a step may depend on.
    """

    def __init__(self, rows: int = 0, positions: int = 0) -> None:
        """Real tensors are taken in as fake ones.

        Args:
            rows: Rows of a batch, whose ids and masks are followed however large it is.
            positions: Positions of a row; layouts of attention pad it by one.
        """
        super().__init__(allow_non_fake_inputs=True)
        self._largest = max(LARGEST_KNOWN, rows * (positions + 1))

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 (an operator)
        types: Any,  # noqa: ANN401
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> Any:  # noqa: ANN401
        """Runs one operator, with values where they are known and needed."""
        args, kwargs = tuple(args), dict(kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            with self:
                result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:  # noqa: ANN401
        """Computes the values of a result whose inputs are known."""
        if isinstance(result, FakeTensor) and result.dtype.is_floating_point:
            return
        results = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, FakeTensor)]
        if not results or any(leaf.numel() > self._largest or leaf.is_floating_point() for leaf in results):
            return
        if torch.Tag.nondeterministic_seeded in func.tags:
            return
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if any(known_value(tensor) is None for tensor in tensors):
            for leaf in results:
                setattr(leaf, _VALUE, None)  # an operator in place may have overwritten something known
            return
        with unset_fake_temporarily(), torch.no_grad():
            real_args, real_kwargs = tree_map_only(Tensor, known_value, (args, kwargs))
            made = tree_flatten(func(*real_args, **real_kwargs))[0]
        values = [leaf for leaf in made if isinstance(leaf, Tensor)]
        for leaf, value in zip(results, values, strict=True):
            setattr(leaf, _VALUE, value)


def known_value(tensor: Tensor) -> Tensor | None:
    """Returns the values of a tensor, or None if it is fake and they are not known."""
    return getattr(tensor, _VALUE, None) if isinstance(tensor, FakeTensor) else tensor


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """`item()`: the value if it is known, NaN for an unknown float."""
    value = known_value(args[0])
    if value is not None:
        with unset_fake_temporarily():
            return value.item()
    return float("nan") if args[0].is_floating_point() else NotImplemented


def _nonzero(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """The places of true elements, `(number, dimensions)`."""
    value = known_value(args[0])
    if value is None:
        return NotImplemented
    with unset_fake_temporarily():
        places = value.nonzero()
    return _made(args[0], places.shape, torch.int64, places)


def _index(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Reading or writing at a mask: the mask becomes places, as the kernels themselves do it."""
    if not any(index is not None and index.dtype is torch.bool for index in args[1]):
        return NotImplemented
    indices: list[Tensor | None] = []
    for index in args[1]:
        if index is None or index.dtype is not torch.bool:
            indices.append(index)
            continue
        value = known_value(index)
        if value is None:
            return NotImplemented
        with unset_fake_temporarily():
            places = value.nonzero(as_tuple=True)
        indices += [_made(index, place.shape, torch.int64, place) for place in places]
    return func(args[0], indices, *args[2:], **kwargs)


def _masked_select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """The elements under a mask that is broadcast over the tensor."""
    source, mask = args
    value = known_value(mask)
    if value is None:
        return NotImplemented
    with unset_fake_temporarily():
        number = int(value.sum()) * (torch.broadcast_shapes(source.shape, mask.shape).numel() // mask.numel())
    return _made(source, (number,), source.dtype, None)


def _made(like: Tensor, shape: Sequence[int], dtype: torch.dtype, value: Tensor | None) -> Tensor:
    """Returns a fake tensor with these values, or with unknown ones."""
    result = like.new_empty(tuple(shape), dtype=dtype)
    setattr(result, _VALUE, value)
    return result


_HANDLERS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    _ATEN._local_scalar_dense.default: _read,
    _ATEN.nonzero.default: _nonzero,
    _ATEN.index.Tensor: _index,
    _ATEN.index_put.default: _index,
    _ATEN.index_put_.default: _index,
    _ATEN._index_put_impl_.default: _index,
    _ATEN.masked_select.default: _masked_select,
}
