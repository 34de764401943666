"""
The optimizers a job file may name: those of `torch.optim`, with their own argument names.

They are written out, not looked up, so that a job file is checked without importing torch; a unit
test holds every name and argument here against torch's signatures.

Most act element by element: each element's update needs nothing but the element's own gradient and
state, so a shard of the parameters can be updated alone and every strategy gives the same result.
Others (`Optimizer.of_tensors`) look at a parameter as a whole: for them shards end where parameters
do. A group of parameters may have another optimizer than the rest, as Muon needs it.
`REFUSED_OPTIMIZERS` names those of torch that are neither.
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

_OF_THE_TASK = (
    "write {name: task}, under ring, and make it in the task: "
    "optimizer(named_parameters), docs/task.md"
)
REFUSED_OPTIMIZERS = {
    "ASGD": _OF_THE_TASK,
    "Rprop": _OF_THE_TASK,
    "LBFGS": "it asks for the loss several times in a step",
    "SparseAdam": "it is for embedding tables: `embeddings.optimizer`",
}
"""Optimizers of torch that a job may not name, and why, or what to write."""


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
"""All that a group may name."""
Coefficients = tuple[Number, Number, Number]
NewtonSchulzSteps = Annotated[Count, Field(lt=100)]
AdjustLr = Literal["original", "match_rms_adamw"]


class Group(Spec):
    """
    Parameters that are updated with arguments of their own: a param group of torch.

    What is not given is the optimizer's. A group that names another one has nothing of the
    optimizer's, but the defaults of its own. Which arguments an optimizer has,
    `platform/optimizer_checks.py` knows. Not here is what torch ignores in a group.
    """

    match: str
    """Patterns of parameters' names, separated by commas: `*`, `?`, `[...]`."""
    name: OptimizerName | None = None
    """The optimizer of these parameters; None: the job's."""
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
        """The patterns of `match`, in its order."""
        return tuple(part.strip() for part in self.match.split(","))

    def matches(self, name: str) -> bool:
        """Say whether a pattern matches the name of a parameter."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def arguments(self) -> dict[str, Any]:
        """Give the arguments that are this group's own."""
        return self.model_dump(exclude={"match", "name"})

    @model_serializer(mode="wrap")
    def _given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}


class Optimizer(Spec):
    """Fields that all optimizers have. `lr` is the rate that the schedule scales."""

    of_tensors: ClassVar[bool] = False
    """Whether the update of an element needs more of its parameter than that element."""
    matrices: ClassVar[bool] = False
    """Whether it takes parameters of two dimensions, and no others."""
    not_in_groups: ClassVar[frozenset[str]] = frozenset()
    """Arguments that are the same in all groups."""

    name: str
    """The class in `torch.optim`."""
    lr: Positive
    """Learning rate before the schedule's factor."""
    weight_decay: NonNegative = 0.0
    """L2 penalty; in AdamW decoupled from the gradient."""
    groups: tuple[Group, ...] = ()
    """Parameters with arguments of their own; each belongs to the first group that matches it."""

    def arguments(self) -> dict[str, object]:
        """Give the keyword arguments for the class in `torch.optim`."""
        return self.model_dump(exclude={"name", "groups"})

    def group_of(self, name: str) -> int:
        """Give the number of the group of a parameter, from 1; 0: it is in none."""
        matches = (number for number, group in enumerate(self.groups, 1) if group.matches(name))
        return next(matches, 0)

    def group_classes(self) -> "list[type[Optimizer]]":
        """Give the class of parameters that are in no group, then that of each group."""
        own = type(self)
        return [own, *(options_of(group.name) if group.name else own for group in self.groups)]

    @property
    def whole(self) -> bool:
        """Whether it needs whole tensors: one of its classes does, or there are several."""
        return len({*self.group_classes()}) > 1 or any(
            kind.of_tensors for kind in self.group_classes()
        )

    def takes(self, name: str, shape: Sequence[int]) -> bool:
        """Say whether a parameter has a shape that its optimizer can update."""
        return len(shape) == 2 or not self.group_classes()[self.group_of(name)].matrices

    def variants(self) -> "list[Optimizer]":
        """
        Give the optimizer of parameters that are in no group, then that of each group.

        Raises:
            ValidationError: a group has an argument that its optimizer has not.
        """
        own = {"name": self.name, **self.arguments()}
        arguments = [own]
        for group in self.groups:
            base = own if group.name is None else {"name": group.name}
            arguments.append(base | group.arguments())
        return [
            kind.model_validate(one)
            for kind, one in zip(self.group_classes(), arguments, strict=True)
        ]

    def rates(self) -> tuple[float, ...]:
        """Give `lr` of parameters that are in no group, then that of each group."""
        return self.lr, *(self.lr if group.lr is None else group.lr for group in self.groups)

    def figures(self) -> tuple[str, ...]:
        """Name each of `rates` as it is reported; empty: it is the first one."""
        own = enumerate(self.groups)
        return "lr", *("" if group.lr is None else f"lr_group_{n}" for n, group in own)


