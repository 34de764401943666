"""
What a rank says of the operation it has called, so that ranks in different ones are found.

gloo would kill the process of a rank that gets more bytes than it asked for, and in shared memory a
rank would read values that are not there. So ranks exchange a few whole numbers first, and whoever
differs from most is named.
"""

import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distplat.platform.errors import MismatchError, ranks_text
from distplat.strategies.collective import SENDABLE, ReduceOp

_OPERATIONS = (
    "all_reduce",
    "reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "barrier",
    "share",
    "send",
)
_REDUCTIONS = tuple(ReduceOp)
_OPERATION = {name: code for code, name in enumerate(_OPERATIONS)}
_REDUCTION = {op: code for code, op in enumerate(_REDUCTIONS)}
_DTYPE = {dtype: code for code, dtype in enumerate(SENDABLE)}
_LAYOUT = struct.Struct("<8q")
_VECTOR = 1 << 48
LENGTH = 8
"""Numbers in a header."""
SIZE = _LAYOUT.size
"""Bytes of a packed header."""
STAGED = -1
"""`offset` of a tensor that lies in no shared vector."""


class Header(NamedTuple):
    """One rank's operation; ranks that called the same one have equal headers."""

    number: int
    """Position in the sequence of the group's operations."""
    operation: int
    dtype: int
    """-1: there are no values."""
    op: int
    """How values are combined; -1: they are not."""
    root: int
    """The rank that gives or takes all; -1: none does."""
    elements: int
    digest: int
    """CRC of the single tensors' sizes, and of their offsets; 0: there is one tensor at most."""
    offset: int
    """Where in the shared vectors the tensor lies, see `offset_of`; or `STAGED`."""

    @property
    def name(self) -> str:
        """Name of the operation."""
        return _OPERATIONS[self.operation]

    @property
    def what(self) -> str:
        """`7 float32`."""
        dtype = str(SENDABLE[self.dtype]).removeprefix("torch.") if self.dtype >= 0 else "values"
        return f"{self.elements} {dtype}"

    def pack(self, number: int) -> bytes:
        """Give the `SIZE` bytes that lie in shared memory, with another number than its own."""
        return _LAYOUT.pack(number, *self[1:])

    @classmethod
    def unpack(cls, data: bytes) -> "Header":
        """Read what another rank has packed."""
        return cls(*_LAYOUT.unpack(data))

    def __str__(self) -> str:
        """`broadcast of 7 float32 from rank 0`."""
        text = self.name if self.name == "barrier" else f"{self.name} of {self.what}"
        if self.op >= 0:
            text += f" by {_REDUCTIONS[self.op].name}"
        if self.root >= 0:
            text += f" {'to' if self.op >= 0 else 'from'} rank {self.root}"
        if self.offset != STAGED:
            vector, byte = divmod(self.offset, _VECTOR)
            text += f" in shared vector {vector} from byte {byte}"
        return text


def header(
    operation: str,
    tensors: Sequence[Tensor] = (),
    op: ReduceOp | None = None,
    *,
    root: int = -1,
    number: int = 0,
    offset: int = STAGED,
    offsets: Sequence[int] = (),
) -> Header:
    """
    Describe an operation.

    Args:
        operation: its name.
        tensors: of one dtype; several where ranks have a part each.
        op: how values are combined.
        root: the rank that gives or takes all.
        number: position in the sequence of the group's operations.
        offset: of one tensor in a shared vector.
        offsets: of several tensors in a shared vector, empty tensors left out.
    """
    reduction = -1 if op is None else _REDUCTION[op]
    dtype, elements, digest = -1, 0, 0
    if tensors:
        dtype, elements = _DTYPE.get(tensors[0].dtype, -1), tensors[0].numel()
    if len(tensors) > 1:
        counts = [tensor.numel() for tensor in tensors]
        elements = sum(counts)
        digest = zlib.crc32(repr((counts, offsets) if offsets else counts).encode()) + 1
    if offsets:
        offset = offsets[0]
    return Header(number, _OPERATION[operation], dtype, reduction, root, elements, digest, offset)


def supported(dtype: torch.dtype) -> bool:
    """Whether headers have a code for this dtype."""
    return dtype in _DTYPE


def offset_of(vector: int, byte: int) -> int:
    """Give the `offset` of what begins at a byte of a shared vector."""
    return vector * _VECTOR + byte


def vector_of(offset: int) -> int:
    """Give the number of the shared vector that an offset is in."""
    return offset // _VECTOR


def check_headers(group: str, rank: int, headers: Sequence[Header]) -> None:
    """
    Check that all ranks have called the same operation.

    Args:
        group: its name.
        rank: who asks.
        headers: in rank order.

    Raises:
        MismatchError: names the ranks that differ from most; in doubt, from the first rank.
    """
    counts = Counter(headers)  # keeps the order in which they come: the first wins a tie
    if len(counts) <= 1:
        return
    majority = counts.most_common(1)[0][0]
    differing = tuple(peer for peer, head in enumerate(headers) if head != majority)
    show_numbers = len({head.number for head in headers}) > 1
    parts = []
    for kind in counts:
        who = ranks_text([peer for peer, head in enumerate(headers) if head == kind])
        parts.append(f"{who} in {kind}" + (f" (#{kind.number})" if show_numbers else ""))
    if len({h.operation for h in counts}) == 1 and len({h.digest for h in counts}) > 1:
        parts.append("the sizes of the ranks' parts differ, or their offsets")
    own = headers[rank]
    raise MismatchError(group, own.name, own.number, differing, "; ".join(parts))


def check_message(group: str, source: int, rank: int, sent: Header, expected: Header) -> None:
    """
    Check that a message that came is the one that is expected.

    Raises:
        MismatchError: it is of another size or dtype; names the sender.
    """
    if sent != expected:
        text = f"rank {source} sends {sent.what}; rank {rank} expects {expected.what}"
        raise MismatchError(group, "recv", expected.number, (source,), text)
