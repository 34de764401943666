"""
How rows are updated: torch's optimizers as they treat sparse gradients, and row-wise Adagrad.

Only the rows of a step and their states are touched: what torch does for an
`nn.Embedding(sparse=True)` under SGD, Adagrad and SparseAdam, up to rounding. SparseAdam alone
counts steps, and as torch does it counts the table's: those in which it had a gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distplat.platform.embeddings import (
    AnyRowOptimizer,
    RowAdagrad,
    RowSGD,
    RowSparseAdam,
    RowWiseAdagrad,
)

Block = NDArray[np.float32]


class Rule(ABC):
    """An update rule. Blocks are of shape [n, width]; those of a state may have width 1."""

    names: tuple[str, ...] = ()
    """Of the states, as torch calls them."""

    def states(self, width: int) -> list[tuple[int, float]]:
        """Give width and first value of each state that a row of this width needs."""
        return []

    @abstractmethod
    def update(
        self, rows: Block, states: Sequence[Block], gradient: Block, rate: float, step: int
    ) -> None:
        """
        Update rows and their states in place; the gradient is not ours and stays as it is.

        Args:
            rows: shape [n, width].
            states: one for each of `states`.
            gradient: shape [n, width].
            rate: learning rate of the step.
            step: updates that the table has behind it, not steps of the run.
        """


class _SGD(Rule):
    def update(
        self, rows: Block, states: Sequence[Block], gradient: Block, rate: float, step: int
    ) -> None:
        rows -= np.float32(rate) * gradient


class _Adagrad(Rule):
    names = ("sum",)

    def __init__(self, options: RowAdagrad) -> None:
        self._first, self._eps = options.initial_accumulator_value, np.float32(options.eps)

    def states(self, width: int) -> list[tuple[int, float]]:
        return [(width, self._first)]

    def update(
        self, rows: Block, states: Sequence[Block], gradient: Block, rate: float, step: int
    ) -> None:
        (squares,) = states
        squares += gradient * gradient
        rows -= np.float32(rate) * gradient / (np.sqrt(squares) + self._eps)


class _RowWiseAdagrad(Rule):
    names = ("sum",)

    def __init__(self, options: RowWiseAdagrad) -> None:
        self._first, self._eps = options.initial_accumulator_value, np.float32(options.eps)

    def states(self, width: int) -> list[tuple[int, float]]:
        return [(1, self._first)]

    def update(
        self, rows: Block, states: Sequence[Block], gradient: Block, rate: float, step: int
    ) -> None:
        (squares,) = states
        squares += np.square(gradient).mean(axis=1, keepdims=True)
        rows -= np.float32(rate) * gradient / (np.sqrt(squares) + self._eps)


class _SparseAdam(Rule):
    names = ("exp_avg", "exp_avg_sq")

    def __init__(self, options: RowSparseAdam) -> None:
        self._betas, self._eps = options.betas, np.float32(options.eps)

    def states(self, width: int) -> list[tuple[int, float]]:
        return [(width, 0.0), (width, 0.0)]

    def update(
        self, rows: Block, states: Sequence[Block], gradient: Block, rate: float, step: int
    ) -> None:
        mean, square = states
        first, second = self._betas
        mean += np.float32(1 - first) * (gradient - mean)
        square += np.float32(1 - second) * (gradient * gradient - square)
        corrected = rate * (1 - second ** (step + 1)) ** 0.5 / (1 - first ** (step + 1))
        rows -= np.float32(corrected) * mean / (np.sqrt(square) + self._eps)


def make_rule(options: AnyRowOptimizer) -> Rule:
    """Make the rule that a job names."""
    match options:
        case RowSGD():
            return _SGD()
        case RowAdagrad():
            return _Adagrad(options)
        case RowWiseAdagrad():
            return _RowWiseAdagrad(options)
        case RowSparseAdam():
            return _SparseAdam(options)
