"""
What lies where in a flat vector: which parameters, and where the type of the numbers changes.

    elements   0            48      64                         128
               | 0.weight   |0.bias | 1.weight                  | 2.weight (frozen) |
    segments   [ float32            ][ bfloat16                 ][ bfloat16          ]
                                                                ^ tail: parameters that are frozen

A vector whose parameters all have one type has that type. One of several types has the type
`uint8`, so that whoever only moves it need not know; whoever computes looks at its segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Segment:
    """A run of the vector whose numbers have one type."""

    start: int
    """First element of the vector."""
    stop: int
    dtype: str
    """torch's name, for example `float32`."""


@dataclass(frozen=True)
class Piece:
    """A parameter, or as much of it as lies in a run of the vector."""

    slot: int
    """Place of the parameter among all of the whole vector."""
    start: int
    """First element of the vector, or of the run."""
    stop: int
    group: int = 0
    """The parameter's, of the optimizer's groups, from 1; 0: it is in none."""
    shape: tuple[int, ...] | None = None
    """The parameter's; None: this is a part of one."""


@dataclass(frozen=True)
class Layout:
    """Contents of a vector, or of a run of one; positions count from its own beginning."""

    size: int
    """Elements, padding included."""
    segments: tuple[Segment, ...]
    pieces: tuple[Piece, ...]
    """By position, none of them empty."""
    parameters: int
    """Parameters of the whole vector: `Piece.slot` is below it."""
    tail: int
    """First element of parameters that were frozen when training began; `size`: there are none."""

    @property
    def starts(self) -> tuple[int, ...]:
        """First elements of all parameters."""
        return tuple(piece.start for piece in self.pieces)

    @property
    def tail_size(self) -> int:
        """Elements of parameters that were frozen when training began."""
        return self.size - self.tail

    def cut(self, start: int, stop: int) -> Layout:
        """Give the contents of a run of this vector."""
        segments = [
            Segment(max(one.start, start) - start, min(one.stop, stop) - start, one.dtype)
            for one in self.segments
        ]
        pieces = [_piece_in(one, start, stop) for one in self.pieces]
        return Layout(
            stop - start,
            tuple(one for one in segments if one.start < one.stop),
            tuple(one for one in pieces if one.start < one.stop),
            self.parameters,
            min(max(self.tail, start), stop) - start,
        )

    def runs(self, start: int, stop: int) -> tuple[Segment, ...]:
        """Give the segments of a run, in positions of this vector."""
        cut = [(max(one.start, start), min(one.stop, stop), one.dtype) for one in self.segments]
        return tuple(Segment(a, b, dtype) for a, b, dtype in cut if a < b)


def _piece_in(piece: Piece, start: int, stop: int) -> Piece:
    """Give what of a piece lies in a run; it may be nothing."""
    first, last = max(piece.start, start), min(piece.stop, stop)
    shape = piece.shape if (first, last) == (piece.start, piece.stop) else None
    return replace(piece, start=first - start, stop=last - start, shape=shape)


def plain_layout(size: int, dtype: str) -> Layout:
    """Give the layout of a vector that is a single parameter."""
    pieces = (Piece(0, 0, size, shape=(size,)),) if size else ()
    return Layout(size, (Segment(0, size, dtype),) if size else (), pieces, 1, size)
