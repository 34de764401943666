"""
Collects errors of the user's code before the first step, to report them once for all ranks.

A path or a library version that one node lacks fails only the workers of that node. So the error
names ranks and nodes, and which ranks built their model and data. An error on all ranks does not
depend on a node, and is reported once without nodes.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace

from distplat.platform.errors import DistplatError, SpecError, UserCodeError, ranks_text


class SetupErrors:
    """Setup state of the ranks of one attempt."""

    def __init__(self) -> None:
        self._failed: dict[int, DistplatError] = {}
        self._ready: set[int] = set()  #: ranks that have built their model and data
        self._nodes: dict[int, str] = {}

    def setup_done(self, rank: int, node: str) -> None:
        """
        Record that a rank has built its model and data.

        Args:
            rank: the rank.
            node: node of the rank, for messages; empty: unknown.
        """
        self._ready.add(rank)
        self._nodes[rank] = node

    def failed(self, rank: int, node: str, error: DistplatError) -> None:
        """Record that a rank failed to build its model or data."""
        self._failed.setdefault(rank, error)
        self._nodes[rank] = node

    def has(self, error: DistplatError) -> bool:
        """Return whether an error is one of the recorded errors."""
        return any(one is error for one in self._failed.values())

    def waits_for(self, ranks: Collection[int]) -> bool:
        """Return whether some of these ranks may still report the same error."""
        return not self._failed.keys() | self._ready >= set(ranks)

    def with_ranks(self, error: DistplatError, ranks: Collection[int]) -> DistplatError:
        """
        Add the affected ranks and nodes to a recorded error; return other errors unchanged.

        Args:
            error: the error that ends the run.
            ranks: all ranks of the run.
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
        """Return a hint with the ranks without this error; empty: none, or on the same node."""
        nodes = self._nodes_of(failed)
        ready_nodes = {self._nodes[rank] for rank in self._ready} - {""}
        if not ready_nodes or ready_nodes & set(nodes):  # then the node is not the cause
            return ""
        others = "another node" if len(ready_nodes) == 1 else "other nodes"
        return (
            f"{ranks_text(sorted(self._ready))} made model and data on {others}: put what the task "
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
