"""Ranges of the profiler's trace: which part of a step, and which component of the model, is at work."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.profiler import record_function
from transformers.modeling_layers import GradientCheckpointingLayer

from theworld_train.config.components import Component
from theworld_train.memory.tracker import LOSS, OPTIMIZER, SEQUENCE, Phase
from theworld_train.model.components import component_modules
from theworld_train.train.stage import StageModule

#: What the name of a range begins with, by which it is told from all else in a trace.
PREFIX = "theworld/"
STEP, DATA, BACKWARD = "step", "data", "backward"


class _Open(NamedTuple):
    """A range that is open.

    Attributes:
        part: What works.
        module: The module whose call it is, if it is one.
        range: The profiler's; None inside of another one of the same part.
    """

    part: str
    module: nn.Module | None
    range: record_function | None


class Ranges:
    """Opens and closes ranges as a step goes on.

    Components are told by calls of their modules: of a component as a whole, of the embedding, which the stage calls by
    itself, and of layers, which checkpointing runs again in the backward pass. What the stage does outside of them is
    `sequence` before the language model has run and `loss`, with the head, after it.
    """

    def __init__(self, stage: StageModule) -> None:
        """Args: stage: the module of the step."""
        self._stage = stage
        self._open: list[_Open] = []

    @contextmanager
    def watching(self) -> Generator[None]:
        """Follows the calls of modules while the context is open."""
        model = self._stage.model
        parts: dict[nn.Module, str] = {self._stage: SEQUENCE, model.lm_head: LOSS}
        modules = component_modules(model)
        for component, module in modules.items():
            layers = (each for each in module.modules() if isinstance(each, GradientCheckpointingLayer))
            parts |= dict.fromkeys([module, *layers], component.value)
        parts[model.get_input_embeddings()] = Component.LANGUAGE_MODEL.value
        after = {modules[Component.LANGUAGE_MODEL]: LOSS}
        handles = []
        for module, part in parts.items():
            begin, end = partial(self._begin_call, part), partial(self._end_call, after.get(module))
            handles.append(module.register_forward_pre_hook(begin))
            # A recomputation that has all it needs leaves its layer by an exception.
            handles.append(module.register_forward_hook(end, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """Runs a block as a range; what is still open in it ends with it."""
        depth = len(self._open)
        self._begin(name)
        try:
            yield
        finally:
            self._end(depth)

    def enter(self, phase: Phase) -> None:
        """Begins the range of a phase that no module stands for; see `PhasedEngine`."""
        if self._open and self._open[-1].part in (BACKWARD, OPTIMIZER):
            self._end(len(self._open) - 1)
        if phase in (BACKWARD, OPTIMIZER):
            self._begin(phase)

    def _begin_call(self, part: str, module: nn.Module, _args: Any) -> None:  # noqa: ANN401
        self._begin(part, module)

    def _end_call(self, after: str | None, module: nn.Module, *_: Any) -> None:
        depths = [depth for depth, each in enumerate(self._open) if each.module is module]
        if depths:
            self._end(depths[-1])
        if after is not None:
            self._begin(after)

    def _begin(self, part: str, module: nn.Module | None = None) -> None:
        inside = bool(self._open) and self._open[-1].part == part
        opened = None if inside else record_function(PREFIX + part)
        if opened is not None:
            opened.__enter__()
        self._open.append(_Open(part, module, opened))

    def _end(self, depth: int) -> None:
        """Ends the ranges from some depth on, the innermost first."""
        while len(self._open) > depth:
            opened = self._open.pop().range
            if opened is not None:
                opened.__exit__(None, None, None)
