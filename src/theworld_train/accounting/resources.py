"""The package's own tables (presets, GPUs, published figures), read once from the data that ships with it."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def table(name: str) -> dict[str, Any]:
    """Returns the table `name`, such as `presets`; callers must not change it."""
    text = (files("theworld_train.accounting") / "data" / f"{name}.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content
