"""
Which modules are split over the ranks of a tensor group, and how: names and numbers, no torch.

    blocks.*.mlp.up: colwise            a plan: patterns of module names, and a style for each
    blocks.*.mlp.down: rowwise

    rank 0 of 3   | 0 1 2 3 |           10 columns over 3 ranks: sizes need not be divisible,
    rank 1        | 4 5 6 |             but every rank must have a part
    rank 2        | 7 8 9 |
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from distplat.platform.errors import Problem, SpecError, hint, nearest
from distplat.platform.even_split import split_evenly

STYLES: Mapping[str, str] = {
    "colwise": "a linear layer's outputs are split, and stay so: a `rowwise` layer takes them",
    "colwise_gather": "a linear layer's outputs are split, then put together on every rank",
    "rowwise": "a linear layer's inputs are split: those of a `colwise` layer, or complete ones",
    "embedding": "an embedding's rows are split: each rank has a part of the vocabulary",
    "heads": "an attention's heads are split",
    "branches": "the pattern names the branches of one module, each of which is on one rank",
}
"""Styles of a plan, with their descriptions."""


@dataclass(frozen=True)
class ShardSpec:
    """
    A rank's part of a full tensor: a range of one dimension.

    If a tensor concatenates several matrices, such as query, key and value, the rank has the same
    range of each of these `blocks`.
    """

    dim: int
    start: int
    """First index, within a block."""
    stop: int
    """Last index, exclusive, within a block; equal to `start` if the part is empty."""
    size: int
    """Size of the full tensor in this dimension, including all blocks."""
    blocks: int = 1

    def ranges(self) -> list[tuple[int, int]]:
        """Return the rank's ranges of the full dimension, in order."""
        block = self.size // self.blocks
        return [(b * block + self.start, b * block + self.stop) for b in range(self.blocks)]

    @property
    def extent(self) -> int:
        """Size of the rank's part in this dimension."""
        return (self.stop - self.start) * self.blocks

    @property
    def whole(self) -> bool:
        """Whether the rank has the full tensor."""
        return self.extent == self.size


def slice_of(
    what: str, dim: int, units: int, size: int, rank: int, world: int, *, blocks: int = 1
) -> ShardSpec:
    """
    Return a rank's part of a dimension that consists of indivisible units.

    Args:
        what: name of the module, for errors.
        dim: the split dimension.
        units: number of columns, rows or heads.
        size: of the dimension; `blocks * units` times the size of a unit.
        rank: in the tensor group.
        world: number of ranks in the tensor group.
        blocks: number of equal blocks of the dimension, each of which is split.

    Raises:
        SpecError: fewer units than ranks, or units of different sizes.
    """
    if size % (blocks * units):
        text = f"{what}: {size} features are no {blocks * units} heads of one size"
        raise SpecError(Problem((), text, "look at its number of heads and its `head_layout`"))
    if units < world:
        text = f"{what}: {units} cannot be shared out to {world} ranks"
        raise SpecError(Problem((), text, f"take a tensor size of {units} or less"))
    start, stop = split_evenly(units, world)[rank]
    unit = size // (blocks * units)
    return ShardSpec(dim, start * unit, stop * unit, size, blocks)


def share_out(costs: Sequence[float], ranks: int) -> list[int]:
    """
    Assign branches to ranks: the most expensive first, to the least loaded rank (Graham 1969).

    Args:
        costs: cost of each branch, >= 0.
        ranks: number of ranks; at most the number of branches, so that each rank has a branch.

    Returns:
        The rank of each branch, in the order of `costs`.
    """
    loads, counts = [0.0] * ranks, [0] * ranks
    owners = [0] * len(costs)
    for branch in sorted(range(len(costs)), key=lambda b: (-costs[b], b)):
        rank = min(range(ranks), key=lambda r: (loads[r], counts[r], r))
        owners[branch] = rank
        loads[rank] += costs[branch]
        counts[rank] += 1
    return owners


