"""
Headers describe the operation that a rank has called; comparing them detects mismatched calls.

gloo kills the process of a rank that receives more bytes than expected, and in shared memory a rank
would read values that were never written. So ranks first exchange a few integers; an error names
the ranks that differ from the majority.
"""

import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

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
"""Integers in a header."""
SIZE = _LAYOUT.size
"""Bytes of a packed header."""
STAGED = -1
"""`offset` of a tensor outside of the shared vectors."""


class Header(NamedTuple):
    """One rank's operation; ranks that called the same one have equal headers."""

    number: int
    """Position in the sequence of the group's operations."""
    operation: int
    dtype: int
    """-1: no tensor."""
    op: int
    """Code of the `ReduceOp`; -1: no reduction."""
    root: int
    """Source or destination rank; -1: none."""
    elements: int
    digest: int
    """CRC of the tensors' sizes and offsets; 0: at most one tensor."""
    offset: int
    """Position of the tensor in the shared vectors, see `offset_of`; or `STAGED`."""

    @property
    def name(self) -> str:
        """Name of the operation."""
        return _OPERATIONS[self.operation]

    @property
    def contents(self) -> str:
        """Size and dtype, as in `7 float32`."""
        dtype = str(SENDABLE[self.dtype]).removeprefix("torch.") if self.dtype >= 0 else "values"
        return f"{self.elements} {dtype}"

    def pack(self, number: int) -> bytes:
        """Return the header as `SIZE` bytes for shared memory, with this number."""
        return _LAYOUT.pack(number, *self[1:])

    @classmethod
    def unpack(cls, data: bytes) -> "Header":
        """Read the bytes of `pack`."""
        return cls(*_LAYOUT.unpack(data))

    @override
    def __str__(self) -> str:
        """Describe the operation, as in `broadcast of 7 float32 from rank 0`."""
        text = self.name if self.name == "barrier" else f"{self.name} of {self.contents}"
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
    Build the header of an operation.

    Args:
        operation: name of the operation.
        tensors: of one dtype; several if each rank has a part.
        op: the reduction.
        root: source or destination rank.
        number: position in the sequence of the group's operations.
        offset: of one tensor in a shared vector.
        offsets: of several tensors in a shared vector, without empty tensors.
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
    """Return whether headers have a code for this dtype."""
    return dtype in _DTYPE


def offset_of(vector: int, byte: int) -> int:
    """Return the `offset` of a tensor that starts at a byte of a shared vector."""
    return vector * _VECTOR + byte


def vector_of(offset: int) -> int:
    """Return the number of the shared vector that contains an offset."""
    return offset // _VECTOR


def check_headers(group: str, rank: int, headers: Sequence[Header]) -> None:
    """
    Check that all ranks have called the same operation.

    Args:
        group: name of the group.
        rank: this rank.
        headers: in rank order.

    Raises:
        MismatchError: names the ranks that differ from the majority; in a tie, from the first rank.
    """
    counts = Counter(headers)  # keeps insertion order: in a tie, the first rank's header wins
    if len(counts) <= 1:
        return
    majority = counts.most_common(1)[0][0]
    outliers = tuple(peer for peer, head in enumerate(headers) if head != majority)
    show_numbers = len({head.number for head in headers}) > 1
    parts = []
    for distinct in counts:
        ranks = ranks_text([peer for peer, head in enumerate(headers) if head == distinct])
        parts.append(f"{ranks} in {distinct}" + (f" (#{distinct.number})" if show_numbers else ""))
    if len({h.operation for h in counts}) == 1 and len({h.digest for h in counts}) > 1:
        parts.append("the sizes of the ranks' parts differ, or their offsets")
    own = headers[rank]
    raise MismatchError(group, own.name, own.number, outliers, "; ".join(parts))


def check_message(group: str, source: int, rank: int, sent: Header, expected: Header) -> None:
    """
    Check that a received message is the expected one.

    Raises:
        MismatchError: the message has another size or dtype; names the sender.
    """
    if sent != expected:
        text = f"rank {source} sends {sent.contents}; rank {rank} expects {expected.contents}"
        raise MismatchError(group, "recv", expected.number, (source,), text)
