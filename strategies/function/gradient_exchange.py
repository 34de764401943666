"""What a strategy does with the models and optimizers of a train function; one for each."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn
from torch.optim.optimizer import Optimizer


class Exchange(ABC):
    """How the models of a session are trained over all ranks."""

    together = True
    """Whether all ranks make the same steps."""

    @property
    @abstractmethod
    def models(self) -> list[nn.Module]:
        """Those that are trained, in the order of `prepare`."""

    @abstractmethod
    def add(self, model: nn.Module, *, alone: bool) -> None:
        """
        Train a model; it is on its device.

        Args:
            model: has parameters to train.
            alone: whether no other one comes with it.
        """

    def take(self, optimizer: Optimizer) -> None:
        """Be told of an optimizer that was prepared; its updates are those of each rank."""
        return

    def check(self, optimizer: Optimizer) -> None:
        """
        Look at an optimizer of prepared models that is about to step for the first time.

        Raises:
            SpecError: its updates would be lost.
        """
        return

    def before_step(self, optimizer: Optimizer) -> None:
        """
        Be told that an optimizer is about to step.

        Raises:
            NonFiniteError: it would apply gradients that are not finite.
        """
        return

    @abstractmethod
    def enable(self, on: bool) -> None:
        """See `no_sync`."""

    def leave(self) -> None:
        """Be told that this rank's function has returned."""
        return

    @abstractmethod
    def settle(self) -> None:
        """
        Have the models be what was trained; every rank has left.

        Raises:
            ValueError: ranks have trained other models.
        """

    def figures(self) -> dict[str, float]:
        """Give figures for the next report."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Let go of the models."""
