"""A job's embedding tables: their servers, and how rows are updated there."""

from typing import Annotated, Literal

from pydantic import Field

from distplat.platform.fields import Flag, NonNegative, Pair, Positive, Resources, Spec


class RowOptimizer(Spec):
    """What all of them have: rows that a step does not use stay as they are, state included."""

    name: str
    """A class of `torch.optim` as it treats sparse gradients, or `RowWiseAdagrad`."""
    lr: Positive
    """Learning rate before the factor of `lr_schedule`."""


class RowSGD(RowOptimizer):
    """Stochastic gradient descent; no state."""

    name: Literal["SGD"]


class RowAdagrad(RowOptimizer):
    """Adagrad, Duchi et al. 2011; as much state as the rows."""

    name: Literal["Adagrad"]
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10


class RowWiseAdagrad(RowOptimizer):
    """Adagrad with one number of state per row: the mean over the row (as in FBGEMM)."""

    name: Literal["RowWiseAdagrad"]
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10


class RowSparseAdam(RowOptimizer):
    """Adam on the rows of a step alone; twice as much state as the rows."""

    name: Literal["SparseAdam"]
    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-8


AnyRowOptimizer = Annotated[
    RowSGD | RowAdagrad | RowWiseAdagrad | RowSparseAdam, Field(discriminator="name")
]


class Embeddings(Spec):
    """The servers of the embedding tables, for models that have some."""

    servers: int = Field(1, ge=1, le=256, strict=True)
    """Server nodes that share the rows of every table."""
    optimizer: AnyRowOptimizer
    """How rows are updated, on the servers."""
    replication: int = Field(1, ge=1, le=2, strict=True)
    """2: each server's rows have a backup, which takes over when their server is lost."""
    partition: Literal["hash", "range"] = "hash"
    """Who keeps a row: `hash` spreads busy ids, `range` cuts 0..num_embeddings evenly."""
    asynchronous: Flag = False
    """Apply each worker's gradients when they come; then runs do not repeat bit for bit."""
    resources_per_server: Resources = Field(default_factory=lambda: {"CPU": 0.0})
    """Ray resources of one server node; by default none, for it works while workers wait."""
