"""What of a job's optimizer no single field can see, and what of it the model must agree to."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from distplat.platform.errors import Problem, hint, nearest
from distplat.platform.optimizers import SGD, Optimizer

_REMEMBERED = ("momentum", "amsgrad", "centered")
"""Arguments that decide what an optimizer remembers: on for all parameters, or off for all."""


def optimizer_problems(rule: Optimizer) -> list[Problem]:
    """Check an optimizer and its groups, without a model."""
    if found := _group_problems(rule):
        return found
    for number, one in enumerate(rule.variants()):
        if isinstance(one, SGD) and one.nesterov and (one.momentum == 0 or one.dampening != 0):
            where = ("groups", number - 1) if number else ()
            message = (
                f"needs momentum > 0 and dampening 0 (got {one.momentum:g} and {one.dampening:g})"
            )
            return [Problem(("optimizer", *where, "nesterov"), message)]
    return []


def _group_problems(rule: Optimizer) -> list[Problem]:
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
    where, group = ("optimizer", "groups", number), rule.groups[number]
    kind, given = rule.kinds()[number + 1], group.arguments()
    known = kind.model_fields.keys() - {"name", "groups"} - kind.not_in_groups
    found = [
        Problem((*where, name), f"is no argument of {kind.__name__}", hint(name, known))
        for name in given
        if name not in known
    ]
    if group.name is not None:
        return found + _name_problems(rule, number)
    for name in _REMEMBERED:
        own = getattr(rule, name, None)
        if own is not None and name in given and bool(given[name]) != bool(own):
            text = (
                f"is {'on' if given[name] else 'off'} here and {'on' if own else 'off'} in the "
                f"optimizer: what is remembered of a parameter is the same in all groups"
            )
            found.append(Problem((*where, name), text))
    if not given and not any(one.name for one in rule.groups[number + 1 :]):
        text = "changes nothing: give it an argument beside `match`"
        found.append(Problem(where, text))
    return found


def _name_problems(rule: Optimizer, number: int) -> list[Problem]:
    """Check a group that has an optimizer of its own."""
    where, group = ("optimizer", "groups", number), rule.groups[number]
    if group.name == rule.name:
        text, advice = f"is {group.name}, as the optimizer is", "a group without `name` has its own"
        return [Problem((*where, "name"), text, f"remove it: {advice} arguments beside those")]
    if group.lr is None:
        text = f"required where a group has a `name`: {rule.name}'s is not right for {group.name}"
        return [Problem((*where, "lr"), text)]
    return []


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


def shape_problems(rule: Optimizer, shapes: Mapping[str, Sequence[int]]) -> list[Problem]:
    """
    Compare the parameters that are trained with what their optimizers take.

    Args:
        rule: the optimizer.
        shapes: of the parameters, by name.
    """
    found = []
    for number, kind in enumerate(rule.kinds()):
        wrong = [
            n for n, s in shapes.items() if rule.group_of(n) == number and not rule.takes(n, s)
        ]
        if wrong:
            where = ("optimizer", "groups", number - 1, "name") if number else ("optimizer", "name")
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            text = (
                f"{kind.__name__} takes matrices, and {wrong[0]!r} is {[*shapes[wrong[0]]]}{more}"
            )
            names = ",".join(wrong[:4]) + (",..." if len(wrong) > 4 else "")
            own = f'match: "{names}"'  # in no other group they have the job's optimizer
            own = f"{{{own}, name: AdamW, lr: 3e-4}}" if rule.matrices else f"{{{own}}}"
            found.append(Problem(where, text, f"put them into an earlier group: {own}"))
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
