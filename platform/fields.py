"""The base of all job-file models, and the kinds of value that their fields share."""

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
    """A part of a job file: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
    removed_fields: ClassVar[Mapping[str, str]] = {}
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
Folder = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=1024)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0)]
Limit = Annotated[
    float,
    Field(gt=0, allow_inf_nan=True),
    BeforeValidator(_no_bool),
    PlainSerializer(lambda limit: "inf" if limit == math.inf else limit, when_used="json"),
]
"""A number > 0, `.inf` in YAML for no limit; JSON has no infinity, so there it is text."""
NonNegative = Annotated[float, BeforeValidator(_no_bool), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=2**40)]
Index = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=2**40)]
_SMALLEST = 1e-4
"""The smallest amount of a resource that Ray counts."""
_MOST_CPUS = 4096
"""More than any machine has. Ray starts as many threads in a process as it has CPUs."""
_OF_RAY = ("bundle", "object_store_memory")
"""Names that Ray gives to resources of its own."""


def _countable(needs: dict[str, float]) -> dict[str, float]:
    """Refuse what Ray would refuse only when an actor is asked for."""
    for name, amount in needs.items():
        problem = ""
        if not name or name in _OF_RAY or name.startswith(tuple(f"{one}_" for one in _OF_RAY)):
            problem = "is a name of Ray's own"
        elif 0 < amount < _SMALLEST:
            problem = f"must be 0 or at least {_SMALLEST:.4f}: Ray counts no finer"
        elif name == "CPU" and amount > _MOST_CPUS:
            problem = f"must be <= {_MOST_CPUS}: one process is on one machine"
        elif name == "GPU" and amount > 1 and amount % 1:
            problem = "must be a whole number above 1: a worker has one GPU or a part of it"
        elif name == "memory" and amount % 1:
            problem = "must be a whole number of bytes"
        if problem:
            raise PydanticCustomError("resource", "{text}", {"text": f"{name!r} {problem}"})
    return needs


Resources = Annotated[dict[str, NonNegative], AfterValidator(_countable)]
"""Ray resources by name; `memory` is in bytes."""
Seconds = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, le=86_400)]
Pair = tuple[Fraction, Fraction]