class _Signed(Optimizer):
    """Those that can go up, too."""

    maximize: Flag = False


class _Adams(_Signed):
    """Those with two moments of the gradient."""

    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-8


class SGD(_Signed):
    """Stochastic gradient descent, with momentum if asked."""

    name: Literal["SGD"]
    momentum: NonNegative = 0.0
    dampening: NonNegative = 0.0
    nesterov: Flag = False


class Adam(_Adams):
    """Adam, Kingma & Ba 2015."""

    name: Literal["Adam"]
    amsgrad: Flag = False


class AdamW(_Adams):
    """Adam with decoupled weight decay, Loshchilov & Hutter 2019."""

    name: Literal["AdamW"]
    weight_decay: NonNegative = 0.01
    amsgrad: Flag = False


class RMSprop(_Signed):
    """RMSprop, Hinton's lecture 6."""

    name: Literal["RMSprop"]
    alpha: Fraction = 0.99
    eps: NonNegative = 1e-8
    momentum: NonNegative = 0.0
    centered: Flag = False


class Adagrad(_Signed):
    """Adagrad, Duchi et al. 2011."""

    name: Literal["Adagrad"]
    lr_decay: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10


class Adadelta(_Signed):
    """Adadelta, Zeiler 2012."""

    name: Literal["Adadelta"]
    rho: Fraction = 0.9
    eps: NonNegative = 1e-6


class Adamax(_Adams):
    """Adam with the infinity norm, Kingma & Ba 2015."""

    name: Literal["Adamax"]


class NAdam(_Adams):
    """Adam with Nesterov momentum, Dozat 2016."""

    name: Literal["NAdam"]
    momentum_decay: NonNegative = 0.004
    decoupled_weight_decay: Flag = False


class RAdam(_Adams):
    """Rectified Adam, Liu et al. 2020."""

    name: Literal["RAdam"]
    decoupled_weight_decay: Flag = False


class Adafactor(_Signed):
    """Adam's second moments by rows and columns, Shazeer & Stern 2018; torch's has no momentum."""

    of_tensors: ClassVar[bool] = True
    not_in_groups: ClassVar[frozenset[str]] = frozenset({"eps", "beta2_decay", "d"})

    name: Literal["Adafactor"]
    beta2_decay: Annotated[Number, Field(le=0)] = -0.8
    eps: tuple[NonNegative | None, NonNegative] = (None, 1e-3)
    d: Annotated[Number, Field(ge=1)] = 1.0


class Muon(Optimizer):
    """Momentum made orthogonal by Newton and Schulz, Jordan et al. 2024: for hidden matrices."""

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
    """Adam with a rate by the norms of each parameter, You et al. 2020; not one of torch's."""

    of_tensors: ClassVar[bool] = True

    name: Literal["LAMB"]
    weight_decay: NonNegative = 0.01
    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-6


class TaskOptimizer(Optimizer):
    """Whatever the task's `optimizer` makes."""

    name: Literal["task"]
    lr: Positive = 1.0
    of_groups: tuple[float, ...] = (1.0,)
    """In a worker, which has asked the task: `lr` of each param group."""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.keys() - {"name"}:
            text = "has no arguments beside `name: task`: the task's optimizer() says them"
            raise PydanticCustomError("task_optimizer", text)
        return given

    @model_serializer(mode="plain")
    def _name(self) -> dict[str, Any]:
        return {"name": self.name}

    def rates(self) -> tuple[float, ...]:
        """Give `lr` of each param group."""
        return self.of_groups

    @override
    def figures(self) -> tuple[str, ...]:
        """Groups are counted as torch does."""
        own = enumerate(self.of_groups[1:], 1)
        return "lr", *("" if lr == self.of_groups[0] else f"lr_group_{n}" for n, lr in own)


_Named = SGD | Adam | AdamW | RMSprop | Adagrad | Adadelta | Adamax | NAdam | RAdam
AnyOptimizer = Annotated[_Named, Field(discriminator="name")]
"""Those that update element by element."""
_OfTensors = Adafactor | Muon | LAMB
_Any = _Named | _OfTensors | TaskOptimizer
JobOptimizer = Annotated[_Any, Field(discriminator="name")]
"""As a job file has it."""
OPTIMIZERS: tuple[type[Optimizer], ...] = get_args(_Any)


def options_of(name: str) -> type[Optimizer]:
    """Give the class of an optimizer that a job may name."""
    return next(kind for kind in OPTIMIZERS if kind.__name__ == name)