def check_styles(plan: Mapping[str, str], where: Sequence[str] = ()) -> list[Problem]:
    """
    Return the problems of a plan that do not depend on the model.

    Args:
        plan: pattern -> style.
        where: the field with the plan, for messages.
    """
    problems = []
    for pattern, style in plan.items():
        if style not in STYLES:
            text = f"unknown style {style!r}"
            problems.append(Problem((*where, pattern), text, hint(style, STYLES)))
        if not all(pattern.split(".")):
            text = f"{pattern!r} is no pattern of module names"
            problems.append(Problem((*where, pattern), text, "such as `blocks.*.mlp.up`"))
    return problems


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a name; `*`, `?` and `[..]` do not match dots."""
    patterns, parts = pattern.split("."), name.split(".")
    return len(patterns) == len(parts) and all(map(fnmatchcase, parts, patterns))


def resolve(
    plan: Mapping[str, str], names: Collection[str], *, partial: bool = False
) -> dict[str, str]:
    """
    Return the style of each module that the plan matches, in the order of `names`.

    Args:
        plan: pattern -> style.
        names: of all modules, in the model's order.
        partial: the names are those of a pipeline stage, so a pattern may match none of them.

    Raises:
        SpecError: names every unknown style, every pattern without a match, and every module that
            has two styles or is inside another module of the plan.
    """
    problems = check_styles(plan)
    styles: dict[str, str] = {}
    pattern_of: dict[str, str] = {}
    for pattern, style in plan.items():
        named = [name for name in names if matches(pattern, name)]
        if not named and not partial:
            problems.append(_names_nothing(pattern, names))
        for name in named:
            if styles.setdefault(name, style) != style:
                text = (
                    f"{name} is {styles[name]} by {pattern_of[name]!r} and {style} by {pattern!r}"
                )
                problems.append(Problem((), text, "let one pattern name it"))
            pattern_of.setdefault(name, pattern)
    problems += [
        Problem((), f"{inner} ({styles[inner]}) lies inside {outer} ({styles[outer]})", "split one")
        for outer in styles
        for inner in styles
        if inner.startswith(f"{outer}.")
    ]
    if problems:
        raise SpecError(*problems)
    return {name: styles[name] for name in names if name in styles}


def _names_nothing(pattern: str, names: Collection[str]) -> Problem:
    """Return the problem of a pattern without a match, with the names at the first mismatch."""
    parts = pattern.split(".")
    for known in range(len(parts) - 1, -1, -1):
        prefix = ".".join(parts[:known])
        inside = [n for n in names if n and (not known or _begins(n, prefix))]
        there = sorted({n.split(".")[known] for n in inside if n.count(".") >= known})
        if there:
            break
    near = nearest(parts[known], there) if there else None
    proposal = ".".join([*parts[:known], near, *parts[known + 1 :]]) if near else ""
    listed = ", ".join(there[:12]) + (", ..." if len(there) > 12 else "")
    place = f"in {prefix}: " if prefix else "modules: "
    text = f"did you mean {proposal!r}? " if proposal else ""
    return Problem((), f"{pattern!r} names no module", f"{text}{place}{listed}")


def _begins(name: str, prefix: str) -> bool:
    return matches(prefix, ".".join(name.split(".")[: prefix.count(".") + 1]))


def siblings(names: Sequence[str]) -> dict[str, list[str]]:
    """Group module names by their parent, in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return groups


@dataclass(frozen=True)
class HeadLayout:
    """The linear layers of an attention module whose outputs or inputs are heads."""

    inwards: Mapping[str, str]
    """Linear layers whose outputs are heads, by name in the module, and the axes of the outputs:
    `heads features` for query, key or value, `3 heads features` for all three in one layer, or
    `heads 3 features` if they are interleaved by head."""
    outwards: str
    """Linear layer whose inputs are heads: `heads features`."""
    count: str = "heads"
    """Attribute of the module with the number of heads; set to the rank's number of heads."""

    def blocks(self, name: str) -> int:
        """
        Return the number of equal blocks in a layer's outputs, each of which is split.

        Raises:
            SpecError: the axes are invalid.
        """
        axes = self.inwards[name].split()
        if axes.count("heads") == 1:
            before = axes[: axes.index("heads")]
            if all(axis.isdecimal() and int(axis) for axis in before):
                return math.prod(map(int, before))
        text = f"head_layout: {name} has the axes {self.inwards[name]!r}"
        hint = "write numbers, `heads`, and what a head consists of, such as `3 heads features`"
        raise SpecError(Problem((), text, hint))
