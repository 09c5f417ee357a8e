"""Calls the command line as the tests of `cli/` do."""

from tests.unit.cli.conftest import call

__all__ = ["call"]
