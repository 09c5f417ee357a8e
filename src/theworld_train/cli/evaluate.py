"""`theworld-train evaluate`: measure a checkpoint, whole and with parts taken away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from theworld_train.cli.arguments import split_overrides

if TYPE_CHECKING:
    from theworld_train.config.schema import Ablation


def evaluate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT [KEY=VALUE ...]",
            help="A checkpoint, or a run directory, whose newest one is taken; dotted keys of its config to override.",
        ),
    ],
    ablation: Annotated[
        list[str] | None,
        typer.Option(help="Variant to measure; may be repeated. All that the run and its data have if absent."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Held-out samples to measure; as in the run if absent.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Measure a checkpoint on its run's held-out split, with the ablations.

    Of the run's data only `data.eval` is read. Another file is measured with `data.eval.path=other.jsonl`. Answers are
    generated if `evaluation.max_new_tokens` is set; `evaluation.metrics.<kind>` says when one is correct. Under
    `accelerate launch -m theworld_train evaluate ...` all processes share the samples; the numbers stay the same.

    Example:
        theworld-train evaluate runs/quickstart/full --ablation as_trained evaluation.max_new_tokens=8 --json full.json
    """
    from theworld_train.cli.ranks import is_main_rank, offline, quiet_other_ranks
    from theworld_train.config.errors import ConfigError

    paths, overrides = split_overrides(arguments)
    if len(paths) != 1:
        raise ConfigError(f"evaluate takes one checkpoint, got {len(paths)}")
    if samples is not None:
        overrides.append(f"evaluation.max_samples={samples}")
    with quiet_other_ranks():
        chosen = _chosen_ablations(ablation or [])
        if json_file is not None:
            _check_writable(json_file)
        offline()
        from theworld_train.assemble.run import load_run
        from theworld_train.evaluate.ablations import run_ablations

        config, path = load_run(Path(paths[0]), overrides)
        measured = run_ablations(path, chosen, overrides)
    if is_main_rank():
        from theworld_train.cli.tables import ablation_table, output

        found = measured.to_dict()
        output().print(ablation_table({f"{config.name}/{path.name}": found["ablations"]}))
        for name, reason in measured.left_out.items():
            output().print(f"{name} is not measured: {reason}", highlight=False, markup=False, soft_wrap=True)
        if json_file is not None:
            _write_json(json_file, found)


def _chosen_ablations(names: list[str]) -> list[Ablation]:
    """Returns the ablations that are named, in the order of the table.

    Raises:
        ConfigError: Naming every one that does not exist.
    """
    from theworld_train.config.errors import ConfigError, Problem, did_you_mean
    from theworld_train.config.schema import ABLATIONS, FRAME_ABLATIONS

    known = (*ABLATIONS, *FRAME_ABLATIONS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            [
                Problem(f"no such ablation '{name}'", key="--ablation", hint=did_you_mean(name, known))
                for name in unknown
            ]
        )
    return [name for name in known if name in names]


def _check_writable(path: Path) -> None:
    """Refuses a file that cannot be written, before anything is measured."""
    import os

    from theworld_train.config.errors import ConfigError, Problem

    folder = path.parent
    if path.is_dir():
        raise ConfigError(Problem("is a directory, expected a file to write", key="--json", value=str(path)))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "cannot be written to" if folder.is_dir() else "does not exist"
        raise ConfigError(Problem(f"the directory '{folder}' {reason}", key="--json", value=str(path)))


def _write_json(path: Path, results: object) -> None:
    """Writes the file whole or not at all: a pipeline takes its presence for a finished measurement."""
    import json

    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1))
    partial.replace(path)
