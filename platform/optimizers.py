"""
Optimizers that a job file may name: those of `torch.optim`, with their own argument names.

They are declared explicitly, so that a job file is checked without importing torch; a unit test
compares every name and argument with torch's signatures.

Most optimizers are element-wise: an element's update needs only its own gradient and state, so a
shard of the parameters can be updated alone, and every strategy gives the same result. Others
(`Optimizer.of_tensors`) need whole parameters: shards then end at parameter bounds. A group of
parameters may have another optimizer than the rest, as Muon needs it. `REFUSED_OPTIMIZERS` lists
torch's optimizers that are not supported.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import override

from distplat.platform.fields import (
    Count,
    Flag,
    Fraction,
    NonNegative,
    Number,
    Pair,
    Positive,
    Spec,
)

_USE_TASK_HINT = (
    "write {name: task}, under ring, and create it in the task: "
    "optimizer(named_parameters), docs/task.md"
)
REFUSED_OPTIMIZERS = {
    "ASGD": _USE_TASK_HINT,
    "Rprop": _USE_TASK_HINT,
    "LBFGS": "it evaluates the loss several times per step",
    "SparseAdam": "it is for embedding tables: `embeddings.optimizer`",
}
"""torch optimizers that a job may not name, and why, or the alternative."""


OptimizerName = Literal[
    "SGD",
    "Adam",
    "AdamW",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "NAdam",
    "RAdam",
    "Adafactor",
    "Muon",
    "LAMB",
]
"""Optimizers that a group may name."""
Coefficients = tuple[Number, Number, Number]
NewtonSchulzSteps = Annotated[Count, Field(lt=100)]
AdjustLr = Literal["original", "match_rms_adamw"]


class Group(Spec):
    """
    Parameters with their own optimizer arguments: a param group of torch.

    Missing arguments are inherited from the optimizer. A group that names another optimizer
    inherits nothing, but has that optimizer's defaults. `platform/optimizer_checks.py` checks which
    arguments an optimizer has. Arguments that torch ignores in a group are not supported here.
    """

    match: str
    """Comma-separated patterns of parameter names: `*`, `?`, `[...]`."""
    name: OptimizerName | None = None
    """Optimizer of these parameters; None: the job's."""
    lr: Positive | None = None
    weight_decay: NonNegative | None = None
    maximize: Flag | None = None
    momentum: NonNegative | None = None
    dampening: NonNegative | None = None
    nesterov: Flag | None = None
    betas: Pair | None = None
    eps: NonNegative | None = None
    amsgrad: Flag | None = None
    alpha: Fraction | None = None
    centered: Flag | None = None
    lr_decay: NonNegative | None = None
    rho: Fraction | None = None
    momentum_decay: NonNegative | None = None
    decoupled_weight_decay: Flag | None = None
    ns_coefficients: Coefficients | None = None
    ns_steps: NewtonSchulzSteps | None = None
    adjust_lr_fn: AdjustLr | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of `match`, in order."""
        return tuple(part.strip() for part in self.match.split(","))

    def matches(self, name: str) -> bool:
        """Return whether a pattern matches a parameter's name."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def arguments(self) -> dict[str, Any]:
        """Return the group's own arguments."""
        return self.model_dump(exclude={"match", "name"})

    @model_serializer(mode="wrap")
    def _serialize_set_fields(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}


class Optimizer(Spec):
    """Fields of all optimizers."""

    of_tensors: ClassVar[bool] = False
    """Whether an element's update depends on other elements of its parameter."""
    matrices: ClassVar[bool] = False
    """Whether it supports only two-dimensional parameters."""
    not_in_groups: ClassVar[frozenset[str]] = frozenset()
    """Arguments that must be the same in all groups."""

    name: str
    """Class in `torch.optim`."""
    lr: Positive
    """Learning rate, before the schedule's factor."""
    weight_decay: NonNegative = 0.0
    """L2 penalty; decoupled from the gradient in AdamW."""
    groups: tuple[Group, ...] = ()
    """Parameters with their own arguments; each belongs to the first group that matches."""

    def arguments(self) -> dict[str, object]:
        """Return the keyword arguments of the class in `torch.optim`."""
        return self.model_dump(exclude={"name", "groups"})

    def group_of(self, name: str) -> int:
        """Return the number of a parameter's group, from 1; 0: none."""
        matches = (number for number, group in enumerate(self.groups, 1) if group.matches(name))
        return next(matches, 0)

    def group_classes(self) -> "list[type[Optimizer]]":
        """Return the optimizer class of parameters without a group, then that of each group."""
        own = type(self)
        return [own, *(options_of(group.name) if group.name else own for group in self.groups)]

    @property
    def whole(self) -> bool:
        """Whether it needs whole tensors: one of its classes does, or there are several classes."""
        return len({*self.group_classes()}) > 1 or any(
            cls.of_tensors for cls in self.group_classes()
        )

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        """Return whether the parameter's optimizer can update a parameter of this shape."""
        return len(shape) == 2 or not self.group_classes()[self.group_of(name)].matrices

    def variants(self) -> "list[Optimizer]":
        """
        Return the optimizer of parameters without a group, then that of each group.

        Raises:
            ValidationError: a group has an argument that its optimizer does not have.
        """
        own = {"name": self.name, **self.arguments()}
        arguments = [own]
        for group in self.groups:
            base = own if group.name is None else {"name": group.name}
            arguments.append(base | group.arguments())
        return [
            cls.model_validate(one)
            for cls, one in zip(self.group_classes(), arguments, strict=True)
        ]

    def rates(self) -> tuple[float, ...]:
        """Return `lr` of parameters without a group, then that of each group."""
        return self.lr, *(self.lr if group.lr is None else group.lr for group in self.groups)

    def figures(self) -> tuple[str, ...]:
        """Return the metric name of each of `rates`; empty: equal to the first rate."""
        own = enumerate(self.groups)
        return "lr", *("" if group.lr is None else f"lr_group_{n}" for n, group in own)


