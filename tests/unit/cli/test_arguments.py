"""Protects the telling apart of files and overrides."""

from __future__ import annotations

from theworld_train.cli.arguments import split_overrides


def test_what_holds_an_equals_sign_is_an_override():
    assert split_overrides(["a.yaml", "b.yaml", "x=1", "y={a: b=c}"]) == (["a.yaml", "b.yaml"], ["x=1", "y={a: b=c}"])


def test_nothing_is_nothing():
    assert split_overrides([]) == ([], [])
