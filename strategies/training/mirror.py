"""
A shard kept twice: what a primary tells its backup, and how a backup is filled.

    primary    sum, clip ── Update, the gradient ──▶ backup     the same update of the same bits
               update                                update
               wait for its word ◀──────────────────
               answer the workers

What travels is the gradient as the optimizer takes it, not the state that comes of it: one vector,
whatever the optimizer remembers and however many workers there are. Same vector, same state, same
arithmetic: the two stay equal to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from distplat.platform.ledger import PushId
from distplat.strategies.model.optim import FlatOptimizer


@dataclass(frozen=True)
class Update:
    """One update of a shard, without its gradient."""

    version: int
    """Updates that the shard has behind it before this one."""
    push: PushId | None = None
    """Asynchronous: whose gradient it is; None: the sum of all ranks'."""
    pulls: tuple[int, ...] = ()
    """Asynchronous: ranks that took the values of this version, in order."""
    pulled: int = 0
    """Asynchronous: the version at which the gradient was computed."""
    present: bytes | None = None
    """A byte for each parameter of the model, 1: it has a gradient; None: all have."""


class Mirror(Protocol):
    """The way from a primary to its backup. Both calls are made with the shard's lock held."""

    @property
    def settled(self) -> bool:
        """Whether it is known if there is a backup: nothing is served before."""

    def send(self, update: Update, gradient: Tensor) -> None:
        """Have the backup make an update; returns before it is made."""

    def confirm(self) -> None:
        """
        Return when the backup has made what was sent, or is none any more.

        Raises:
            DistplatError: this server may not acknowledge the update, nor any other.
        """


class Mirrored(Protocol):
    """A shard that can be kept twice."""

    vectors: ClassVar[Sequence[str]]
    """Attributes that are tensors, lists of tensors, or None."""
    books: ClassVar[Sequence[str]]
    """Attributes that are plain values."""
    params: Tensor
    optimizer: FlatOptimizer

    def follow(self, update: Update, gradient: Tensor) -> None:
        """As a backup, make the update that the primary makes."""


@dataclass(frozen=True)
class Twin:
    """A copy of all that a shard is made of."""

    vectors: list[list[Tensor]]
    books: dict[str, Any]
    optimizer: dict[str, Tensor]


def twin_of(shard: Mirrored) -> Twin:
    """Copy a shard; its lock is held."""
    vectors = [[one.clone() for one in _tensors(shard, name)] for name in shard.vectors]
    kept = {name: value.clone() for name, value in shard.optimizer.state().items()}
    return Twin(vectors, {name: deepcopy(getattr(shard, name)) for name in shard.books}, kept)


def become(shard: Mirrored, twin: Twin) -> None:
    """Make an equal shard of what was copied of another; the twin is used up."""
    for name, copies in zip(shard.vectors, twin.vectors, strict=True):
        held = getattr(shard, name)
        if isinstance(held, list):  # ranks may have joined since the shard was made
            held += [torch.empty_like(copy) for copy in copies[len(held) :]]
        for mine, copy in zip(_tensors(shard, name), copies, strict=True):
            mine.copy_(copy)
    for name, value in twin.books.items():
        setattr(shard, name, value)
    shard.optimizer.load(twin.optimizer)


def _tensors(shard: Mirrored, name: str) -> list[Tensor]:
    value = getattr(shard, name)
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
