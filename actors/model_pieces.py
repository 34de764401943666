"""
Transfer of a trained model from a worker to the controller and the driver, in pieces.

Each piece is a call with its own deadline, because a large model over a slow network takes longer
than the deadline of any single call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PIECE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ModelPiece:
    """A part of a serialized model."""

    content: bytes
    size: int
    """Bytes of the whole model."""


def piece_of(model: bytes, first: int) -> ModelPiece:
    """Return the piece that starts at byte `first`."""
    return ModelPiece(model[first : first + PIECE_BYTES], len(model))


def fetch_pieces(fetch: Callable[[int], ModelPiece]) -> bytes:
    """
    Fetch a whole model.

    Args:
        fetch: returns the piece that starts at a byte; its exceptions pass unchanged.
    """
    pieces = [fetch(0)]
    received = len(pieces[0].content)
    while received < pieces[0].size:
        pieces.append(fetch(received))
        received += len(pieces[-1].content)
    return b"".join(piece.content for piece in pieces)
