"""Protects docs/reference: it is what the code says now, and says all of it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from theworld_train.cli.app import COMMANDS
from theworld_train.cli.schema import Kind
from theworld_train.config import config_json_schema

GENERATOR = Path(__file__).parents[2] / "docs" / "reference" / "generate.py"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_current(generator: ModuleType):
    stale = [path.name for path, text in generator.pages().items() if path.read_text() != text]
    assert stale == [], "write them again: make docs"


def test_every_command_has_its_section(generator: ModuleType):
    sections = re.findall(r"^## (.+)$", generator.cli_page(), flags=re.MULTILINE)
    assert sections == list(COMMANDS)


@pytest.mark.parametrize("kind", [kind.value for kind in Kind])
def test_every_key_of_a_config_has_its_row(generator: ModuleType, kind: str):
    page = generator.config_page()
    schema = config_json_schema(kind)
    keys = {key for node in (schema, *schema.get("$defs", {}).values()) for key in node.get("properties", {})}
    assert len(keys) > 0
    assert [key for key in sorted(keys) if f"\n| `{key}` |" not in page] == []


def test_every_row_of_a_config_says_what_it_is_for(generator: ModuleType):
    rows = [line for line in generator.config_page().splitlines() if line.startswith("| `")]
    assert rows
    assert [row for row in rows if row.endswith("|  |")] == []
