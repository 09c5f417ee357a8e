"""Norms of gradients and weights, one for each component that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

#: Given a parameter, what this rank holds of it, or of its gradient; None if that is nothing.
PartOf = Callable[[nn.Parameter], Tensor | None]


def parameters_by_component(optimizer: torch.optim.Optimizer) -> dict[str, list[nn.Parameter]]:
    """Returns the parameters of an optimizer by component, which the names of its groups begin with.

    Groups without a name, as of an optimizer that was not made by `build_optimizer`, are left out.
    """
    components: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        if "name" in group:
            components.setdefault(group["name"].split("/")[0], []).extend(group["params"])
    return components


@torch.no_grad()
def component_norms(
    components: Mapping[str, Sequence[nn.Parameter]], part_of: PartOf, *, sharded: bool, copies: int = 1
) -> dict[str, Tensor]:
    """Returns the 2-norm of each component, in fp64.

    Args:
        components: Parameters by component.
        part_of: What is measured of each.
        sharded: Whether ranks hold different parts; each of them then calls it.
        copies: How many ranks hold each part, if they are sharded.
    """
    if not components:
        return {}
    squares = []
    for parameters in components.values():
        parts = [part for part in map(part_of, parameters) if part is not None and part.numel()]
        # A sum of squares of all numbers would not be exact in fp32; one of the tensors' norms is, in fp64. Norms of
        # bf16 weights would be rounded to bf16.
        norms = torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32)) if parts else parameters[0].new_zeros(1)
        squares.append(norms.double().square().sum())
    total = torch.stack(squares)
    if sharded:
        torch.distributed.all_reduce(total)
    return dict(zip(components, (total / copies).sqrt(), strict=True))
