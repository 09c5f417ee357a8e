"""Liger's kernels on CPU tensors, interpreted by Triton; `test_liger.py` runs this in a process of its own.

Triton's interpreter has no functions of CUDA's libdevice, and leaves a number that a kernel is given as Python has it,
where the compiler makes fp32 of it. Both are supplied here. It cannot multiply two numbers in bf16, as the kernel of
the gated MLP does: that one is computed in fp32 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm, Gemma3TextConfig
from triton.runtime import interpreter

from tests.helpers.tiny import TinyCheckpoint, assistant, image, user
from tests.numerics.test_fast_step import config_of, loss_and_gradients
from theworld_train.assemble import model as assembly
from theworld_train.batch import Batch
from theworld_train.config.schema import CheckpointingMode, GradientCheckpointing
from theworld_train.data import Collator
from theworld_train.data.source import Sample
from theworld_train.model.kernels import make_lean
from theworld_train.model.liger import LIGER, fuse_head
from theworld_train.train.loss import supervised_loss


def by_numpy(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    """Returns a function of an interpreted kernel's tensors that NumPy computes."""

    def apply(given: Any) -> Any:
        values = function(given.handle.data).astype(given.handle.data.dtype)
        return tl.tensor(interpreter.TensorHandle(values, given.dtype), given.type)

    return apply


@pytest.fixture(autouse=True)
def _libdevice(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = interpreter._implicit_cvt

    def convert(given: Any) -> Any:
        if isinstance(given, float):
            return tl.tensor(interpreter.TensorHandle(np.array([given], np.float32), tl.float32), tl.float32)
        return plain(given)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(geglu, "tanh", by_numpy(np.tanh))
    monkeypatch.setattr(rms_norm, "rsqrt", by_numpy(lambda values: 1 / np.sqrt(values)))


def close(actual: Tensor, expected: Tensor) -> bool:
    assert actual.dtype == expected.dtype
    tolerance = 1e-5 if actual.dtype is torch.float32 else 2e-2
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def norm() -> Gemma3RMSNorm:
    module = Gemma3RMSNorm(48)
    nn.init.normal_(module.weight)
    return module


def mlp() -> Gemma3MLP:
    config = Gemma3TextConfig(hidden_size=48, intermediate_size=72, hidden_activation="gelu_pytorch_tanh")
    return Gemma3MLP(config)


def outcomes(module: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Returns the output and all gradients, where the inputs also pass the module by, as in Gemma's layers."""
    inputs = inputs.clone().requires_grad_()
    output = inputs.sin() + module(inputs)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, [inputs, *trained], weight)]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("make", "dtype"), [(norm, torch.float32), (norm, torch.bfloat16), (mlp, torch.float32)])
def test_forms_compute_what_the_plain_ones_do(make: Callable[[], nn.Module], dtype: torch.dtype, frozen: bool):
    torch.manual_seed(0)
    module = make().to(dtype).requires_grad_(not frozen)
    inputs = torch.randn(2, 48, 5, dtype=dtype).transpose(1, 2)  # as of heads: not in the order of memory
    expected = outcomes(module, inputs)
    make_lean(module, LIGER)
    assert type(module) in LIGER
    actual = outcomes(module, inputs)
    assert len(actual) == len(expected) == (2 if frozen else 2 + len(list(module.parameters())))
    assert all(map(close, actual, expected))


@pytest.mark.slow
def test_norms_of_many_short_rows_are_computed_by_blocks_of_rows():
    torch.manual_seed(0)
    module = Gemma3RMSNorm(16)
    nn.init.normal_(module.weight)
    inputs = torch.randn(8 * 4099, 16)  # of 32,768 rows on; the last block is not full
    expected = outcomes(module, inputs)
    make_lean(module, LIGER)
    assert all(map(close, outcomes(module, inputs), expected))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("supervised", [0, 1, 21])
@pytest.mark.parametrize("chunk_size", [4, 1024])
@pytest.mark.parametrize("precision", ["fp32", "bf16_pure", "bf16"])
def test_the_fused_head_computes_the_chunked_loss(precision: str, chunk_size: int, supervised: int, frozen: bool):
    torch.manual_seed(0)
    # bf16: what trains has weights in fp32, and is computed under autocast.
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    head = nn.Linear(16, 300, bias=False, dtype=torch.bfloat16 if precision == "bf16_pure" else torch.float32)
    nn.init.normal_(head.requires_grad_(not frozen).weight)
    hidden = torch.randn(2, 24, 16, dtype=dtype)
    labels = torch.full((2, 24), -100)
    labels.view(-1)[1 : 2 * supervised + 1 : 2] = torch.randint(300, (supervised,))
    results = []
    for fused in (False, True):
        if fused:
            fuse_head(head)
        states = hidden.clone().requires_grad_()
        chunks = max(1, -(-supervised // chunk_size))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            loss = supervised_loss(states, labels, head, chunk_size=chunk_size, chunks=chunks, fused=fused).loss_sum
        gradients = torch.autograd.grad(loss / 7, [states] if frozen else [states, head.weight])
        results.append([loss.detach(), *gradients])
    assert results[0][0].item() > 0 or not supervised
    if precision == "bf16":
        results = [[tensor.bfloat16() for tensor in result] for result in results]  # as exact as it was computed
    assert all(map(close, results[1], results[0]))


@pytest.fixture(scope="module")
def batch(tiny: TinyCheckpoint) -> Batch:
    conversations = [[user(image(4), "Which digit is it?"), assistant("7")], [user("Which one?"), assistant("five")]]
    samples = [Sample(str(index), "any", messages) for index, messages in enumerate(conversations)]
    return Collator(tiny.processor(), 4096)(samples)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainable", "checkpointing"),
    [(("world_projector",), "none"), (("world_projector", "language_model"), "full")],
    ids=["projection", "language"],
)
def test_a_step_has_the_same_loss_and_gradients(
    trainable: tuple[str, ...],
    checkpointing: CheckpointingMode,
    tiny: TinyCheckpoint,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(assembly, "find_obstacle", lambda: None)  # no GPU
    plain = config_of(tiny, trainable, attention="eager", kernels="plain")
    expected_loss, expected = loss_and_gradients(plain, batch)
    fused = config_of(tiny, trainable, kernels="liger")
    training = {"loss": "liger", "gradient_checkpointing": GradientCheckpointing.everywhere(checkpointing)}
    fused = fused.model_copy(update={"training": fused.training.model_copy(update=training)})
    loss, gradients = loss_and_gradients(fused, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    assert largest > 0
    for name, gradient in gradients.items():
        scale = max(float(expected[name].norm()), 1e-3 * largest)
        assert float((gradient - expected[name]).norm()) <= 1e-5 * scale, name
