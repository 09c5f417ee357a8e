"""Config-driven training of TheWorld: Gemma 3 fused with the encoder of the Cosmos video VAE.

Importing the package is cheap: the model classes, and torch with them, are imported when they are first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from theworld_train.model import TheWorld, TheWorldConfig, TheWorldForConditionalGeneration, TheWorldProcessor

__version__ = "0.1.0"

__all__ = ["TheWorld", "TheWorldConfig", "TheWorldForConditionalGeneration", "TheWorldProcessor", "__version__"]


def __getattr__(name: str) -> object:
    """Imports a public class when it is first named.

    Args:
        name: The name that the module was asked for.

    Returns:
        The class.

    Raises:
        AttributeError: if there is no such public name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module("theworld_train.model"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names, imported or not yet."""
    return sorted({*globals(), *__all__})
