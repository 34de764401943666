"""
Placement of ranks: the grid of workers under `hybrid`, and the backend of a collective group.

The grid has replicas of the model, stages of a replica, and slices of a stage. Ranks of one replica
are consecutive, so they are placed together:

    pipeline 2, tensor 2, data 2          rank = (replica * stages + stage) * slices + slice

                 stage 0    stage 1
    replica 0     0  1       2  3         a row is a worker group: it holds one copy of the model
    replica 1     4  5       6  7         a column: ranks 0 and 4 are peers, they hold the same part

The backend of a group depends on the nodes of its ranks, without I/O and clocks:

    all on one node            several nodes              one rank per node
    +------------+             +-------+   +-------+      +---+  +---+  +---+
    | 0  1  2  3 |             | 0   1 |---| 2   3 |      | 0 |--| 1 |--| 2 |
    +------------+             +-------+   +-------+      +---+  +---+  +---+
      shm                        hierarchical               gloo

Every rank chooses from the same table, so all ranks choose the same backend.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distplat.platform.errors import Problem, SpecError


@dataclass(frozen=True)
class Position:
    """Coordinates of a rank in the grid."""

    replica: int
    stage: int
    slice: int


@dataclass(frozen=True)
class Grid:
    """Sizes of the grid, each >= 1."""

    stages: int
    slices: int
    """Number of ranks that share one stage's layers (tensor parallel)."""
    replicas: int

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.replicas * self.group_size

    @property
    def group_size(self) -> int:
        """Number of ranks of one replica."""
        return self.stages * self.slices

    def position(self, rank: int) -> Position:
        """Return a rank's coordinates."""
        rest, part = divmod(rank, self.slices)
        replica, stage = divmod(rest, self.stages)
        return Position(replica, stage, part)

    def rank(self, at: Position) -> int:
        """Return the rank at the given coordinates."""
        return (at.replica * self.stages + at.stage) * self.slices + at.slice

    def group(self, replica: int) -> tuple[int, ...]:
        """Return the ranks that together hold one copy of the model."""
        first = replica * self.group_size
        return tuple(range(first, first + self.group_size))

    def dp_ranks(self, stage: int, part: int) -> tuple[int, ...]:
        """Return the ranks that hold the same part of the model, one per replica."""
        return tuple(self.rank(Position(r, stage, part)) for r in range(self.replicas))

    def slices_of(self, replica: int, stage: int) -> tuple[int, ...]:
        """Return the ranks that share the layers of one stage."""
        return tuple(self.rank(Position(replica, stage, t)) for t in range(self.slices))

    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Return the peers of every part of the model, those of stage 0 first."""
        positions = [(s, t) for s in range(self.stages) for t in range(self.slices)]
        return tuple(self.dp_ranks(stage, part) for stage, part in positions)


@dataclass(frozen=True)
class RankLocation:
    """Placement and capabilities of a rank, as sent to the other ranks."""

    node: str
    """Ray's id of the node."""
    gpu: bool = False
    """Whether its tensors are on a whole, exclusive GPU that NCCL supports."""
    shm: bool = True
    """Whether the shared-memory backend works on its node."""
    gpus: tuple[str, ...] = ()
    """Ids of the GPUs that Ray assigned to it."""


@dataclass(frozen=True)
class BackendChoice:
    """A backend, and the reason for it."""

    backend: str
    why: str


def by_node(locations: Sequence[RankLocation]) -> list[list[int]]:
    """Return the ranks of each node, ascending; nodes in the order of their first rank."""
    nodes: dict[str, list[int]] = {}
    for rank, location in enumerate(locations):
        nodes.setdefault(location.node, []).append(rank)
    return list(nodes.values())


def gpus_of_node(locations: Sequence[RankLocation], rank: int) -> list[str]:
    """
    Return the GPUs of all ranks on a rank's node: the first GPU of each rank, then the others.

    Args:
        locations: in rank order.
        rank: the rank.

    Returns:
        Ids; [] if ranks share a GPU, have none, or this rank is alone.
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
        locations: in rank order; at least one.
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
    Return the backend that a job names, if it can work.

    Raises:
        SpecError: it cannot; with the reason and alternatives.
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
    without_shm = _ranks_without(locations, "shm")
    needs_memory = backend == "shm" or (backend == "hierarchical" and len(nodes) < len(locations))
    if needs_memory and without_shm:
        raise _refused(
            f"shared memory does not work where worker {without_shm} is (it needs Linux's futex)",
            "choose `backend: gloo`, or `auto`",
        )
    without_gpu = _ranks_without(locations, "gpu")
    if backend == "nccl" and without_gpu:
        raise _refused(
            "`nccl` needs a whole GPU for each worker, and torch built with it; "
            f"worker {without_gpu} lacks one of them",
            "set scaling.use_gpu: true, or choose `backend: auto`",
        )
    return BackendChoice(backend, "the job names it")


def _ranks_without(locations: Sequence[RankLocation], capability: str) -> str:
    """Format the ranks that lack a capability."""
    return ", ".join(
        str(rank) for rank, location in enumerate(locations) if not getattr(location, capability)
    )


def _refused(text: str, hint: str) -> SpecError:
    return SpecError(Problem(("strategy", "backend"), text, hint))
