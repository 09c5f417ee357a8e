"""`theworld-train schema`: the JSON Schema of the configs."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from theworld_train.config import config_json_schema


class Kind(StrEnum):
    """A kind of config."""

    RUN = "run"
    PIPELINE = "pipeline"
    SWEEP = "sweep"


def schema(kind: Annotated[Kind, typer.Argument(help="The kind of config.")] = Kind.RUN) -> None:
    """Print the JSON Schema of a kind of config, with the description of every key.

    Editors with a YAML language server complete and check the keys of a config by it.

    Example:
        theworld-train schema run > run.schema.json
    """
    typer.echo(json.dumps(config_json_schema(kind.value), indent=2))
