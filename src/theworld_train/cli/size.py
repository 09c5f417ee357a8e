"""`theworld-train size`: how large is a model, and what does it fit on?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from theworld_train.accounting import sizing
from theworld_train.accounting.architectures import Architecture, Decoder
from theworld_train.accounting.config_json import architecture_from_config, model_type
from theworld_train.accounting.presets import COMMAND_LINE, describe, preset, preset_names
from theworld_train.config.errors import ConfigError, Problem


def size(
    target: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME|CONFIG.JSON|KEY=VALUE",
            help="A built-in architecture, a Hugging Face config.json (or its directory), or the sizes of a decoder.",
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens at which the key-value cache is sized (8,192 unless fewer fit).")
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, metavar="GB", help="List what fits on a GPU with this memory instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a model's exact parameters by part, and what it needs: memory, key-value cache, tokens, FLOPs and GPUs.

    Without arguments, list the built-in architectures. Those and `key=value` descriptions need neither network nor
    framework, and neither does a config.json of a type that has a closed formula here; others are built without memory.

    Example:
        theworld-train size llama-3-70b --context 32768
        theworld-train size d_model=2048 n_layers=24 vocab_size=32000
        theworld-train size --gpu-memory 24
    """
    if target and gpu_memory is not None:
        raise ConfigError(Problem("cannot be combined with a model", COMMAND_LINE, "--gpu-memory"))
    if not target:
        _print_gpu(gpu_memory, as_json) if gpu_memory is not None else _print_presets(as_json)
        return
    subject = _resolve(target)
    result = sizing.size_up(subject.name, subject.architecture, _context(subject, context))
    if as_json:
        typer.echo(json.dumps(_as_json(result, subject), indent=2))
    else:
        _print(result, subject)


@dataclass(frozen=True)
class _Subject:
    """What was asked for: its name, what it is made of, and what to say about it."""

    name: str
    architecture: Architecture
    source: str
    note: str | None = None
    assumptions: tuple[str, ...] = ()


def _resolve(target: list[str]) -> _Subject:
    if any("=" in argument for argument in target):
        description = describe(target)
        name = " ".join(target)
        return _Subject(name, description.architecture, COMMAND_LINE, assumptions=description.assumptions)
    if len(target) > 1:
        raise ConfigError(
            Problem("expected one name, one file or key=value pairs", COMMAND_LINE, value=" ".join(target))
        )
    path = Path(target[0])
    if path.is_dir():
        path /= "config.json"
    if path.is_file() or path.suffix == ".json":
        return _read_config(path)
    entry = preset(target[0])
    return _Subject(entry.name, entry.architecture, entry.source, entry.note)


def _read_config(path: Path) -> _Subject:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"cannot be read as JSON: {error}", str(path))) from error
    if not isinstance(config, Mapping):
        raise ConfigError(Problem("must hold a JSON object", str(path)))
    kind = model_type(config, str(path))
    architecture = architecture_from_config(config, str(path))
    if architecture is not None:
        return _Subject(f"{path} ({kind})", architecture, str(path))
    from theworld_train.model.census import census  # builds the model with torch, which formulas do without

    note = (
        "There is no closed formula for this type: it was built without memory and counted, by its parameters' names."
    )
    return _Subject(f"{path} ({kind})", census(config, str(path)), str(path), note)


def _context(subject: _Subject, asked: int | None) -> int:
    """Returns the context to size the cache at; learned positions bound it."""
    decoder = subject.architecture
    positions = decoder.num_learned_positions if isinstance(decoder, Decoder) else 0
    if asked is not None and 0 < positions < asked:
        message = f"must not exceed the {positions:,} learned positions of {subject.name}"
        raise ConfigError(Problem(message, COMMAND_LINE, "--context", asked))
    return asked or min(sizing.DEFAULT_CONTEXT, positions or sizing.DEFAULT_CONTEXT)


def _as_json(result: sizing.Sizing, subject: _Subject) -> dict[str, Any]:
    values = asdict(result)
    values["parts"] = [part._asdict() for part in result.parts]
    return {**values, "source": subject.source, "note": subject.note, "assumptions": list(subject.assumptions)}


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e6:,.3f} MB"


def _print(result: sizing.Sizing, subject: _Subject) -> None:
    console = Console()
    console.print(_parts_table(result), soft_wrap=False)
    for line in _lines(result, subject):
        console.print(line, highlight=False, markup=False)
    console.print(_gpu_table(result))
    reserve = f"{sizing.RESERVED_MEMORY:.0%}"
    console.print(
        f"GPUs needed if the model is split evenly and {reserve} of the memory stays free; inference holds the weights"
        " and one sequence's key-value cache, training the weights, gradients and AdamW state without activations."
        " 1 GB = 10^9 bytes.",
        highlight=False,
    )


