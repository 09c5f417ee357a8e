"""What a sweep varies: a stage or a pipeline, resolved once, and what a trial makes of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from theworld_train.config import (
    dump_config,
    load_pipeline_config,
    load_run_config,
    load_stage_configs,
)
from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.outline import Outline, outline_of
from theworld_train.config.pipeline import PipelineConfig, PipelineStage
from theworld_train.config.schema import RunConfig
from theworld_train.config.sweep import SweepConfig

CONFIG_FILE = "config.yaml"
STAGES = "stages"
#: In a sweep's directory: the sweep, what it varies, its trials, and its study if that is a file.
SWEEP_FILE = "sweep.yaml"
BASE = "base"
TRIALS = "trials"
STUDY_DB = "study.db"
STUDY_JOURNAL = "study.journal"
#: Keys that a trial has values of its own for, or that the pipeline gives to its stages.
SET_FOR_RUNS = ("name", "output_dir", "resume")
SET_FOR_STAGES = ("name", "output_dir", "resume", "init_from")
SET_FOR_PIPELINES = ("name", "output_dir", STAGES)

Values = Mapping[str, object]


class Resolved(NamedTuple):
    """A stage or pipeline with all its values stated.

    Attributes:
        files: Text of each file by its path; `config.yaml` is the one to launch.
        runs: The run config of the stage, or of each stage of the pipeline.
    """

    files: dict[str, str]
    runs: tuple[RunConfig, ...]

    def write(self, directory: Path) -> None:
        """Writes the files; the one to launch comes last, so that it stands for all of them."""
        for name in sorted(self.files, key=lambda name: name == CONFIG_FILE):
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(self.files[name])
            os.replace(partial, path)


@dataclass(frozen=True)
class Target:
    """What is varied.

    Attributes:
        config: The resolved file, of a stage or of a pipeline.
        stages: Names of the pipeline's stages; None if a run config is varied.
    """

    config: Path
    stages: tuple[str, ...] | None

    def locate(self, key: str) -> tuple[str | None, str]:
        """Returns the stage that a key belongs to (None if none) and the key inside of it."""
        for name in self.stages or ():
            prefix = f"{STAGES}.{name}."
            if key.startswith(prefix):
                return name, key.removeprefix(prefix)
        return None, key

    def outline(self, key: str) -> tuple[Outline, tuple[str, ...]]:
        """Returns the schema that a key belongs to, and its path in there."""
        stage, inner = self.locate(key)
        is_run = self.stages is None or stage is not None
        return outline_of(RunConfig if is_run else PipelineConfig), tuple(inner.split("."))

    def problem(self, key: str) -> Problem | None:
        """Says what is wrong with varying a key, whatever its values are."""
        stage, inner = self.locate(key)
        outline, path = self.outline(key)
        prefix = key.removesuffix(inner)
        if self.stages is not None and stage is None and path[0] == STAGES:
            named = path[1] if len(path) > 1 else ""
            return Problem(
                "names no stage of the pipeline",
                key=key,
                hint=did_you_mean(named, self.stages) or "write stages.NAME.KEY",
            )
        own = SET_FOR_RUNS if self.stages is None else SET_FOR_STAGES if stage else SET_FOR_PIPELINES
        if path[0] in own:
            return Problem("has a value of its own in every trial", key=key, hint="leave it out")
        if outline.knows(path):
            return None
        hint = outline.suggest(path)
        return Problem("unknown key", key=key, hint=hint.replace("'", f"'{prefix}", 1) if hint and prefix else hint)

    def resolve(self, values: Values, name: str, output_dir: str, source: str) -> Resolved:
        """Returns what a trial runs.

        Args:
            values: Dotted keys and their values.
            name: Name of the trial.
            output_dir: Directory of its run or pipeline.
            source: What problems call the place that the values come from.

        Raises:
            ConfigError: If the values make no valid config.
        """
        if self.stages is None:
            own = {"name": name, "output_dir": output_dir, "resume": "latest"}
            config = load_run_config(self.config, {**values, **own}, overrides_source=source)
            return Resolved({CONFIG_FILE: dump_config(config)}, (config,))
        mine: dict[str, object] = {"name": name, "output_dir": output_dir}
        of_stages: dict[str, dict[str, object]] = {stage: {} for stage in self.stages}
        for key, value in values.items():
            stage, inner = self.locate(key)
            (mine if stage is None else of_stages[stage])[inner] = value
        pipeline = load_pipeline_config(self.config, mine)
        stages = tuple(
            stage.model_copy(update={"overrides": {**stage.overrides, **of_stages[name]}})
            for stage, name in zip(pipeline.stages, self.stages, strict=True)
        )
        return _flattened(pipeline.model_copy(update={"stages": stages}), source)


def _flattened(pipeline: PipelineConfig, source: str) -> Resolved:
    """Returns a pipeline whose stages are files of their own that state everything."""
    configs = load_stage_configs(pipeline, source)
    paths = [f"{STAGES}/{number:02d}-{config.name}.yaml" for number, config in enumerate(configs)]
    stages = tuple(_bare(stage, path) for stage, path in zip(pipeline.stages, paths, strict=True))
    files = {path: dump_config(config) for path, config in zip(paths, configs, strict=True)}
    return Resolved({**files, CONFIG_FILE: dump_config(pipeline.model_copy(update={"stages": stages}))}, configs)


def _bare(stage: PipelineStage, path: str) -> PipelineStage:
    """Returns a stage whose file states what it had overridden."""
    return stage.model_copy(update={"config": path, "overrides": {}})


def resolve_base(sweep: SweepConfig, source: str) -> Resolved:
    """Returns what all trials have in common: the stage or pipeline with the sweep's overrides.

    Raises:
        ConfigError: If it or an override is wrong, or a pipeline has two stages of one name.
    """
    place = f"{source}: overrides"
    if sweep.config is not None:
        config = load_run_config(sweep.config, sweep.overrides, overrides_source=place)
        return Resolved({CONFIG_FILE: dump_config(config)}, (config,))
    assert sweep.pipeline is not None
    pipeline = load_pipeline_config(sweep.pipeline)
    names = tuple(config.name for config in load_stage_configs(pipeline, source=sweep.pipeline))
    if len(set(names)) < len(names):
        raise ConfigError(Problem("two stages have one name", source=sweep.pipeline, key=STAGES))
    target = Target(Path(sweep.pipeline), names)
    if problems := [problem for key in sweep.overrides if (problem := target.problem(key))]:
        raise ConfigError([replace(problem, source=place) for problem in problems])
    return target.resolve(sweep.overrides, pipeline.name, pipeline.output_dir, place)


def target_in(directory: Path, kind: str) -> Target:
    """Returns the target whose resolved files are in a directory."""
    path = directory / CONFIG_FILE
    if kind == "run":
        return Target(path, None)
    return Target(path, tuple(config.name for config in load_stage_configs(load_pipeline_config(path), str(path))))


def run_directories(kind: str, directory: Path, runs: Sequence[str], stage: str | None) -> Iterable[Path]:
    """Yields where a trial's metric may stand, the place to be preferred first.

    Args:
        kind: `run` or `pipeline`.
        directory: The run's directory, or the pipeline's.
        runs: Names of the pipeline's stages.
        stage: The one that counts; if None, the last one that there is.
    """
    if kind == "run":
        yield directory
    elif stage is not None:
        yield directory / stage
    else:
        yield from (directory / name for name in reversed(runs))
