"""
Where ranks are: the grid of workers under `hybrid`, and the backend that a collective group takes.

The grid has replicas of the model, stages of a replica, slices of a stage. Ranks of one replica
have consecutive numbers, so they are placed together:

    pipeline 2, tensor 2, data 2          rank = (replica * stages + stage) * slices + slice

                 stage 0    stage 1
    replica 0     0  1       2  3         a row is a worker group: it holds one copy of the model
    replica 1     4  5       6  7         a column: ranks 0 and 4 are peers, they hold the same part

A group's backend is decided from the nodes of its ranks. No I/O, no clock:

    all on one node            several nodes              one rank per node
    +------------+             +-------+   +-------+      +---+  +---+  +---+
    | 0  1  2  3 |             | 0   1 |---| 2   3 |      | 0 |--| 1 |--| 2 |
    +------------+             +-------+   +-------+      +---+  +---+  +---+
      shm                        hierarchical               gloo

Every rank decides for itself from the same table, so all come to the same choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distplat.platform.errors import Problem, SpecError


@dataclass(frozen=True)
class Position:
    """Where a rank is in the grid."""

    replica: int
    stage: int
    slice: int


@dataclass(frozen=True)
class Grid:
    """Sizes of the grid, each >= 1."""

    stages: int
    slices: int
    """Ranks that share one stage's layers (tensor parallel)."""
    replicas: int

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.replicas * self.group_size

    @property
    def group_size(self) -> int:
        """Ranks of one replica."""
        return self.stages * self.slices

    def position(self, rank: int) -> Position:
        """Give a rank's coordinates in the grid."""
        rest, part = divmod(rank, self.slices)
        replica, stage = divmod(rest, self.stages)
        return Position(replica, stage, part)

    def rank(self, at: Position) -> int:
        """Give the rank at given coordinates."""
        return (at.replica * self.stages + at.stage) * self.slices + at.slice

    def group(self, replica: int) -> tuple[int, ...]:
        """Give the ranks that together hold one copy of the model."""
        first = replica * self.group_size
        return tuple(range(first, first + self.group_size))

    def dp_ranks(self, stage: int, part: int) -> tuple[int, ...]:
        """Give the ranks that hold the same part of the model, one of each replica."""
        return tuple(self.rank(Position(r, stage, part)) for r in range(self.replicas))

    def slices_of(self, replica: int, stage: int) -> tuple[int, ...]:
        """Give the ranks that share the layers of one stage."""
        return tuple(self.rank(Position(replica, stage, t)) for t in range(self.slices))

    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Give the peers of every part of the model, those of stage 0 first."""
        positions = [(s, t) for s in range(self.stages) for t in range(self.slices)]
        return tuple(self.dp_ranks(stage, part) for stage, part in positions)


@dataclass(frozen=True)
class RankLocation:
    """What a rank tells the others of where it is."""

    node: str
    """Ray's id of the node."""
    gpu: bool = False
    """Whether its tensors are on a whole GPU of its own that NCCL can use."""
    shm: bool = True
    """Whether the shared-memory backend works there."""
    gpus: tuple[str, ...] = ()
    """Ids of the GPUs that Ray has given to it."""


@dataclass(frozen=True)
class BackendChoice:
    """A backend, and why it is the one."""

    backend: str
    why: str


def by_node(locations: Sequence[RankLocation]) -> list[list[int]]:
    """Give the ranks of each node in rising order; nodes in the order of their first rank."""
    nodes: dict[str, list[int]] = {}
    for rank, location in enumerate(locations):
        nodes.setdefault(location.node, []).append(rank)
    return list(nodes.values())


def gpus_of_node(locations: Sequence[RankLocation], rank: int) -> list[str]:
    """
    Give the GPUs of all ranks of a rank's node: first one of each, in their order.

    Args:
        locations: one per rank, in rank order.
        rank: which one.

    Returns:
        Ids; none where ranks share a GPU, have none, or this one is alone.
    """
    node_gpus = [location.gpus for location in locations if location.node == locations[rank].node]
    first = [gpus[0] for gpus in node_gpus if gpus]
    if len(node_gpus) == 1 or len({*first}) < len(node_gpus):
        return []
    return list(dict.fromkeys([*first, *(gpu for gpus in node_gpus for gpu in gpus)]))


def choose_backend(locations: Sequence[RankLocation]) -> BackendChoice:
    """
    Choose a backend.

    Args:
        locations: one per rank, in rank order; at least one.
    """
    world, nodes = len(locations), by_node(locations)
    if world > 1 and all(location.gpu for location in locations):
        return BackendChoice("nccl", f"all {world} workers have a GPU of their own")
    if len(nodes) == world > 1:
        return BackendChoice("gloo", f"all {world} workers are on nodes of their own")
    if not all(location.shm for location in locations):
        return BackendChoice("gloo", "shared memory does not work on every node")
    if len(nodes) == 1:
        who = f"all {world} workers are" if world > 1 else "the only worker is"
        return BackendChoice("shm", f"{who} on one node")
    return BackendChoice(
        "hierarchical", f"{world} workers are on {len(nodes)} nodes, some on the same"
    )


def validate_backend(backend: str, locations: Sequence[RankLocation]) -> BackendChoice:
    """
    Take the backend that a job names, if it can work.

    Raises:
        SpecError: it cannot; says why and what to choose.
    """
    nodes = by_node(locations)
    if backend == "shm" and len(nodes) > 1:
        where = "; ".join(
            f"{locations[ranks[0]].node[:12]}: worker {', '.join(map(str, ranks))}"
            for ranks in nodes
        )
        raise _refused(
            f"`shm` needs all workers on one node, but they are on {len(nodes)} ({where})",
            "choose `backend: hierarchical`, or `auto`",
        )
    unable = _ranks(locations, "shm")
    needs_memory = backend == "shm" or (backend == "hierarchical" and len(nodes) < len(locations))
    if needs_memory and unable:
        raise _refused(
            f"shared memory does not work where worker {unable} is (it needs Linux's futex)",
            "choose `backend: gloo`, or `auto`",
        )
    without = _ranks(locations, "gpu")
    if backend == "nccl" and without:
        raise _refused(
            "`nccl` needs a whole GPU for each worker, and torch built with it; "
            f"worker {without} has not both",
            "set scaling.use_gpu: true, or choose `backend: auto`",
        )
    return BackendChoice(backend, "the job names it")


def _ranks(locations: Sequence[RankLocation], quality: str) -> str:
    """Give the ranks that lack a quality, for a sentence."""
    return ", ".join(
        str(rank) for rank, location in enumerate(locations) if not getattr(location, quality)
    )


def _refused(text: str, hint: str) -> SpecError:
    return SpecError(Problem(("strategy", "backend"), text, hint))
