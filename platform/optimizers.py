"""
The optimizers a job file may name: those of `torch.optim`, with their own argument names.

They are written out, not looked up, so that a job file is checked without importing torch; a unit
test holds every name and argument here against torch's signatures.

Most act element by element: each element's update needs nothing but the element's own gradient and
state, so a shard of the parameters can be updated alone and every strategy gives the same result.
Others (`Optimizer.whole`) look at a parameter as a whole: for them shards end where parameters do.
`REFUSED_OPTIMIZERS` names those of torch that are neither.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import override

from distplat.platform.errors import Problem, hint, nearest
from distplat.platform.fields import (
    Flag,
    Fraction,
    NonNegative,
    Number,
    Pair,
    Positive,
    Spec,
)

REFUSED_OPTIMIZERS = {
    "Muon": "it takes matrices alone: write optimizer(named_parameters) and `name: task`",
    "LBFGS": "it asks for the loss several times in a step",
    "SparseAdam": "it is for embedding tables: `embeddings.optimizer`",
}
"""Optimizers of torch that a job may not name, and why."""


class Group(Spec):
    """
    Parameters that are updated with arguments of their own: a param group of torch.

    What is not given is the optimizer's. Which arguments an optimizer has, `group_problems` of
    `platform/optimizers.py` knows. Not here is what torch ignores in a group.
    """

    match: str
    """Patterns of parameters' names, separated by commas: `*`, `?`, `[...]`."""
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

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of `match`, in its order."""
        return tuple(part.strip() for part in self.match.split(","))

    def matches(self, name: str) -> bool:
        """Say whether a pattern matches the name of a parameter."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def arguments(self) -> dict[str, Any]:
        """Give the arguments that are this group's own."""
        return self.model_dump(exclude={"match"})

    @model_serializer(mode="wrap")
    def _given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if value is not None}


class Optimizer(Spec):
    """What all optimizers have. `lr` is the rate that the schedule scales."""

    whole: ClassVar[bool] = False
    """Whether the update of an element needs more of its parameter than that element."""
    not_in_groups: ClassVar[frozenset[str]] = frozenset()
    """Arguments that are the same in all groups."""

    name: str
    """The class in `torch.optim`."""
    lr: Positive
    """Learning rate before the schedule's factor."""
    weight_decay: NonNegative = 0.0
    """L2 penalty; in AdamW decoupled from the gradient."""
    maximize: Flag = False
    """Climb instead of descend."""
    groups: tuple[Group, ...] = ()
    """Parameters with arguments of their own; each belongs to the first group that matches it."""

    def arguments(self) -> dict[str, object]:
        """Give the keyword arguments for the class in `torch.optim`."""
        return self.model_dump(exclude={"name", "groups"})

    def group_of(self, name: str) -> int:
        """Give the number of the group of a parameter, from 1; 0: it is in none."""
        found = (number for number, one in enumerate(self.groups, 1) if one.matches(name))
        return next(found, 0)

    def variants(self) -> list[Self]:
        """
        Give the optimizer of parameters that are in no group, then that of each group.

        Raises:
            ValidationError: a group has an argument that the optimizer has not.
        """
        own = {"name": self.name, **self.arguments()}
        each = [{}, *(group.arguments() for group in self.groups)]
        return [type(self).model_validate(own | given) for given in each]

    def rates(self) -> tuple[float, ...]:
        """Give `lr` of parameters that are in no group, then that of each group."""
        return self.lr, *(self.lr if one.lr is None else one.lr for one in self.groups)

    def figures(self) -> tuple[str, ...]:
        """Name each of `rates` as it is reported; empty: it is the first one."""
        own = enumerate(self.groups)
        return "lr", *("" if one.lr is None else f"lr_group_{n}" for n, one in own)


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum if asked."""

    name: Literal["SGD"]
    momentum: NonNegative = 0.0
    dampening: NonNegative = 0.0
    nesterov: Flag = False


class Adam(Optimizer):
    """Adam, Kingma & Ba 2015."""

    name: Literal["Adam"]
    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-8
    amsgrad: Flag = False


class AdamW(Optimizer):
    """Adam with decoupled weight decay, Loshchilov & Hutter 2019."""

    name: Literal["AdamW"]
    weight_decay: NonNegative = 0.01
    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-8
    amsgrad: Flag = False


class RMSprop(Optimizer):
    """RMSprop, Hinton's lecture 6."""

    name: Literal["RMSprop"]
    alpha: Fraction = 0.99
    eps: NonNegative = 1e-8
    momentum: NonNegative = 0.0
    centered: Flag = False


class Adagrad(Optimizer):
    """Adagrad, Duchi et al. 2011."""

    name: Literal["Adagrad"]
    lr_decay: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10


class Adadelta(Optimizer):
    """Adadelta, Zeiler 2012."""

    name: Literal["Adadelta"]
    rho: Fraction = 0.9
    eps: NonNegative = 1e-6


