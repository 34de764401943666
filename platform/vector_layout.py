"""
Layout of a flat vector: its parameters, and the dtypes of its elements.

    elements   0            48      64                         128
               | 0.weight   |0.bias | 1.weight                  | 2.weight (frozen) |
    segments   [ float32            ][ bfloat16                 ][ bfloat16          ]
                                                                ^ tail: parameters that are frozen

A vector whose parameters all have one dtype has that dtype. A vector of several dtypes has dtype
`uint8`: code that only moves it needs no distinction, and code that computes uses its segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Segment:
    """A range of the vector with one dtype."""

    start: int
    """First element in the vector."""
    stop: int
    dtype: str
    """torch's dtype name, for example `float32`."""


@dataclass(frozen=True)
class Piece:
    """A parameter, or its part within a range of the vector."""

    slot: int
    """Index of the parameter in the whole vector."""
    start: int
    """First element in the vector or range."""
    stop: int
    group: int = 0
    """The parameter's optimizer group, from 1; 0: none."""
    shape: tuple[int, ...] | None = None
    """The parameter's shape; None: this is a part of it."""


@dataclass(frozen=True)
class Layout:
    """Contents of a vector or of a range of it; positions are relative to its start."""

    size: int
    """Number of elements, with padding."""
    segments: tuple[Segment, ...]
    pieces: tuple[Piece, ...]
    """By position, none empty."""
    parameters: int
    """Number of parameters of the whole vector: `Piece.slot` is below it."""
    tail: int
    """First element of initially frozen parameters; `size`: none."""

    @property
    def starts(self) -> tuple[int, ...]:
        """First elements of all pieces."""
        return tuple(piece.start for piece in self.pieces)

    @property
    def tail_size(self) -> int:
        """Number of elements of initially frozen parameters."""
        return self.size - self.tail

    def cut(self, start: int, stop: int) -> Layout:
        """Return the layout of a range of this vector."""
        segments = [
            Segment(max(s.start, start) - start, min(s.stop, stop) - start, s.dtype)
            for s in self.segments
        ]
        pieces = [_piece_in(piece, start, stop) for piece in self.pieces]
        return Layout(
            stop - start,
            tuple(segment for segment in segments if segment.start < segment.stop),
            tuple(piece for piece in pieces if piece.start < piece.stop),
            self.parameters,
            min(max(self.tail, start), stop) - start,
        )

    def runs(self, start: int, stop: int) -> tuple[Segment, ...]:
        """Return the segments of a range, in positions of this vector."""
        cut = [(max(s.start, start), min(s.stop, stop), s.dtype) for s in self.segments]
        return tuple(Segment(a, b, dtype) for a, b, dtype in cut if a < b)


def _piece_in(piece: Piece, start: int, stop: int) -> Piece:
    """Return the part of a piece in a range; may be empty."""
    first, last = max(piece.start, start), min(piece.stop, stop)
    shape = piece.shape if (first, last) == (piece.start, piece.stop) else None
    return replace(piece, start=first - start, stop=last - start, shape=shape)


def plain_layout(size: int, dtype: str) -> Layout:
    """Return the layout of a vector with a single parameter."""
    pieces = (Piece(0, 0, size, shape=(size,)),) if size else ()
    return Layout(size, (Segment(0, size, dtype),) if size else (), pieces, 1, size)