def _parts_table(result: sizing.Sizing) -> Table:
    composite = any(part.component for part in result.parts)
    table = Table(title=f"{result.name}: {result.parameters:,} parameters", title_justify="left")
    if composite:
        table.add_column("component", no_wrap=True)
    table.add_column("part")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("how", overflow="fold")
    for part in result.parts:
        share = f"{part.parameters / result.parameters:.2%}" if result.parameters else ""
        cells = [part.name, f"{part.parameters:,}", share, part.formula]
        table.add_row(*([part.component, *cells] if composite else cells))
    return table


def _lines(result: sizing.Sizing, subject: _Subject) -> Iterator[str]:
    if subject.assumptions:
        yield f"Assumed: {', '.join(subject.assumptions)}."
    if subject.note:
        yield subject.note
    rule = result.approximation
    if rule:
        layers = (
            "" if rule.error_of_layers is None else f", {rule.error_of_layers:+.2%} against attention and MLP alone"
        )
        yield f"12 x layers x width^2 = {rule.parameters:,}: {rule.error:+.2%} against the whole{layers}."
    yield "Weights: " + ", ".join(f"{name} {_gb(size)}" for name, size in result.weight_bytes.items()) + "."
    cache = result.kv_cache
    if cache:
        savings = {"grouped queries": cache.saving_of_groups, "sliding windows": cache.saving_of_windows}
        saved = "".join(f"; {factor:.3g}x smaller thanks to {cause}" for cause, factor in savings.items() if factor > 1)
        yield (
            f"Key-value cache in bf16: {cache.bytes_per_token:,} bytes a token,"
            f" {_gb(cache.total_bytes)} for one sequence of {cache.context:,} tokens{saved}."
        )
    rates = ", ".join(f"{name} {size}" for name, size in sizing.TRAINING_BYTES_PER_PARAMETER.items())
    yield (
        f"Training with AdamW in mixed precision: {_gb(result.training_bytes)} without activations; bytes a parameter:"
        f" {rates}."
    )
    if result.chinchilla_tokens and result.chinchilla_flops:
        yield (
            f"Compute-optimal training of the language model: {result.chinchilla_tokens:,} tokens (20 a parameter),"
            f" {result.chinchilla_flops:.3g} FLOPs (6 x parameters x tokens)."
        )


def _gpu_table(result: sizing.Sizing) -> Table:
    table = Table(title="GPUs needed", title_justify="left")
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("GPU")
    for precision in sizing.BYTES_PER_PARAMETER:
        table.add_column(precision, justify="right", no_wrap=True)
    table.add_column("training", justify="right", no_wrap=True)
    for fit in result.gpus:
        counts = [f"{count:,}" for count in (*fit.inference.values(), fit.training)]
        table.add_row(f"{fit.gpu.memory_gb:g} GB", fit.gpu.name, *counts)
    return table


def _print_presets(as_json: bool) -> None:
    entries = [preset(name) for name in preset_names()]
    rows: list[dict[str, Any]] = [
        {"name": entry.name, "family": entry.family, "parameters": entry.architecture.num_parameters}
        | {"source": entry.source, "note": entry.note}
        for entry in entries
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("name", "family")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("source", overflow="fold")
    for row in rows:
        table.add_row(row["name"], row["family"], f"{row['parameters']:,}", row["source"])
    Console().print(table)


def _print_gpu(memory_gb: float, as_json: bool) -> None:
    """Prints the largest models that fit on one GPU, by what is done with them."""
    models = [(name, preset(name).architecture.num_parameters) for name in preset_names()]
    rates = {**sizing.BYTES_PER_PARAMETER, "training": float(sum(sizing.TRAINING_BYTES_PER_PARAMETER.values()))}
    rows: list[dict[str, Any]] = []
    for use, rate in rates.items():
        limit = sizing.largest_parameters(memory_gb, rate)
        bare = sizing.largest_parameters(memory_gb, rate, reserved=0)
        largest = sizing.largest_fitting(models, limit)
        rows.append({"use": use, "parameters": limit, "parameters_without_reserve": bare, "largest_preset": largest})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(title=f"Largest models on one GPU of {memory_gb:g} GB", title_justify="left")
    table.add_column("use")
    for column in (f"{sizing.RESERVED_MEMORY:.0%} kept free", "nothing kept free"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("largest built-in that fits")
    for row in rows:
        sizes = (f"{row[key] / 1e9:.2f}B" for key in ("parameters", "parameters_without_reserve"))
        table.add_row(row["use"], *sizes, row["largest_preset"] or "none")
    Console().print(table)
