"""What every section of a run's configuration is: strict, frozen, and able to refuse in words.

Owns: the base of the sections, the bounds that many settings share, the form of a refusal. Does not know any setting.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

AtLeastOne = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
ZeroOrMore = Annotated[float, Field(ge=0)]
UpToOne = Annotated[float, Field(ge=0, le=1)]


def refusal(path: str, why: str, fix: str) -> PydanticCustomError:
    """A check of our own, in a form that pydantic carries out unharmed."""
    return PydanticCustomError("rollcast", "{why}", {"path": path, "why": why, "fix": fix})


# Strict: TOML has types, so that `steps = "8"` or `seed = true` is a slip and not a number.
STRICT = ConfigDict(
    frozen=True,
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
    populate_by_name=False,
)


class Section(BaseModel):
    """A table of the file: unknown keys are refused, and nothing changes after loading."""

    model_config = STRICT
