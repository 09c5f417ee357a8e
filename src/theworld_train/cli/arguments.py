"""What commands share in reading their arguments."""

from __future__ import annotations

from collections.abc import Sequence


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tells files from overrides among a command's arguments.

    Args:
        arguments: Paths, then `key=value` texts; what holds a `=` is an override.

    Returns:
        The paths and the overrides, each in their order.
    """
    paths = [argument for argument in arguments if "=" not in argument]
    return paths, [argument for argument in arguments if "=" in argument]
