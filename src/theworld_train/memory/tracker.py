"""Follows every live storage of a step: how many bytes, holding what, for which component, made by which operator."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Category = Literal["weights", "masters", "gradients", "optimizer", "activations", "temporaries"]
CATEGORIES: tuple[Category, ...] = ("weights", "masters", "gradients", "optimizer", "activations", "temporaries")

Phase = Literal["load", "encode", "forward", "backward", "optimizer"]

#: Where memory belongs that no module has made: before the language model runs, after it, and while weights move.
SEQUENCE, LOSS, OPTIMIZER = "sequence", "loss", "optimizer"

#: Path of the module after which everything outside of modules belongs to the loss.
LANGUAGE_MODEL = "model.language_model"

_DEVICE = torch.ops.prim.device.default
_TO_COPY = torch.ops.aten._to_copy.default


@dataclass(eq=False)
class Allocation:
    """One storage, from its birth to its death; both are indices into the events of the trace.

    Attributes:
        size: Bytes.
        category: What it holds.
        component: Component of the model that it belongs to, or `sequence`, `loss` or `optimizer`.
        module: Path of the module at work when it was made, empty outside of any.
        op: Operator that made it.
        phase: Phase in which it was made.
        region: Stretch of a phase in which it was made; a recomputation is a stretch of its own.
        in_forward: Whether a forward pass or a recomputation made it.
        born: Index of the event of its birth.
        died: Index of the event of its death; None if it outlives the trace.
        parameter: Name of the parameter that it is, or is the gradient, the copy or the state of; empty otherwise.
        accumulated: Of a gradient, the number of events before it was whole for the first time.
    """

    size: int
    category: Category
    component: str
    module: str
    op: str
    phase: Phase
    region: int
    in_forward: bool
    born: int
    died: int | None = None
    parameter: str = ""
    accumulated: int | None = None


@dataclass(frozen=True)
class Event:
    """A birth or a death.

    Attributes:
        allocation: Whose.
        is_birth: Which of the two.
        phase: Phase in which it happened.
        step: Optimizer step, counted from 0; -1 before the first.
    """

    allocation: Allocation
    is_birth: bool
    phase: Phase
    step: int


@dataclass
class Trace:
    """What a tracker has seen.

    Attributes:
        events: Births and deaths in their order.
        calls: Calls of each watched module, as (first event, event behind the last), recomputations not counted.
        backward_starts: Events before which the backward pass of each watched module began.
    """

    events: list[Event] = field(default_factory=list)
    calls: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    backward_starts: dict[str, list[int]] = field(default_factory=dict)


class MemoryTracker(TorchDispatchMode):
    """Follows the storages of tensors, real or fake, that operators make while the mode is entered.

    What an operator allocates and frees inside of its kernel stays unseen.
    """

    def __init__(self, device: str | None = None) -> None:
        """Starts in the phase `load` with nothing alive.

        Args:
            device: Type of the only device whose storages count, such as `cuda`; all of them if absent.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.phase: Phase = "load"
        self.step = -1
        self._device = device
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], Allocation]] = {}
        self._paths: dict[int, str] = {}
        self._watched: set[str] = set()
        self._components: dict[str, str] = {}
        self._stack: list[tuple[str, int]] = []
        self._backward_module = ""
        self._outside = SEQUENCE
        self._region = 0
        self._recomputing = False
        self._finished = False

    # -- what the caller tells ----------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Says that another optimizer step begins."""
        self.step = step
        self.enter_phase("encode")

    def enter_phase(self, phase: Phase) -> None:
        """Says that another phase of the step begins."""
        self.phase = phase
        self._region += 1
        self._recomputing = False
        self._backward_module = ""
        if phase == "encode":
            self._outside = SEQUENCE
        elif phase == "optimizer":
            self._outside = OPTIMIZER

    def adopt(self, tensor: Tensor, category: Category, component: str, parameter: str = "") -> None:
        """Sets what a tensor holds, whether or not the tracker has seen it before."""
        allocation = self._see(tensor, "")
        if allocation is not None:
            allocation.category, allocation.component, allocation.parameter = category, component, parameter

    def adopt_parameter(self, parameter: nn.Parameter, component: str, name: str) -> None:
        """Takes in a weight and follows its gradient."""
        is_master = parameter.requires_grad and parameter.dtype is torch.float32
        self.adopt(parameter, "masters" if is_master else "weights", component, name)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(self._gradient, component, name))

    def adopt_state(self, optimizer: torch.optim.Optimizer, names: dict[int, tuple[str, str]]) -> None:
        """Follows the optimizer's state, what there is of it and what its steps make.

        Args:
            optimizer: The optimizer.
            names: Component and name of each parameter by its identity.
        """

        def after_step(stepped: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:  # noqa: ANN401
            for parameter, state in stepped.state.items():
                for value in state.values():
                    if isinstance(value, Tensor):
                        self.adopt(value, "optimizer", *names[id(parameter)])

        after_step(optimizer, (), {})
        optimizer.register_step_post_hook(after_step)

    @contextmanager
    def watching(self, root: nn.Module, components: dict[str, str], units: tuple[str, ...]) -> Generator[None]:
        """Knows which module is at work while the context is open.

        Args:
            root: The whole model.
            components: The component of a module by the path that its own begins with.
            units: Paths of modules whose calls are noted in the trace.
        """
        self._paths = {id(module): path for path, module in root.named_modules() if path}
        self._components = components
        self._watched = set(units)
        handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `RememberingFakeMode`

    # -- what it sees -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 (an operator)
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Runs one operator and takes in what it has made."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for more often than all else, and otherwise answered by every mode
        recomputing = self.phase == "backward" and torch.is_grad_enabled()
        if recomputing != self._recomputing:
            self._recomputing = recomputing
            self._region += 1
        result = func(*args, **(kwargs or {}))
        op = func.overloadpacket.__name__
        for leaf in (result,) if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, op)
        if func is _TO_COPY:
            self._take_for_copy(args[0], result)
        return result

    def _see(self, tensor: Tensor, op: str) -> Allocation | None:
        """Takes in the storage of a tensor, and returns what is known of it; None if it is empty."""
        if self._device is not None and tensor.device.type != self._device:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            return known[1]
        size = storage.nbytes()
        if not size:
            return None
        module = self._module()
        allocation = Allocation(
            size=size,
            category="temporaries",
            component=self.component_of(module),
            module=module,
            op=op,
            phase=self.phase,
            region=self._region,
            in_forward=self.phase in ("encode", "forward") or self._recomputing,
            born=len(self.trace.events),
        )
        self._live[key] = (weakref.ref(storage, partial(self._lose, key)), allocation)
        self.trace.events.append(Event(allocation, True, self.phase, self.step))
        return allocation

    def _lose(self, key: int, _reference: weakref.ref[torch.UntypedStorage]) -> None:
        """Notes a death."""
        _, allocation = self._live.pop(key)
        if self._finished:
            return
        allocation.died = len(self.trace.events)
        self._judge(allocation)
        self.trace.events.append(Event(allocation, False, self.phase, self.step))

    def _judge(self, allocation: Allocation) -> None:
        """Calls what a forward pass has made and the backward pass has needed an activation."""
        if allocation.category == "temporaries" and allocation.in_forward and allocation.region != self._region:
            allocation.category = "activations"

    def finish(self) -> Trace:
        """Returns the trace, with a verdict on what is still alive; nothing is added to it from then on."""
        self._finished = True
        self._region += 1
        for _, allocation in self._live.values():
            self._judge(allocation)
        return self.trace

    def _take_for_copy(self, source: Tensor, copy: Tensor) -> None:
        """Calls the cast of a weight, which computes in its place, a weight too."""
        known = self._live.get(source.untyped_storage()._cdata)
        if known is not None and known[1].category in ("weights", "masters") and known[1].parameter:
            self.adopt(copy, "weights", known[1].component, known[1].parameter)

    def _gradient(self, component: str, name: str, parameter: Tensor) -> None:
        """Takes in a gradient that has just been accumulated."""
        assert parameter.grad is not None
        self.adopt(parameter.grad, "gradients", component, name)
        allocation = self._live[parameter.grad.untyped_storage()._cdata][1]
        if allocation.accumulated is None:
            allocation.accumulated = len(self.trace.events)

    # -- modules ------------------------------------------------------------------------------------------------------

    def _module(self) -> str:
        return self._stack[-1][0] if self._stack else self._backward_module

    def component_of(self, module: str) -> str:
        """Returns the component of a module, or what everything outside of modules now belongs to."""
        parts = module.split(".")
        for length in range(len(parts), 0, -1):
            component = self._components.get(".".join(parts[:length]))
            if component is not None:
                return component
        return self._outside

    def _enter_module(self, module: nn.Module, _args: Any) -> None:  # noqa: ANN401
        path = self._paths.get(id(module))
        if path is not None:
            self._stack.append((path, len(self.trace.events)))

    def _leave_module(self, module: nn.Module, _args: Any, output: Any) -> None:  # noqa: ANN401
        """Leaves a module, and marks where its backward pass will begin."""
        path = self._paths.get(id(module))
        if path is None:
            return
        while self._stack:  # a recomputation that stops early leaves modules inside of others unfinished
            top, start = self._stack.pop()
            if top == path:
                break
        if path == LANGUAGE_MODEL:
            self._outside = LOSS
        if self.phase == "backward":
            return
        if path in self._watched:
            self.trace.calls.setdefault(path, []).append((start, len(self.trace.events)))
        for leaf in tree_iter(output):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                self._mark_backward(leaf.grad_fn, path)

    def _mark_backward(self, node: torch.autograd.graph.Node, path: str) -> None:
        """Has the backward pass say that it comes to the output of a module."""
        if path in self._watched:
            node.register_prehook(partial(self._note_backward, path))
        metadata: Any = node.metadata
        if "module" not in metadata:  # else it is the output of a module inside of this one
            metadata["module"] = path
            node.register_prehook(partial(self._enter_backward, path))

    def _enter_backward(self, path: str, _gradients: Any) -> None:  # noqa: ANN401
        self._backward_module = path

    def _note_backward(self, path: str, _gradients: Any) -> None:  # noqa: ANN401
        self.trace.backward_starts.setdefault(path, []).append(len(self.trace.events))
