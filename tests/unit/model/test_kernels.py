"""Lean forms of norms and gated activations: the values of transformers' own, and less kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm, Gemma3TextConfig

from theworld_train.model.kernels import COMPILED, _as_written, _GatedGelu, find_compiler, make_lean


def norm(size: int = 32) -> Gemma3RMSNorm:
    module = Gemma3RMSNorm(size)
    nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
    return module


def mlp(activation: str = "gelu_pytorch_tanh") -> Gemma3MLP:
    torch.manual_seed(1)
    return Gemma3MLP(Gemma3TextConfig(hidden_size=32, intermediate_size=64, hidden_activation=activation))


def run(module: nn.Module, inputs: Tensor) -> tuple[Tensor, list[Tensor], int]:
    """Returns the output, the gradients, and the bytes kept in between besides weights."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = inputs.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(inputs)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad(output, [inputs, *module.parameters()], weight)
    return output.detach(), list(gradients), sum(kept.values())


@pytest.mark.parametrize("make", [norm, mlp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_forms_compute_what_the_plain_ones_do(make, dtype: torch.dtype):
    module = make().to(dtype)
    inputs = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    output, gradients, kept = run(module, inputs)
    make_lean(module)
    lean_output, lean_gradients, lean_kept = run(module, inputs)
    assert torch.equal(lean_output, output)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for actual, expected in zip(lean_gradients, gradients, strict=True):
        assert actual.dtype == expected.dtype
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    assert lean_kept < 0.8 * kept


def test_a_norm_keeps_its_input_and_a_number_for_each_row():
    module = nn.ModuleList([norm()]).bfloat16()
    make_lean(module)
    *_, kept = run(module[0], torch.randn(3, 5, 32, dtype=torch.bfloat16))
    assert kept == 15 * 32 * 2 + 15 * 4


def test_frozen_weights_get_no_gradient_and_inputs_still_do():
    module = norm().requires_grad_(False)
    make_lean(module)
    inputs = torch.randn(2, 32, requires_grad=True)
    module(inputs).sum().backward()
    assert module.weight.grad is None
    assert inputs.grad is not None


def test_gradients_are_those_of_finite_differences():
    inputs = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _GatedGelu.apply(x, x.flip(-1), _as_written), inputs)


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("make", [norm, mlp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_forms_compute_what_the_lean_ones_do(make, dtype: torch.dtype):
    lean, compiled = make().to(dtype), nn.ModuleList([make().to(dtype)])
    lean_list = nn.ModuleList([lean])
    make_lean(lean_list)
    make_lean(compiled, COMPILED)
    for length in (5, 7, 64):  # compiled once for all of them
        inputs = torch.randn(3, length, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        output, gradients, kept = run(lean_list[0], inputs)
        other, others, other_kept = run(compiled[0], inputs)
        tolerance = 1e-6 if dtype is torch.float32 else 1e-2
        for actual, expected in zip([other, *others], [output, *gradients], strict=True):
            assert actual.dtype == expected.dtype
            assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
        assert other_kept == kept


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="activation is relu, expected gelu_pytorch_tanh"):
        make_lean(mlp("relu"))


def test_parameters_stay_what_they_are():
    module = nn.ModuleDict({"norm": norm(), "mlp": mlp()})
    before = dict(module.named_parameters())
    make_lean(module)
    after = dict(module.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
