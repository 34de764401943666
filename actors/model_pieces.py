"""
A trained model on its way from a worker to the controller and on to the driver, piece by piece.

Each piece is a question with a deadline of its own: a large model over a slow network takes longer
than any deadline of one answer, and is not late as long as its bytes arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ModelPiece:
    """Some of a model's bytes."""

    content: bytes
    size: int
    """Bytes of the whole model."""


def piece_of(model: bytes, first: int) -> ModelPiece:
    """Give the piece that begins with byte `first`; asked again, it gives the same."""
    return ModelPiece(model[first : first + PIECE_BYTES], len(model))


def in_pieces(ask: Callable[[int], ModelPiece]) -> bytes:
    """
    Bring a whole model.

    Args:
        ask: gives the piece that begins with a byte; what it raises ends the transfer.
    """
    pieces = [ask(0)]
    arrived = len(pieces[0].content)
    while arrived < pieces[0].size:
        pieces.append(ask(arrived))
        arrived += len(pieces[-1].content)
    return b"".join(piece.content for piece in pieces)
