"""What the executor of a pipeline asks of those around it, and what it tells them."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Span(NamedTuple):
    """What was done, and when; seconds of the process's clock."""

    kind: str
    """`F`, `B`, `W`, `send`, `recv`; `pack`: weights are packed for the step."""
    chunk: int
    micro_batch: int
    start: float
    end: float


class Source(Protocol):
    """Gives the micro-batches of a step, and takes what comes of them."""

    sizes: Sequence[int]
    """Samples of each micro-batch."""

    def inputs(self, micro_batch: int) -> Tensor:
        """Give what enters the first place; asked on its rank."""

    def peek(self, micro_batch: int) -> Tensor:
        """Give the same, which will be asked for once more."""

    def loss(self, micro_batch: int, outputs: Tensor) -> Tensor:
        """Give what is to be differentiated; asked on the last place's rank."""

    def seed(self, micro_batch: int) -> int:
        """Seed the micro-batch's dropout."""


class Tail(Protocol):
    """Told when gradients become final."""

    @property
    def listens(self) -> bool:
        """Whether parameters' hooks are to fire in the last backward."""

    def last_backward(self) -> None:
        """What the backward that begins now makes is final."""

    def pause(self) -> None:
        """It is over."""
