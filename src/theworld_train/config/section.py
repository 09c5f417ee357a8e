"""What every section of a config is made of: its base class, and the types of its numbers and names."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what numpy's generators take
Name = Annotated[
    str,
    Field(
        # A directory is named after it, which `..` would lead out of.
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$",
        # What errors say instead of the pattern.
        json_schema_extra={
            "x-expected": "1 to 64 letters, digits, dots, underscores and hyphens, with no dot at the front"
        },
    ),
]
Path = Annotated[str, Field(min_length=1)]
Repository = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every section: immutable, and strict about unknown keys and about types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
