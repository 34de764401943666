"""The port between ranks; `strategies/worker_strategy.py` gives it out, and says what ports are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

SENDABLE = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)


@dataclass
class Traffic:
    """What one rank's part in a group has cost so far; every figure only grows."""

    sent_bytes: int = 0
    """Payload that went from this rank to others."""
    received_bytes: int = 0
    waiting_s: float = 0.0
    """For ranks that had not come."""
    working_s: float = 0.0
    """Copying, adding, sending: operations' time without the waiting where that can be told."""


class ReduceOp(StrEnum):
    """How a collective combines the ranks' values."""

    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"


class Handle(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """
        Return when the result is there.

        Raises:
            CollectiveError: it failed or ran out of time; names the missing ranks.
        """


class Collective(Protocol):
    """
    A group of ranks as one of them sees it. Every rank calls the same operations in the same order.

    Tensors are contiguous and of equal shape and dtype on all ranks; results are written in place
    and are the same bits on every rank. Every operation raises `CollectiveError`, also where ranks
    are found to be in different operations, or in one with different shapes.
    """

    @property
    def rank(self) -> int:
        """This rank's number in the group, from 0."""

    @property
    def world(self) -> int:
        """Ranks in the group."""

    @property
    def traffic(self) -> Traffic:
        """What this rank's operations have cost, sub-groups apart; updated as they end."""

    def share(self, like: Tensor) -> Tensor:
        """
        Give a vector of zeros of the shape, dtype and device of `like`, for this group's use.

        Where ranks share memory, an operation on it, or on the same part of it on every rank,
        copies nothing. Every rank calls this. It is the group's: when the group is closed, take
        what is needed out of it and let it go.
        """

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """Replace `tensor` by its combination over all ranks."""

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        """Begin an all-reduce and go on; `tensor` is not to be touched until the handle is done."""

    @property
    def start_waits(self) -> bool:
        """
        Whether the next operation's start may wait until the other ranks have started theirs.

        Ranks may be told different things at a moment: it depends on what they have started so far.
        """

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        """
        Combine `inputs[r]` over all ranks into `output` of rank r; one input per rank.

        Inputs may be of uneven sizes, the r-th the same on all ranks; `output` may be this rank's
        own input.
        """

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """
        Copy `tensor` of rank r into `outputs[r]` of every rank.

        The ranks' tensors may be of uneven sizes; `tensor` may be this rank's own output.
        """

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Replace `tensor` by that of rank `source`."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Hand `tensor` to rank `to`, which calls `recv`."""

    def start_send(self, tensor: Tensor, to: int) -> Handle:
        """
        Begin to hand `tensor` over; it is not to be touched until the handle is done.

        It may wait for messages before to be taken, never for this one; and `wait` of the handle
        may return before the message is taken.
        """

    def recv(self, tensor: Tensor, source: int) -> None:
        """Fill `tensor` with what rank `source` sends."""

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def subgroup(self, name: str, ranks: Sequence[int]) -> Collective:
        """
        Make a group of some of these ranks, in that order; each of them calls this.

        Args:
            name: one that no other group within this one has, members apart or not.
            ranks: numbers in this group.
        """


def broadcast_value(value: Any, source: int, group: Collective, device: torch.device) -> Any:
    """
    Give every rank the source's value, as JSON knows it: tuples become lists.

    Args:
        value: looked at on rank `source` only.
        source: a rank.
        group: all ranks; each calls this.
        device: of the tensors that carry it; the group's backend must take it.

    Raises:
        CollectiveError: a rank is missing.
    """
    data = json.dumps(value).encode() if group.rank == source else b""
    length = torch.tensor([len(data)], device=device)
    group.broadcast(length, source)
    text = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if group.rank == source:
        text.copy_(_tensor(data))
    group.broadcast(text, source)
    return json.loads(bytes(text.cpu().numpy()))


def gather_tensors(tensor: Tensor, group: Collective) -> list[Tensor]:
    """
    Give every rank the tensors of all, in rank order; all are of one shape and type.

    Raises:
        CollectiveError: a rank is missing.
    """
    every = [torch.zeros_like(tensor) for _ in range(group.world)]
    group.all_gather(every, tensor)
    return every


def gather_bytes(data: bytes, group: Collective, device: torch.device) -> list[bytes]:
    """
    Give every rank the bytes of all, in rank order.

    Raises:
        CollectiveError: a rank is missing.
    """
    lengths = [length for (length,) in gather_numbers([len(data)], group, device)]
    # Of one size, that of the longest: not every backend gathers uneven tensors quickly.
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(data)].copy_(_tensor(data))
    pairs = zip(gather_tensors(padded, group), lengths, strict=True)
    return [bytes(text[:length].cpu().numpy()) for text, length in pairs]


def gather_values(value: Any, group: Collective, device: torch.device) -> list[Any]:
    """
    Give every rank what all ranks have, in rank order, as JSON knows it: tuples become lists.

    Raises:
        CollectiveError: a rank is missing.
    """
    texts = gather_bytes(json.dumps(value).encode(), group, device)
    return [json.loads(text) for text in texts]


def gather_numbers(
    numbers: Sequence[int], group: Collective, device: torch.device
) -> list[list[int]]:
    """
    Give every rank the whole numbers of all, in rank order; all ranks have as many.

    Raises:
        CollectiveError: a rank is missing.
    """
    return [row.tolist() for row in gather_tensors(torch.tensor(numbers, device=device), group)]


def mismatched_ranks(facts: Any, group: Collective, device: torch.device) -> list[int]:
    """
    Give the ranks that have other facts than rank 0, as `gather_values` takes them.

    Raises:
        CollectiveError: a rank is missing.
    """
    first, *others = gather_values(facts, group, device) if group.world > 1 else [facts]
    return [rank for rank, numbers in enumerate(others, 1) if numbers != first]


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0)
