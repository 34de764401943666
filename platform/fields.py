"""Base class of all job-file models, and the field types that they share."""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictBool,
    StringConstraints,
)
from pydantic_core import PydanticCustomError


class Spec(BaseModel):
    """A part of a job file: frozen; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
    removed_fields: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions, each with the message for files that still use it."""


def _no_bool(value: object) -> object:
    """Refuse booleans where a number is expected: Python treats them as 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_is_bool", "expected a number")
    return value


def _check_integer(value: object) -> object:
    """Refuse 2.5 and '2' where an integer is expected; accept 2.0, as YAML parses 2e0."""
    if isinstance(value, bool | str):
        raise PydanticCustomError("number_not_whole", "expected a whole number")
    return value


Flag = StrictBool
Folder = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=1024)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0)]
Limit = Annotated[
    float,
    Field(gt=0, allow_inf_nan=True),
    BeforeValidator(_no_bool),
    PlainSerializer(lambda limit: "inf" if limit == math.inf else limit, when_used="json"),
]
"""A number > 0, or `.inf` in YAML for no limit; text in JSON, which has no infinity."""
NonNegative = Annotated[float, BeforeValidator(_no_bool), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)]
Count = Annotated[int, BeforeValidator(_check_integer), Field(ge=1, le=2**40)]
Index = Annotated[int, BeforeValidator(_check_integer), Field(ge=0, le=2**40)]
_MIN_AMOUNT = 1e-4
"""Ray's resolution of resources."""
_MAX_CPUS = 4096
"""More than any machine has; Ray starts one thread per CPU in a process."""
_RESERVED = ("bundle", "object_store_memory")
"""Reserved resource names of Ray."""


def _check_resources(needs: dict[str, float]) -> dict[str, float]:
    """Refuse amounts that Ray would refuse only when it creates an actor."""
    for name, amount in needs.items():
        problem = ""
        if not name or name in _RESERVED or name.startswith(tuple(f"{r}_" for r in _RESERVED)):
            problem = "is a name of Ray's own"
        elif 0 < amount < _MIN_AMOUNT:
            problem = f"must be 0 or at least {_MIN_AMOUNT:.4f}: Ray counts no finer"
        elif name == "CPU" and amount > _MAX_CPUS:
            problem = f"must be <= {_MAX_CPUS}: one process is on one machine"
        elif name == "GPU" and amount > 1 and amount % 1:
            problem = "must be a whole number above 1: a worker has one GPU or a part of it"
        elif name == "memory" and amount % 1:
            problem = "must be a whole number of bytes"
        if problem:
            raise PydanticCustomError("resource", "{text}", {"text": f"{name!r} {problem}"})
    return needs


Resources = Annotated[dict[str, NonNegative], AfterValidator(_check_resources)]
"""Ray resources by name; `memory` in bytes."""
Seconds = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=86_400)]
Pair = tuple[Fraction, Fraction]
