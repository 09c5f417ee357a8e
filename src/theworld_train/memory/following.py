"""Has a tracker follow the steps of a model, fake or real: what is there before, and where in a step it is."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from theworld_train.batch import Batch
from theworld_train.memory.tracker import LOSS, SEQUENCE, MemoryTracker, Phase
from theworld_train.model.components import COMPONENT_PATHS, component_parameters
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.train.engine import Engine

#: The component of a module by the path that its own begins with; the head belongs to the loss.
PLACES = {path: component.value for component, path in COMPONENT_PATHS.items()} | {"lm_head": LOSS}


class PhasedEngine:
    """An engine that says where in a step it is."""

    def __init__(self, engine: Engine, enter: Callable[[Phase], None]) -> None:
        """Args: engine: does the work. enter: told of every phase that begins."""
        self.wrapped, self.optimizer = engine.wrapped, engine.optimizer
        self._engine, self._enter = engine, enter

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Begins the forward pass, and after it the next micro-batch or the optimizer."""
        return self._micro_batch(last)

    @contextmanager
    def _micro_batch(self, last: bool) -> Generator[None]:
        self._enter("forward")
        with self._engine.accumulating(last=last):
            yield
        self._enter("optimizer" if last else "encode")

    def backward(self, loss: Tensor) -> None:
        """Runs the backward pass."""
        self._enter("backward")
        self._engine.backward(loss)

    def gradient_norms(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return self._engine.gradient_norms()

    def weight_norms(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return self._engine.weight_norms()

    def step(self, max_norm: float | None) -> Tensor:
        """See `Engine`."""
        return self._engine.step(max_norm)

    def held(self, parameter: nn.Parameter) -> Tensor:
        """See `Engine`."""
        return self._engine.held(parameter)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """See `Engine`."""
        return self._engine.whole(parameter)

    def slots(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See `Engine`."""
        return self._engine.slots(parameter)

    def load_slots(self, parameter: nn.Parameter, slots: dict[str, Tensor]) -> None:
        """See `Engine`."""
        self._engine.load_slots(parameter, slots)


@contextmanager
def following(
    tracker: MemoryTracker,
    model: TheWorldForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    units: tuple[str, ...] = (),
) -> Generator[None]:
    """Follows every storage while the context is open.

    Args:
        tracker: What follows; told of what is there already.
        model: The model, frozen and trainable parts set.
        optimizer: Over its parameters, with or without state.
        batches: Micro-batches that wait, on the model's device.
        units: Paths of modules whose calls are noted in the trace.
    """
    with tracker, tracker.watching(model, PLACES, units):
        names: dict[int, tuple[str, str]] = {}
        for component, parameters in component_parameters(model).items():
            for name, parameter in parameters.items():
                tracker.adopt_parameter(parameter, component.value, name)
                names[id(parameter)] = (component.value, name)
        for name, buffer in model.named_buffers():
            tracker.adopt(buffer, "weights", tracker.component_of(name))
        tracker.adopt_state(optimizer, names)
        for batch in {id(batch): batch for batch in batches}.values():
            for value in vars(batch).values():
                if isinstance(value, Tensor):
                    tracker.adopt(value, "activations", SEQUENCE)
        yield
