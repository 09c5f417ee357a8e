"""Protects `schema`: what it prints is the JSON Schema that loading goes by."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize(
    ("arguments", "title"),
    [((), "RunConfig"), (("run",), "RunConfig"), (("pipeline",), "PipelineConfig"), (("sweep",), "SweepConfig")],
)
def test_a_schema_is_printed_as_json(call, arguments, title):
    code, out, err = call("schema", *arguments)
    assert (code, err) == (0, "")
    assert json.loads(out)["title"] == title


def test_an_unknown_kind_names_the_known_ones(call):
    code, _, err = call("schema", "stage")
    assert code == 2
    assert "'run', 'pipeline', 'sweep'" in err
