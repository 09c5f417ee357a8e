"""`theworld-train doctor`: is this machine ready, and what is to be done if not?"""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from theworld_train.cli.arguments import split_overrides

if TYPE_CHECKING:
    from theworld_train.config.schema import RunConfig
    from theworld_train.doctor.finding import Finding

#: Exit code where something would make a run fail.
UNREADY = 1


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG [KEY=VALUE ...]", help="A run config or a pipeline that should run here."),
    ] = None,
    network: Annotated[
        bool, typer.Option("--network", help="Ask the hub for an answer too, for ten seconds at most.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check versions, GPUs, known-bad combinations, disks, shared memory, ports and the hub; say what to do.

    Each line is ok, warn or bad. Nothing is downloaded, and tokens are looked for, never shown.

    Exit codes: 0 nothing is bad, 1 something is.

    Example:
        theworld-train doctor configs/stages/projection.yaml
    """
    from theworld_train.cli.ranks import quieten

    quieten()
    configs = _configs(arguments or [])
    from theworld_train.doctor.examine import examine
    from theworld_train.doctor.finding import worst
    from theworld_train.doctor.machine import look

    findings = examine(look(), configs, network=network)
    state = worst(findings)
    if as_json:
        typer.echo(json.dumps({"state": state, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        _print(findings)
        counts = ", ".join(f"{sum(f.state == kind for f in findings)} {kind}" for kind in ("ok", "warn", "bad"))
        typer.echo(counts)
    if state == "bad":
        raise typer.Exit(UNREADY)


def _configs(arguments: list[str]) -> tuple[RunConfig, ...]:
    """Loads the run config, or those of a pipeline's stages."""
    from theworld_train.config import (
        ConfigError,
        Problem,
        config_kind,
        load_pipeline_config,
        load_run_config,
        load_stage_configs,
    )

    paths, overrides = split_overrides(arguments)
    if len(paths) > 1 or (overrides and not paths):
        raise ConfigError(f"doctor takes one config or none, got {len(paths)}")
    if not paths:
        return ()
    kind = config_kind(paths[0])
    if kind == "sweep":
        hint = "name the run config or the pipeline that it varies"
        raise ConfigError(Problem("is a sweep, of which doctor takes none", source=paths[0], hint=hint))
    if kind == "pipeline":
        return load_stage_configs(load_pipeline_config(paths[0], overrides), source=paths[0])
    return (load_run_config(paths[0], overrides),)


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    columns = shutil.get_terminal_size((120, 24)).columns
    for finding in findings:
        start = f"{finding.state:<4}  {finding.check:<{width}}  "
        typer.echo(textwrap.fill(finding.text, columns, initial_indent=start, subsequent_indent=" " * len(start)))
        if finding.advice is not None and finding.state != "ok":
            indent = " " * len(start) + "-> "
            typer.echo(
                textwrap.fill(finding.advice, columns, initial_indent=indent, subsequent_indent=" " * len(indent))
            )
