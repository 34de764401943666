"""Checks of a job's optimizer across fields, and against the parameters of the model."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from distplat.platform.errors import Problem, hint, nearest
from distplat.platform.optimizers import SGD, Optimizer

_STATE_ARGUMENTS = ("momentum", "amsgrad", "centered")
"""Arguments that add optimizer state: they are on or off for all parameters alike."""


def optimizer_problems(rule: Optimizer) -> list[Problem]:
    """Check an optimizer and its groups, without a model."""
    if problems := _group_problems(rule):
        return problems
    for number, variant in enumerate(rule.variants()):
        if not isinstance(variant, SGD) or not variant.nesterov:
            continue
        momentum, dampening = variant.momentum, variant.dampening
        if momentum == 0 or dampening != 0:
            where = ("groups", number - 1) if number else ()
            text = f"needs momentum > 0 and dampening 0 (got {momentum:g} and {dampening:g})"
            return [Problem(("optimizer", *where, "nesterov"), text)]
    return []


def _group_problems(rule: Optimizer) -> list[Problem]:
    problems: list[Problem] = []
    first: dict[str, int] = {}
    for number, group in enumerate(rule.groups):
        where = "optimizer", "groups", number
        for pattern in group.patterns:
            if not pattern:
                text = f"has an empty pattern (got {group.match!r})"
                problems.append(Problem((*where, "match"), text, "write 'a.*,b.*'"))
            elif pattern in first:
                text = f"{pattern!r} stands in groups.{first[pattern]} already"
                problems.append(Problem((*where, "match"), text, "remove one of the two"))
            else:
                first[pattern] = number
        problems += _argument_problems(rule, number)
    return problems


def _argument_problems(rule: Optimizer, number: int) -> list[Problem]:
    where, group = ("optimizer", "groups", number), rule.groups[number]
    optimizer_class, arguments = rule.group_classes()[number + 1], group.arguments()
    known = optimizer_class.model_fields.keys() - {"name", "groups"} - optimizer_class.not_in_groups
    problems = [
        Problem((*where, name), f"is no argument of {optimizer_class.__name__}", hint(name, known))
        for name in arguments
        if name not in known
    ]
    if group.name is not None:
        return problems + _name_problems(rule, number)
    for name in _STATE_ARGUMENTS:
        own = getattr(rule, name, None)
        if own is not None and name in arguments and bool(arguments[name]) != bool(own):
            text = (
                f"is {'on' if arguments[name] else 'off'} here and {'on' if own else 'off'} in the "
                f"optimizer: all groups must have the same optimizer state"
            )
            problems.append(Problem((*where, name), text))
    if not arguments and not any(later.name for later in rule.groups[number + 1 :]):
        text = "changes nothing: give it an argument beside `match`"
        problems.append(Problem(where, text))
    return problems


def _name_problems(rule: Optimizer, number: int) -> list[Problem]:
    """Check a group that names its own optimizer."""
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
    Check the patterns of an optimizer's groups against the parameters of a model.

    Args:
        rule: the optimizer.
        names: of all parameters, including frozen ones; one name each.
        tables: all names of each embedding table, by path; other servers update their rows.
        other_names: further names of shared parameters, each with its name in `names`.
    """
    problems: list[Problem] = []
    remaining = [*names]
    for number, group in enumerate(rule.groups):
        where = "optimizer", "groups", number, "match"
        for pattern in group.patterns:
            if any(fnmatchcase(name, pattern) for name in remaining):
                continue
            if any(fnmatchcase(name, pattern) for name in names):
                text = f"{pattern!r} matches parameters of earlier groups only"
                problems.append(
                    Problem(where, text, "a parameter belongs to the first that matches")
                )
            elif not any(
                fnmatchcase(name, pattern)
                for table_names in tables.values()
                for name in table_names
            ):
                text = f"{pattern!r} matches no parameter"
                problems.append(Problem(where, text, _advice(pattern, names, other_names)))
        for path, table_names in tables.items():
            if any(map(group.matches, table_names)):
                text = f"{group.match!r} matches the embedding table {path!r}"
                advice = "its rows are updated as `embeddings.optimizer` says: match less"
                problems.append(Problem(where, text, advice))
        remaining = [name for name in remaining if not group.matches(name)]
    return problems


def shape_problems(rule: Optimizer, shapes: Mapping[str, Sequence[int]]) -> list[Problem]:
    """
    Check that the optimizers can update the shapes of the trained parameters.

    Args:
        rule: the optimizer.
        shapes: by parameter name.
    """
    problems = []
    for number, optimizer in enumerate(rule.group_classes()):
        wrong = [
            n for n, s in shapes.items() if rule.group_of(n) == number and not rule.takes(n, s)
        ]
        if wrong:
            where = ("optimizer", "groups", number - 1, "name") if number else ("optimizer", "name")
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            shape = [*shapes[wrong[0]]]
            text = f"{optimizer.__name__} takes matrices, and {wrong[0]!r} is {shape}{more}"
            names = ",".join(wrong[:4]) + (",..." if len(wrong) > 4 else "")
            entry = f'match: "{names}"'  # without another group they get the job's optimizer
            entry = f"{{{entry}, name: AdamW, lr: 3e-4}}" if rule.matrices else f"{{{entry}}}"
            problems.append(Problem(where, text, f"put them into an earlier group: {entry}"))
    return problems


def _advice(pattern: str, names: Sequence[str], other_names: Mapping[str, str]) -> str:
    for other, name in other_names.items():
        if fnmatchcase(other, pattern):
            return f"{other!r} is the parameter {name!r}: match that name"
    near = nearest(pattern, names)
    if near is not None:
        return f"did you mean {near!r}?"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"names are those of model.named_parameters(): {shown}"
