"""The words of the project: config models, component names, loading and errors; imports no torch, no transformers."""

from theworld_train.config.components import COMPONENT_HINTS, Component
from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.loading import (
    config_json_schema,
    config_kind,
    dump_config,
    format_overrides,
    load_pipeline_config,
    load_run_config,
    load_stage_configs,
    load_sweep_config,
    parse_run_config,
)
from theworld_train.config.pipeline import PipelineConfig, PipelineStage
from theworld_train.config.schema import RunConfig
from theworld_train.config.sweep import SweepConfig

__all__ = [
    "COMPONENT_HINTS",
    "Component",
    "ConfigError",
    "PipelineConfig",
    "PipelineStage",
    "Problem",
    "RunConfig",
    "SweepConfig",
    "config_json_schema",
    "config_kind",
    "did_you_mean",
    "dump_config",
    "format_overrides",
    "load_pipeline_config",
    "load_run_config",
    "load_stage_configs",
    "load_sweep_config",
    "parse_run_config",
]