class _WithMaximize(Optimizer):
    """Optimizers with `maximize`."""

    maximize: Flag = False


class _AdamFamily(_WithMaximize):
    """Optimizers with two moments of the gradient."""

    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-8


class SGD(_WithMaximize):
    """Stochastic gradient descent, with optional momentum."""

    name: Literal["SGD"]
    momentum: NonNegative = 0.0
    dampening: NonNegative = 0.0
    nesterov: Flag = False


class Adam(_AdamFamily):
    """Adam, Kingma & Ba 2015."""

    name: Literal["Adam"]
    amsgrad: Flag = False


class AdamW(_AdamFamily):
    """Adam with decoupled weight decay, Loshchilov & Hutter 2019."""

    name: Literal["AdamW"]
    weight_decay: NonNegative = 0.01
    amsgrad: Flag = False


class RMSprop(_WithMaximize):
    """RMSprop, Hinton's lecture 6."""

    name: Literal["RMSprop"]
    alpha: Fraction = 0.99
    eps: NonNegative = 1e-8
    momentum: NonNegative = 0.0
    centered: Flag = False


class Adagrad(_WithMaximize):
    """Adagrad, Duchi et al. 2011."""

    name: Literal["Adagrad"]
    lr_decay: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10


class Adadelta(_WithMaximize):
    """Adadelta, Zeiler 2012."""

    name: Literal["Adadelta"]
    rho: Fraction = 0.9
    eps: NonNegative = 1e-6


class Adamax(_AdamFamily):
    """Adam with the infinity norm, Kingma & Ba 2015."""

    name: Literal["Adamax"]


class NAdam(_AdamFamily):
    """Adam with Nesterov momentum, Dozat 2016."""

    name: Literal["NAdam"]
    momentum_decay: NonNegative = 0.004
    decoupled_weight_decay: Flag = False


class RAdam(_AdamFamily):
    """Rectified Adam, Liu et al. 2020."""

    name: Literal["RAdam"]
    decoupled_weight_decay: Flag = False


class Adafactor(_WithMaximize):
    """Adam's second moments by rows and columns, Shazeer & Stern 2018; no momentum, as in torch."""

    of_tensors: ClassVar[bool] = True
    not_in_groups: ClassVar[frozenset[str]] = frozenset({"eps", "beta2_decay", "d"})

    name: Literal["Adafactor"]
    beta2_decay: Annotated[Number, Field(le=0)] = -0.8
    eps: tuple[NonNegative | None, NonNegative] = (None, 1e-3)
    d: Annotated[Number, Field(ge=1)] = 1.0


class Muon(Optimizer):
    """Momentum orthogonalized by Newton-Schulz, Jordan et al. 2024: for hidden matrices."""

    of_tensors: ClassVar[bool] = True
    matrices: ClassVar[bool] = True

    name: Literal["Muon"]
    weight_decay: NonNegative = 0.1
    momentum: NonNegative = 0.95
    nesterov: Flag = True
    ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315)
    eps: NonNegative = 1e-7
    ns_steps: NewtonSchulzSteps = 5
    adjust_lr_fn: AdjustLr | None = None


class LAMB(Optimizer):
    """Adam with layer-wise rates by parameter norms, You et al. 2020; not in torch."""

    of_tensors: ClassVar[bool] = True

    name: Literal["LAMB"]
    weight_decay: NonNegative = 0.01
    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-6


class TaskOptimizer(Optimizer):
    """The optimizer that the task's `optimizer` creates."""

    name: Literal["task"]
    lr: Positive = 1.0
    of_groups: tuple[float, ...] = (1.0,)
    """On a worker, `lr` of each param group of the task's optimizer."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_arguments(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.keys() - {"name"}:
            text = "has no arguments beside `name: task`: the task's optimizer() sets them"
            raise PydanticCustomError("task_optimizer", text)
        return given

    @model_serializer(mode="plain")
    def _name(self) -> dict[str, Any]:
        return {"name": self.name}

    @override
    def rates(self) -> tuple[float, ...]:
        """Return `lr` of each param group."""
        return self.of_groups

    @override
    def figures(self) -> tuple[str, ...]:
        """Param groups are numbered as in torch."""
        own = enumerate(self.of_groups[1:], 1)
        return "lr", *("" if lr == self.of_groups[0] else f"lr_group_{n}" for n, lr in own)


_Named = SGD | Adam | AdamW | RMSprop | Adagrad | Adadelta | Adamax | NAdam | RAdam
AnyOptimizer = Annotated[_Named, Field(discriminator="name")]
"""Element-wise optimizers."""
_OfTensors = Adafactor | Muon | LAMB
_Any = _Named | _OfTensors | TaskOptimizer
JobOptimizer = Annotated[_Any, Field(discriminator="name")]
"""Optimizer field of a job file."""
OPTIMIZERS: tuple[type[Optimizer], ...] = get_args(_Any)


def options_of(name: str) -> type[Optimizer]:
    """Return the class of an optimizer by its name."""
    return next(cls for cls in OPTIMIZERS if cls.__name__ == name)
