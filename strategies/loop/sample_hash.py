"""Fingerprints of samples, by which processes compare their data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distplat.strategies.loop.containers import items_in

_DEPTH = 8
"""Maximum nesting of hashed collections."""


def hash_of(sample: Any) -> str:
    """Return a hash of a sample's content: tensors, arrays, numbers, text, and collections."""
    digest = hashlib.sha256()
    _feed(digest, sample, 0)
    return digest.hexdigest()[:16]


def fingerprint_of(sample: Any) -> int:
    """Return a number from 1 to 2^32 by which ranks compare samples in a control record."""
    return int(hash_of(sample)[:8], 16) + 1


def _feed(digest: Any, value: Any, depth: int) -> None:
    digest.update(f"<{type(value).__qualname__}>".encode())
    if isinstance(value, Tensor):
        _feed_tensor(digest, value)
    elif isinstance(value, np.ndarray | np.generic):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes())
    elif isinstance(value, bool | int | float | complex | str | bytes | type(None)):
        digest.update(repr(value).encode())
    elif depth < _DEPTH:
        for item in _items(value):
            _feed(digest, item, depth + 1)


def _items(value: Any) -> list[Any]:
    """Return the items of a collection; empty: the value is not a collection."""
    if isinstance(value, Mapping):
        return [item for pair in value.items() for item in pair]
    if (items := items_in(value)) is not None:
        return items
    return [np.asarray(value)] if hasattr(value, "__array__") else []  # an image


def _feed_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{[*tensor.shape]}".encode())
    if tensor.layout is torch.strided and not tensor.is_meta:
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
