"""What a rank says of the operation it is in, so that all can see whether they are in the same."""

import struct
from typing import NamedTuple

import torch

from distplat.platform.errors import MismatchError
from distplat.strategies.algorithms.dtypes import SENDABLE
from distplat.strategies.collective import ReduceOp

OPERATIONS = (
    "barrier",
    "all_reduce",
    "reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "share",
    "message",
)
REDUCTIONS = tuple(ReduceOp)
_OPERATION = {name: code for code, name in enumerate(OPERATIONS)}
_REDUCTION = {op: code for code, op in enumerate(REDUCTIONS)}
_DTYPE = {dtype: code for code, dtype in enumerate(SENDABLE)}
_LAYOUT = struct.Struct("<8q")
SIZE = _LAYOUT.size
STAGED = -1
"""`place` of a tensor that lies in no shared vector."""


class Header(NamedTuple):
    """One operation; ranks that are in the same have equal ones."""

    number: int
    """Operations of the group before this one."""
    operation: str
    dtype: torch.dtype = torch.uint8
    op: ReduceOp = ReduceOp.SUM
    elements: int = 0
    root: int = 0
    place: int = STAGED
    """Where in the shared vectors the tensor lies: vector number and byte, or `STAGED`."""
    digest: int = 0
    """Of the sizes and places of the ranks' parts, where there are several."""

    def pack(self) -> bytes:
        """Give the `SIZE` bytes that lie in shared memory."""
        return _LAYOUT.pack(
            self.number,
            _OPERATION[self.operation],
            _DTYPE[self.dtype],
            _REDUCTION[self.op],
            self.elements,
            self.root,
            self.place,
            self.digest,
        )

    @classmethod
    def unpack(cls, data: bytes) -> "Header":
        """Read what another rank has packed."""
        number, operation, dtype, op, *rest = _LAYOUT.unpack(data)
        return cls(number, OPERATIONS[operation], SENDABLE[dtype], REDUCTIONS[op], *rest)

    def __str__(self) -> str:
        """`all_reduce #3 (sum of 1000 x float32)`."""
        words = []
        if self.operation in ("all_reduce", "reduce", "reduce_scatter"):
            words.append(f"{self.op} of")
        if self.operation != "barrier":
            words.append(f"{self.elements} x {str(self.dtype).removeprefix('torch.')}")
        if self.operation in ("reduce", "broadcast"):
            words.append(f"root {self.root}")
        if self.place != STAGED:
            vector, byte = divmod(self.place, _VECTOR)
            words.append(f"in shared vector {vector} from byte {byte}")
        return f"{self.operation} #{self.number}" + (f" ({' '.join(words)})" if words else "")


_VECTOR = 1 << 48


def place_of(vector: int, byte: int) -> int:
    """Give the `place` of what begins at a byte of a shared vector."""
    return vector * _VECTOR + byte


def place_vector(place: int) -> int:
    """Give the number of the shared vector of a place."""
    return place // _VECTOR


def supported(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype can be exchanged."""
    return dtype in _DTYPE


def mismatch(group: str, rank: int, headers: dict[int, Header]) -> MismatchError:
    """Say who is in what; `missing` are the ranks whose operation is not that of rank `rank`."""
    mine = headers[rank]
    alike: dict[Header, list[int]] = {}
    for place, header in sorted(headers.items()):
        alike.setdefault(header, []).append(place)
    texts = [
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} in {header}"
        for header, ranks in alike.items()
    ]
    if len({str(header) for header in alike}) < len(alike):
        texts.append("the sizes of the ranks' parts differ")
    others = tuple(place for place, header in sorted(headers.items()) if header != mine)
    return MismatchError(group, mine.operation, mine.number, others, "; ".join(texts))
