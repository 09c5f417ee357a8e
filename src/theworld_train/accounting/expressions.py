"""Evaluates the arithmetic that the table of published figures is written in: numbers, names, + - * / ** and sizes."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

from theworld_train.accounting import presets, sizing, tokens
from theworld_train.accounting.architectures import Architecture, Composite, Decoder, Linear
from theworld_train.accounting.video_vae import VideoVae

Number = int | float

_OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def evaluate(expression: str, names: Mapping[str, Number]) -> Number:
    """Returns the value of an expression of the data that ships with the package.

    Args:
        expression: Such as `params("gpt2") - 61 * width("gemma-3-4b")`; the functions are those of `FUNCTIONS`.
        names: Values that it may name.
    """
    return _value(ast.parse(expression, mode="eval").body, names)


def _value(node: ast.expr, names: Mapping[str, Number]) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.Call(func=ast.Name(id=function), args=arguments, keywords=keywords):
            named = {keyword.arg: _argument(keyword.value, names) for keyword in keywords if keyword.arg}
            return FUNCTIONS[function](*(_argument(argument, names) for argument in arguments), **named)
    raise AssertionError(f"no such syntax in an expression: {ast.unparse(node)}")


def _argument(node: ast.expr, names: Mapping[str, Number]) -> Number | str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return _value(node, names)


def _params(name: str, component: str = "") -> int:
    return presets.preset(name).architecture.component(component)


def _part(name: str, component: str, part: str) -> int:
    parts = presets.preset(name).architecture.parts()
    return sum(entry.parameters for entry in parts if (entry.component, entry.name) == (component, part))


def _variant(name: str, **sizes: int) -> int:
    return presets.variant(name, sizes).num_parameters


def _decoder(name: str) -> Decoder:
    architecture: Architecture = presets.preset(name).architecture
    if isinstance(architecture, Composite):
        assert architecture.language_model
        architecture = architecture.members[architecture.language_model]
    assert isinstance(architecture, Decoder)
    return architecture


def _linear(in_features: int, out_features: int) -> int:
    return Linear(in_features, out_features).num_parameters


def _world_tokens(resolution: int, frames: int = 1) -> int:
    return tokens.world_tokens("spatial", resolution, VideoVae().z_dim, frames, pool=1)


def _kv_bytes_per_token(name: str) -> int:
    return sizing.kv_cache_bytes_per_token(_decoder(name).attention_shape)


def _grouped_query_saving(name: str) -> float:
    decoder = _decoder(name)
    return decoder.num_attention_heads / decoder.num_key_value_heads


def _approximation(name: str) -> int:
    decoder = _decoder(name)
    return sizing.transformer_approximation(decoder.num_hidden_layers, decoder.hidden_size)


def _described(description: str) -> int:
    return presets.describe(description.split()).architecture.num_parameters


def _width(name: str) -> int:
    return _decoder(name).hidden_size


def _vocabulary(name: str) -> int:
    return _decoder(name).vocab_size


def _largest(memory_gb: float, precision: str) -> int:
    return sizing.largest_parameters(memory_gb, sizing.BYTES_PER_PARAMETER[precision], reserved=0)


#: What an expression may call.
FUNCTIONS: dict[str, Callable[..., Number]] = {
    "params": _params,
    "part": _part,
    "variant": _variant,
    "described": _described,
    "linear": _linear,
    "width": _width,
    "vocabulary": _vocabulary,
    "world_tokens": _world_tokens,
    "rule_of_thumb": _approximation,
    "transformer_approximation": sizing.transformer_approximation,
    "weight_bytes": sizing.weight_bytes,
    "kv_bytes_per_token": _kv_bytes_per_token,
    "grouped_query_saving": _grouped_query_saving,
    "chinchilla_tokens": sizing.chinchilla_tokens,
    "training_flops": sizing.training_flops,
    "largest": _largest,
}
