"""The base of all job-file models, and the kinds of value that their fields share."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool
from pydantic_core import PydanticCustomError


class Spec(BaseModel):
    """A part of a job file: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
    gone: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions, and what is to be said to who still writes them."""


def _no_bool(value: object) -> object:
    """Refuse true/false where a number is meant: Python would count them as 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_is_bool", "expected a number")
    return value


def _whole(value: object) -> object:
    """Refuse 2.5 and '2' where a whole number is meant; take 2.0, which YAML writes for 2e0."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("number_not_whole", "expected a whole number")
    return value


Flag = StrictBool
Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(_no_bool), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=2**40)]
Index = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=2**40)]
Seconds = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=86_400)]
Pair = tuple[Fraction, Fraction]
