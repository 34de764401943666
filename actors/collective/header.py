"""
What a rank says of the operation it is in, so that ranks in different ones are found.

gloo would kill the process of a rank that gets more bytes than it asked for. So ranks that are to
be compared exchange a few whole numbers first, and whoever differs from most is named.
"""

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from ray.util.collective.types import ReduceOp

from distplat.strategies.algorithms.dtypes import SENDABLE

LENGTH = 7
"""Numbers in a header."""

_OPERATIONS = (
    "all_reduce",
    "reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "barrier",
    "send",
    "recv",
)


class Header(NamedTuple):
    """One rank's operation, in whole numbers."""

    number: int
    """Operations of the group that it has begun, this one too."""
    operation: int
    dtype: int
    op: int
    """How values are combined; -1: they are not."""
    root: int
    """The rank that gives or takes all; -1: none does."""
    elements: int
    sizes: int
    """A checksum of the single tensors' sizes, where an operation has several."""

    @property
    def name(self) -> str:
        """Name of the operation."""
        return _OPERATIONS[self.operation]

    @property
    def what(self) -> str:
        """`7 float32`."""
        dtype = str(SENDABLE[self.dtype]).removeprefix("torch.") if self.dtype >= 0 else "values"
        return f"{self.elements} {dtype}"

    def __str__(self) -> str:
        """`broadcast of 7 float32 from rank 0`."""
        text = self.name if self.name == "barrier" else f"{self.name} of {self.what}"
        if self.op >= 0:
            text += f" by {ReduceOp(self.op).name}"
        if self.root >= 0:
            text += f" {'to' if text.startswith('reduce') else 'from'} rank {self.root}"
        return text


def header(
    operation: str,
    tensors: Sequence[torch.Tensor] = (),
    op: ReduceOp | None = None,
    root: int = -1,
    number: int = 0,
) -> Header:
    """Describe an operation on these tensors; they have one dtype."""
    dtype = tensors[0].dtype if tensors else None
    counts = [tensor.numel() for tensor in tensors]
    return Header(
        number,
        _OPERATIONS.index(operation),
        SENDABLE.index(dtype) if dtype in SENDABLE else -1,
        -1 if op is None else op.value,
        root,
        sum(counts),
        zlib.crc32(repr(counts).encode()) if len(counts) > 1 else 0,
    )


def differences(headers: Sequence[Header]) -> tuple[tuple[int, ...], str]:
    """
    Compare what the ranks are in.

    Returns:
        Ranks that are not in what most are in (in doubt: in what the first rank is in), and a
        sentence that says who is in what; ((), "") if all are in the same.
    """
    counts = Counter(headers)  # keeps the order in which they come: the first wins a tie
    if len(counts) == 1:
        return (), ""
    most = counts.most_common(1)[0][0]
    differ = tuple(rank for rank, one in enumerate(headers) if one != most)
    parts = []
    for kind in counts:
        ranks = [str(rank) for rank, one in enumerate(headers) if one == kind]
        number = "" if len({one.number for one in headers}) == 1 else f" (#{kind.number})"
        parts.append(
            f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(ranks)} in {kind}{number}"
        )
    return differ, "; ".join(parts)