class Adamax(Optimizer):
    """Adam with the infinity norm, Kingma & Ba 2015."""

    name: Literal["Adamax"]
    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-8


class NAdam(Optimizer):
    """Adam with Nesterov momentum, Dozat 2016."""

    name: Literal["NAdam"]
    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-8
    momentum_decay: NonNegative = 0.004
    decoupled_weight_decay: Flag = False


class RAdam(Optimizer):
    """Rectified Adam, Liu et al. 2020."""

    name: Literal["RAdam"]
    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-8
    decoupled_weight_decay: Flag = False


class Adafactor(Optimizer):
    """Adam's second moments by rows and columns, Shazeer & Stern 2018; torch's has no momentum."""

    whole: ClassVar[bool] = True
    not_in_groups: ClassVar[frozenset[str]] = frozenset({"eps", "beta2_decay", "d"})

    name: Literal["Adafactor"]
    beta2_decay: Annotated[Number, Field(le=0)] = -0.8
    eps: tuple[NonNegative | None, NonNegative] = (None, 1e-3)
    d: Annotated[Number, Field(ge=1)] = 1.0


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
JobOptimizer = Annotated[_Named | Adafactor | TaskOptimizer, Field(discriminator="name")]
"""As a job file has it."""


_REMEMBERED = ("momentum", "amsgrad", "centered")
"""Arguments that decide what an optimizer remembers: on for all parameters, or off for all."""


def group_problems(rule: Optimizer) -> list[Problem]:
    """Check the groups of an optimizer, without a model."""
    found: list[Problem] = []
    first: dict[str, int] = {}
    for number, group in enumerate(rule.groups):
        where = "optimizer", "groups", number
        for pattern in group.patterns:
            if not pattern:
                text = f"has an empty pattern (got {group.match!r})"
                found.append(Problem((*where, "match"), text, "write 'a.*,b.*'"))
            elif pattern in first:
                text = f"{pattern!r} stands in groups.{first[pattern]} already"
                found.append(Problem((*where, "match"), text, "remove one of the two"))
            else:
                first[pattern] = number
        found += _argument_problems(rule, number)
    return found


def _argument_problems(rule: Optimizer, number: int) -> list[Problem]:
    where = "optimizer", "groups", number
    given = rule.groups[number].arguments()
    known = type(rule).model_fields.keys() - {"name", "groups"} - rule.not_in_groups
    found = [
        Problem((*where, name), f"is no argument of {rule.name}", hint(name, known))
        for name in given
        if name not in known
    ]
    for name in _REMEMBERED:
        own = getattr(rule, name, None)
        if own is not None and name in given and bool(given[name]) != bool(own):
            text = (
                f"is {'on' if given[name] else 'off'} here and {'on' if own else 'off'} in the "
                f"optimizer: what is remembered of a parameter is the same in all groups"
            )
            found.append(Problem((*where, name), text))
    if not given:
        text = "changes nothing: give it an argument beside `match`"
        found.append(Problem(where, text))
    return found


def match_problems(
    rule: Optimizer,
    names: Sequence[str],
    tables: Mapping[str, Sequence[str]],
    other_names: Mapping[str, str],
) -> list[Problem]:
    """
    Compare the patterns of an optimizer's groups with the parameters of a model.

    Args:
        rule: the optimizer.
        names: of all parameters, frozen ones too; each has one name.
        tables: embedding tables by path, whose rows other servers update: how each may be called.
        other_names: of parameters that have several names, those not in `names`, with the one that
            is.
    """
    found: list[Problem] = []
    left = [*names]
    for number, group in enumerate(rule.groups):
        where = "optimizer", "groups", number, "match"
        for pattern in group.patterns:
            if any(fnmatchcase(name, pattern) for name in left):
                continue
            if any(fnmatchcase(name, pattern) for name in names):
                text = f"{pattern!r} matches parameters of earlier groups only"
                found.append(Problem(where, text, "a parameter belongs to the first that matches"))
            elif not any(fnmatchcase(one, pattern) for called in tables.values() for one in called):
                text = f"{pattern!r} matches no parameter"
                found.append(Problem(where, text, _advice(pattern, names, other_names)))
        for path, called in tables.items():
            if any(map(group.matches, called)):
                text = f"{group.match!r} matches the embedding table {path!r}"
                advice = "its rows are updated as `embeddings.optimizer` says: match less"
                found.append(Problem(where, text, advice))
        left = [name for name in left if not group.matches(name)]
    return found


def _advice(pattern: str, names: Sequence[str], other_names: Mapping[str, str]) -> str:
    for other, name in other_names.items():
        if fnmatchcase(other, pattern):
            return f"{other!r} is the parameter {name!r}: match that name"
    near = nearest(pattern, names)
    if near is not None:
        return f"did you mean {near!r}?"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"names are those of model.named_parameters(): {shown}"
