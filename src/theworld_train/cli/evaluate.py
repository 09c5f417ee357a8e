"""`theworld-train evaluate`: measure a checkpoint, whole and with parts taken away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run directory, whose newest one is taken.")],
    ablation: Annotated[
        list[str] | None, typer.Option(help="Variant to measure; may be repeated. All of them if absent.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Held-out samples to measure; as in the run if absent.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
) -> None:
    """Measure a checkpoint on its run's held-out split, with the ablations.

    Example:
        theworld-train evaluate runs/quickstart/full --ablation as_trained --ablation world_masked
    """
    import json

    from theworld_train.cli.ranks import offline
    from theworld_train.config.errors import ConfigError, Problem, did_you_mean
    from theworld_train.config.schema import ABLATIONS

    chosen = [name for name in ABLATIONS if not ablation or name in ablation]
    unknown = [name for name in ablation or () if name not in ABLATIONS]
    if unknown:
        raise ConfigError(
            [
                Problem(f"no such ablation '{name}'", key="--ablation", hint=did_you_mean(name, ABLATIONS))
                for name in unknown
            ]
        )
    offline()
    from theworld_train.assemble import load_run
    from theworld_train.cli.tables import ablation_table, output
    from theworld_train.evaluate.ablations import run_ablations

    config, path = load_run(checkpoint)
    overrides = None
    if samples is not None:
        overrides = {"evaluation": {**config.evaluation.model_dump(mode="json"), "max_samples": samples}}
    if not config.model.world.enabled:
        chosen = [name for name in chosen if ablation or name in ("as_trained", "image_blanked")]
    results: dict[str, Any] = {
        name: result.to_dict() for name, result in run_ablations(path, chosen, overrides).items()
    }
    output().print(ablation_table({f"{config.name}/{path.name}": results}))
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1))
