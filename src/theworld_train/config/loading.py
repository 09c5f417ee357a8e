"""Loading of configs: files and overrides in, one validated config or all problems at once out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import yaml
from pydantic import ValidationError

from theworld_train.config.credentials import take_out_secrets
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.layers import (
    COMMAND_LINE,
    Findings,
    Layer,
    Overrides,
    merge,
    override_layer,
    read_layers,
)
from theworld_train.config.outline import outline_of
from theworld_train.config.pipeline import PipelineConfig
from theworld_train.config.reading import IMPLICIT_SCALARS
from theworld_train.config.schema import RunConfig
from theworld_train.config.section import Section
from theworld_train.config.sweep import SweepConfig
from theworld_train.config.translation import add_problems

ConfigT = TypeVar("ConfigT", bound=Section)
ConfigKind = Literal["run", "pipeline", "sweep"]
AnyPath = str | os.PathLike[str]

_MODELS: dict[ConfigKind, type[Section]] = {"run": RunConfig, "pipeline": PipelineConfig, "sweep": SweepConfig}


def load_run_config(path: AnyPath, overrides: Overrides = (), *, overrides_source: str = COMMAND_LINE) -> RunConfig:
    """Loads a run config.

    Args:
        path: The YAML file; files that it extends are loaded with it.
        overrides: `key=value` texts such as `optimizer.lr=3e-4`, or a mapping from dotted keys to values.
        overrides_source: What problems call the place that the overrides come from.

    Returns:
        The config.

    Raises:
        ConfigError: with every problem of the files and the overrides.
    """
    findings = Findings()
    layers = read_layers(os.fspath(path), findings)
    return _validated(RunConfig, layers, overrides, os.fspath(path), overrides_source, findings)


def load_pipeline_config(path: AnyPath, overrides: Overrides = ()) -> PipelineConfig:
    """Loads a pipeline config; the run configs of its stages are not looked into (see `load_stage_configs`).

    Args:
        path: The YAML file; files that it extends are loaded with it.
        overrides: As in `load_run_config`.

    Returns:
        The config, in which the `config` of every stage is an absolute path.

    Raises:
        ConfigError: with every problem of the files and the overrides.
    """
    findings = Findings()
    layers = read_layers(os.fspath(path), findings)
    for layer in layers:
        _anchor_stages(layer)
    return _validated(PipelineConfig, layers, overrides, os.fspath(path), COMMAND_LINE, findings)


def load_sweep_config(path: AnyPath, overrides: Overrides = ()) -> SweepConfig:
    """Loads a sweep; the keys that it varies are not looked up (see `sweep.target`).

    Args:
        path: The YAML file; files that it extends are loaded with it.
        overrides: As in `load_run_config`.

    Returns:
        The config, in which `config` or `pipeline` is an absolute path.

    Raises:
        ConfigError: with every problem of the files and the overrides.
    """
    findings = Findings()
    layers = read_layers(os.fspath(path), findings)
    for layer in layers:
        for key in ("config", "pipeline"):
            if isinstance(layer.data.get(key), str) and layer.data[key]:
                layer.data[key] = _anchored(layer, str(layer.data[key]))
    return _validated(SweepConfig, layers, overrides, os.fspath(path), COMMAND_LINE, findings)


def load_stage_configs(pipeline: PipelineConfig, source: str = "pipeline") -> tuple[RunConfig, ...]:
    """Loads the run configs of a pipeline's stages, with the overrides that the pipeline states for them.

    Args:
        pipeline: The pipeline, as `load_pipeline_config` returns it.
        source: The pipeline's file, for problems.

    Returns:
        A run config for each stage.

    Raises:
        ConfigError: with every problem of every stage.
    """
    configs: list[RunConfig] = []
    problems: list[Problem] = []
    for index, stage in enumerate(pipeline.stages):
        place = f"{source}: stages[{index}].overrides"
        try:
            configs.append(load_run_config(_short(stage.config), stage.run_overrides, overrides_source=place))
        except ConfigError as error:
            # Stages often share a file, whose problems are then the same.
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)
    return tuple(configs)


def parse_run_config(data: Mapping[str, object], source: str = "config") -> RunConfig:
    """Makes a run config of data that is at hand, by the same rules as that of a file.

    Args:
        data: The config's keys and values; `extends` is not among them.
        source: Where the data comes from, for problems.

    Returns:
        The config.

    Raises:
        ConfigError: with every problem of the data.
    """
    findings = Findings()
    clean, secrets = take_out_secrets(dict(data), source)
    for path, problem in secrets.items():
        findings.add(path, problem)
    return _validated(RunConfig, [Layer(clean, source)], (), source, COMMAND_LINE, findings)


def config_kind(path: AnyPath) -> ConfigKind:
    """Tells the kinds of config by a key that only one of them has: a sweep has a `space`, a pipeline `stages`.

    Args:
        path: The YAML file.

    Returns:
        `sweep`, `pipeline` or `run`.

    Raises:
        ConfigError: if the file, or one that it extends, cannot be read.
    """
    keys = {key for layer in read_layers(os.fspath(path), Findings()) for key in layer.data}
    return "sweep" if "space" in keys else "pipeline" if "stages" in keys else "run"


def dump_config(config: Section) -> str:
    """Writes a config as YAML with every value stated, defaults too; loading the text gives an equal config."""
    data = config.model_dump(mode="json")
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)


def format_overrides(overrides: Mapping[str, object]) -> tuple[str, ...]:
    """Writes overrides as the `key=value` arguments of a command line, which are read back to the same values."""
    return tuple(f"{key}={_one_line(value)}" for key, value in overrides.items())


def config_json_schema(kind: ConfigKind) -> dict[str, object]:
    """Returns the JSON Schema of a kind of config, for editors.

    A file may extend another one and state a part only. The schema therefore requires keys only of files that extend
    nothing, and only at their top level; what is missing further down is found by loading.

    Args:
        kind: `run`, `pipeline` or `sweep`.

    Returns:
        The schema, in which every key has its description.
    """
    schema = _MODELS[kind].model_json_schema()
    required = schema["required"]
    relaxed = _relaxed(schema)
    assert isinstance(relaxed, dict)
    paths = {"type": "string", "minLength": 1}
    relaxed["properties"]["extends"] = {
        "anyOf": [paths, {"type": "array", "items": paths}],
        "description": "Files that this one builds on, relative to it; later ones win, and this one wins over them.",
    }
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return dialect | relaxed | {"anyOf": [{"required": ["extends"]}, {"required": required}]}


def _validated(
    model: type[ConfigT],
    layers: Sequence[Layer],
    overrides: Overrides,
    main: str,
    overrides_source: str,
    findings: Findings,
) -> ConfigT:
    """Merges layers and overrides and makes the config of them, or raises all problems."""
    outline = outline_of(model)
    merged = merge([*layers, override_layer(overrides, outline, overrides_source, findings)], main, findings)
    try:
        # Strict JSON is just what a config file may hold: a list is a tuple and a name an enum member, but "5", 5.0 and
        # true are no whole numbers. Strict validation of Python objects would refuse the former as well.
        config: ConfigT | None = model.model_validate_json(json.dumps(merged.data, default=os.fspath))
    except ValidationError as error:
        add_problems(error, outline, merged, findings)
        config = None
    if findings.problems:
        # The file that the user named comes first, then what it extends, then the overrides.
        sources = [main, *(layer.source for layer in reversed(layers)), overrides_source]
        raise ConfigError(sorted(findings.problems, key=lambda problem: sources.index(problem.source or main)))
    assert config is not None, "a validation failed and no problem says why"
    return config


def _anchor_stages(layer: Layer) -> None:
    """Makes the run configs of a pipeline's stages absolute, as only here it is known which file states them."""
    stages = layer.data.get("stages")
    for stage in stages if isinstance(stages, list) else ():
        if isinstance(stage, dict) and isinstance(stage.get("config"), str) and stage["config"]:
            stage["config"] = _anchored(layer, stage["config"])


def _anchored(layer: Layer, path: str) -> str:
    return os.path.abspath(os.path.join(os.path.dirname(layer.source), path))


def _short(path: str) -> str:
    """Writes a path from the working directory if it lies inside, as messages name the file."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts quotes around text that this loader, or one of YAML 1.1, would take for something else."""

    def ignore_aliases(self, _data: object) -> bool:
        """Writes equal values twice rather than as anchor and alias."""
        return True


for _tag, _pattern, _first in IMPLICIT_SCALARS:
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def _one_line(value: object) -> str:
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=1 << 30)
    text = text.removesuffix("\n").removesuffix("\n...")
    # JSON, which YAML contains, is less pleasant to read but writes line breaks as escapes.
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text


def _relaxed(node: object) -> object:
    """Drops what holds for whole configs only: required keys, and the choice of one variant that rests on them."""
    if isinstance(node, list):
        return [_relaxed(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if key not in ("required", "discriminator")}
    return {"anyOf" if key == "oneOf" else key: _relaxed(value) for key, value in kept.items()}
