"""What is wrong with a job's parameter groups: in the job file, and beside the model's names."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from distplat.platform.errors import Problem, hint, nearest
from distplat.platform.optimizers import Optimizer

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
