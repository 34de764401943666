"""
Errors of the user's code before the first step, told once for all ranks that have them.

A path that one node lacks, or another version of a library there, fails the workers of that node
alone. So the error names ranks and nodes, and who has made model and data. What fails on all ranks
is no matter of a node, and is told as one error.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace

from distplat.platform.errors import DistplatError, SpecError, UserCodeError, ranks_text


class SetupErrors:
    """What is known of the ranks of one attempt while they make their model and data."""

    def __init__(self) -> None:
        self._failed: dict[int, DistplatError] = {}
        self._made: set[int] = set()  #: ranks that have their model and data
        self._nodes: dict[int, str] = {}

    def made(self, rank: int, node: str) -> None:
        """
        Note that a rank has made its model and data.

        Args:
            rank: which.
            node: where it is, for people to read; empty: not known.
        """
        self._made.add(rank)
        self._nodes[rank] = node

    def failed(self, rank: int, node: str, error: DistplatError) -> None:
        """Note that a rank has failed to."""
        self._failed.setdefault(rank, error)
        self._nodes[rank] = node

    def has(self, error: DistplatError) -> bool:
        """Say whether an error is one of these."""
        return any(one is error for one in self._failed.values())

    def waits_for(self, ranks: Collection[int]) -> bool:
        """Say whether some of these ranks may still fail alike."""
        return not self._failed.keys() | self._made >= set(ranks)

    def with_ranks(self, error: DistplatError, ranks: Collection[int]) -> DistplatError:
        """
        Give an error of a run with the ranks and nodes that have it; another error as it is.

        Args:
            error: what ends the run.
            ranks: all that there are.
        """
        if not self.has(error) or len(ranks) == 1:
            return error
        affected = sorted(rank for rank, one in self._failed.items() if _is_same_error(one, error))
        if len(affected) == len(ranks):
            return error if isinstance(error, SpecError) else _with_ranks(error, "every rank", "")
        return _with_ranks(error, self._places(affected), self._remedy(affected))

    def _places(self, ranks: Collection[int]) -> str:
        """`rank 1`, or `ranks 1, 3 (node gpu-2, 10.0.0.7)` where there are several nodes."""
        nodes = self._nodes_of(ranks)
        if len(set(self._nodes.values())) > 1 and nodes:
            return f"{ranks_text(ranks)} (node {'; node '.join(nodes)})"
        return ranks_text(ranks)

    def _remedy(self, failed: Collection[int]) -> str:
        """Name the ranks without this error; empty: there are none, or on the same node."""
        nodes = self._nodes_of(failed)
        there = {self._nodes[rank] for rank in self._made} - {""}
        if not there or there & set(nodes):  # then it is not for the node
            return ""
        others = "another node" if len(there) == 1 else "other nodes"
        return (
            f"{ranks_text(sorted(self._made))} made model and data on {others}: put what the task "
            f"reads on {' and '.join(nodes)} too, under the same path, or on storage that all "
            "nodes share"
        )

    def _nodes_of(self, ranks: Iterable[int]) -> list[str]:
        return sorted({self._nodes[rank] for rank in ranks} - {""})


def _is_same_error(one: DistplatError, other: DistplatError) -> bool:
    if isinstance(one, UserCodeError) and isinstance(other, UserCodeError):
        return one.summary == other.summary
    return type(one) is type(other) and str(one) == str(other)


def _with_ranks(error: DistplatError, on_ranks: str, remedy: str) -> DistplatError:
    match error:
        case UserCodeError():
            fields = error.rank, error.step, error.summary, error.traceback
            return UserCodeError(*fields, error.remedy or remedy, error.evaluating, on_ranks)
        case SpecError():
            problems = [
                replace(p, message=f"{p.message}, on {on_ranks}", hint=remedy or p.hint)
                for p in error.problems
            ]
            return SpecError(*problems)
        case _:
            return error
