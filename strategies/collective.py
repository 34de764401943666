"""The port `Collective` between ranks. `strategies/worker_strategy.py` describes the ports."""

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
    """Cost counters of one rank's operations in a group; all values only increase."""

    sent_bytes: int = 0
    """Payload sent from this rank to others."""
    received_bytes: int = 0
    waiting_s: float = 0.0
    """Time spent waiting for other ranks to start their operations."""
    working_s: float = 0.0
    """
    Time spent copying, adding and sending, without waiting if that can be measured separately.
    """


class ReduceOp(StrEnum):
    """How a collective reduces the ranks' values."""

    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"


class Handle(Protocol):
    """An asynchronous operation."""

    def wait(self) -> None:
        """
        Wait until the operation is complete.

        Raises:
            CollectiveError: The operation failed or timed out; the error names the missing ranks.
        """


class Collective(Protocol):
    """
    A group of ranks, as seen by one of them. Every rank calls the same operations in the same
    order.

    Tensors are contiguous and have the same shape and dtype on all ranks. Results are written in
    place and are bitwise equal on every rank. Every operation may raise `CollectiveError`, also if
    ranks call different operations, or the same operation with different shapes.
    """

    @property
    def rank(self) -> int:
        """This rank's number in the group, from 0."""

    @property
    def world(self) -> int:
        """Number of ranks in the group."""

    @property
    def traffic(self) -> Traffic:
        """Cost of this rank's operations, sub-groups excluded; updated when operations end."""

    def share(self, like: Tensor) -> Tensor:
        """
        Return a zero vector with the shape, dtype and device of `like`, for use in this group.

        If ranks share memory, operations on this vector, or on the same slice of it on every rank,
        copy nothing. Every rank calls this. The group owns the vector: after the group is closed,
        copy its values and drop all references to it.
        """

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """Reduce `tensor` over all ranks, in place."""

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        """Start an asynchronous all-reduce; do not access `tensor` before the handle is done."""

    @property
    def start_waits(self) -> bool:
        """
        Whether starting the next operation may block until the other ranks have started theirs.

        Ranks may see different values at the same time: the value depends on the operations started
        so far.
        """

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        """
        Reduce `inputs[r]` over all ranks into `output` of rank r; one input per rank.

        Inputs may have different sizes, but input r has the same size on all ranks. `output` may be
        this rank's own input.
        """

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """
        Copy `tensor` of rank r into `outputs[r]` on every rank.

        The ranks' tensors may have different sizes. `tensor` may be this rank's own output.
        """

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Replace `tensor` by the tensor of rank `source`."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Send `tensor` to rank `to`, which calls `recv`."""

    def start_send(self, tensor: Tensor, to: int) -> Handle:
        """
        Start an asynchronous send; `tensor` must not be accessed before the handle is done.

        The call may block until earlier messages are received, but not until this one is. `wait` of
        the handle may return before the message is received.
        """

    def recv(self, tensor: Tensor, source: int) -> None:
        """Receive a message from rank `source` into `tensor`."""

    def barrier(self) -> None:
        """Wait until every rank has called this."""

    def subgroup(self, name: str, ranks: Sequence[int]) -> Collective:
        """
        Create a group of some of these ranks, in the given order; each member calls this.

        Args:
            name: unique among the sub-groups of this group, whether or not their members overlap.
            ranks: numbers in this group.
        """


def broadcast_value(value: Any, source: int, group: Collective, device: torch.device) -> Any:
    """
    Return the source rank's value on every rank, converted by JSON: tuples become lists.

    Args:
        value: used only on rank `source`.
        source: a rank.
        group: all ranks; each calls this.
        device: device of the tensors that are sent; the group's backend must support it.

    Raises:
        CollectiveError: A rank is missing.
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
    Return the tensors of all ranks, in rank order; all have the same shape and dtype.

    Raises:
        CollectiveError: A rank is missing.
    """
    outputs = [torch.zeros_like(tensor) for _ in range(group.world)]
    group.all_gather(outputs, tensor)
    return outputs


def gather_bytes(data: bytes, group: Collective, device: torch.device) -> list[bytes]:
    """
    Return the bytes of all ranks, in rank order.

    Raises:
        CollectiveError: A rank is missing.
    """
    lengths = [length for (length,) in gather_numbers([len(data)], group, device)]
    # Padded to the longest: not every backend gathers tensors of different sizes quickly.
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(data)].copy_(_tensor(data))
    pairs = zip(gather_tensors(padded, group), lengths, strict=True)
    return [bytes(text[:length].cpu().numpy()) for text, length in pairs]


def gather_values(value: Any, group: Collective, device: torch.device) -> list[Any]:
    """
    Return the values of all ranks, in rank order, converted by JSON: tuples become lists.

    Raises:
        CollectiveError: A rank is missing.
    """
    texts = gather_bytes(json.dumps(value).encode(), group, device)
    return [json.loads(text) for text in texts]


def gather_numbers(
    numbers: Sequence[int], group: Collective, device: torch.device
) -> list[list[int]]:
    """
    Return the integers of all ranks, in rank order; all ranks pass the same number of integers.

    Raises:
        CollectiveError: A rank is missing.
    """
    return [row.tolist() for row in gather_tensors(torch.tensor(numbers, device=device), group)]


def mismatched_ranks(value: Any, group: Collective, device: torch.device) -> list[int]:
    """
    Return the ranks whose value differs from rank 0's, compared as JSON.

    Args:
        value: this rank's value, see `gather_values`.
        group: all ranks; each calls this.
        device: see `broadcast_value`.

    Raises:
        CollectiveError: A rank is missing.
    """
    first, *others = gather_values(value, group, device) if group.world > 1 else [value]
    return [rank for rank, other in enumerate(others, 1) if other != first]


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0)
