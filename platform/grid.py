"""
The grid of workers under `hybrid`: replicas of the model, stages of a replica, slices of a stage.

    pipeline 2, tensor 2, data 2          rank = (replica * stages + stage) * slices + slice

                 stage 0    stage 1
    replica 0     0  1       2  3         a row is a worker group: it holds one copy of the model
    replica 1     4  5       6  7         a column: ranks 0 and 4 are peers, they hold the same part

Ranks of one replica have consecutive numbers, so they are placed together.
"""

from dataclasses import dataclass


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
        """Give a rank's place in the grid."""
        rest, part = divmod(rank, self.slices)
        replica, stage = divmod(rest, self.stages)
        return Position(replica, stage, part)

    def rank(self, at: Position) -> int:
        """Give the rank at a place."""
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
        every = [(s, t) for s in range(self.stages) for t in range(self.slices)]
        return tuple(self.dp_ranks(stage, part) for stage, part in every)
