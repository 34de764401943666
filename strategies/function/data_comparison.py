"""
Check that all ranks pass the same data to `prepare`, which splits it between them.

If each rank had already taken its own part, the split would be applied twice, and most samples
would never be used. Another cause of a difference is `random_split` after `prepare(model)`, which
seeds each rank differently.

The check reads no samples of a user's data set: reading may be expensive, may return another sample
each time, or may open a file that loader processes must open themselves. Instead it compares
attributes with one entry per sample, such as a list of files.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.collective import Collective, gather_values
from distplat.strategies.loop.sample_hash import hash_of
from distplat.strategies.loop.streams import length_of

_NUM_ROWS = 16
"""Number of compared samples, spread over the data set."""
_BUILTIN_GETITEM = list.__getitem__, tuple.__getitem__
_MAX_DEPTH = 8
"""Maximum nesting of collections that are hashed."""
_MAX_ITEMS = 64
"""Maximum number of hashed items of a nested list, spread over its length."""
_MAX_ELEMENTS = 1 << 16
"""Maximum number of hashed elements of an array, a tensor or bytes."""


class DataComparison:
    """
    Compares the data of each prepared loader between the ranks; every rank calls `check`.

    Args:
        group: all ranks.
        device: this rank's device.
    """

    def __init__(self, group: Collective, device: torch.device) -> None:
        self._group, self._device = group, device
        #: compared data sets by id; later, a data set may cache samples that only this rank read
        self._compared: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def check(self, data: Any) -> None:
        """
        Check that all ranks have the same data set.

        Raises:
            SpecError: Another rank's data set differs from rank 0's; the message names the rank.
        """
        if self._group.world == 1:
            return
        local = [length_of(data), self._describe(data)]
        descriptions = gather_values(local, self._group, self._device)
        expected_size, expected = descriptions[0]
        for rank, (size, description) in enumerate(descriptions):
            text = f"{size} samples on rank {rank}, {expected_size} on rank 0"
            if size == expected_size:
                if not _differ(description, expected):
                    continue
                text = f"other samples on rank {rank} than on rank 0"
            advice = (
                "it splits one data set between all ranks, so pass the whole data set on each "
                "rank: do not split it by rank, and sort the files of a directory; draw random "
                "samples, and call random_split, before prepare(model) or with a generator of a "
                "fixed seed; or do not prepare the loader, if each rank has its own samples"
            )
            raise SpecError(Problem(("task",), f"prepare() got a DataLoader with {text}", advice))

    def _describe(self, data: Any) -> Any:
        """Return a description of a data set's samples, without calling the user's code."""
        if isinstance(data, Subset):
            return ["of", _hash_indices(data.indices), self._describe(data.dataset)]
        if isinstance(data, ConcatDataset):
            return ["and", *map(self._describe, data.datasets)]
        size = length_of(data)
        if not size:
            return []
        rows = range(0, size, max(1, size // _NUM_ROWS))
        if type(data) in (TensorDataset, list, tuple):
            return [size, [_hash_sample(data[row]) for row in rows]]
        if type(data).__module__ == "datasets.arrow_dataset":  # Hugging Face datasets
            table = data.with_format("arrow")  # the stored format, without decoding
            return [size, [_hash_sample(table[row].to_pydict()) for row in rows]]
        return self._describe_attributes(data, size, rows)

    def _describe_attributes(
        self, data: Any, size: int, rows: Iterable[int]
    ) -> dict[str, list[str]]:
        """
        Return hashes of an object's attributes with one entry per sample; empty after the first
        call.
        """
        if self._compared.get(id(data)) is data:
            return {}
        try:
            self._compared[id(data)] = data
        except TypeError:  # the class does not support weak references
            return {}
        attributes = getattr(data, "__dict__", {}).items()
        return {
            name: hashes for name, value in attributes if (hashes := _hash_rows(value, size, rows))
        }


def _differ(a: Any, b: Any) -> bool:
    """Return whether two descriptions differ; of attributes, only common names are compared."""
    if isinstance(a, dict) and isinstance(b, dict):
        return any(a[name] != b[name] for name in a.keys() & b.keys())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) != len(b) or any(map(_differ, a, b))
    return bool(a != b)


def _hash_indices(indices: Any) -> str:
    """Hash the indices of a Subset: integers, or the keys of a data set with keys."""
    try:
        numbers = np.fromiter(map(int, indices), np.int64, len(indices))
    except (TypeError, ValueError):
        return hash_of([_sample_value(index) for index in indices])
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


def _hash_rows(value: Any, size: int, rows: Iterable[int]) -> list[str]:
    """Hash some entries of a sequence with one entry per sample; empty for other values."""
    cls = type(value)
    is_pandas = str(cls.__module__).partition(".")[0] == "pandas"
    table = getattr(value, "iloc", None) if is_pandas else None
    if table is None and not issubclass(cls, list | tuple | np.ndarray | Tensor):
        return []
    if issubclass(cls, list | tuple) and cls.__getitem__ not in _BUILTIN_GETITEM:  # may read files
        return []
    try:
        if getattr(value, "ndim", 1) == 0 or len(value) != size:
            return []
        entries = [value[row] if table is None else [*np.ravel(table[row])] for row in rows]
        if any(entry is None for entry in entries):  # a cache of samples that were read
            return []
        return [_hash_sample(entry) for entry in entries]
    except Exception:  # user code may raise anything; the attribute is not compared
        return []


def _hash_sample(sample: Any) -> str:
    """Hash the text, numbers, arrays and tensors of a sample."""
    return hash_of(_sample_value(sample))


def _sample_value(value: Any, depth: int = 0) -> Any:
    """Return a small sample of a value to hash, without object addresses."""
    cls = type(value)
    if issubclass(cls, str | PurePath):
        return Path(value).name  # only the file name: the folders may differ between nodes
    if issubclass(cls, np.ndarray | np.generic) and value.dtype.hasobject:
        return _sample_value(_middle(value).tolist(), depth + 1)  # the bytes are addresses
    if issubclass(cls, Tensor | np.ndarray):
        return [[*value.shape], _middle(value)]
    if issubclass(cls, bytes):
        return [len(value), value[:_MAX_ELEMENTS]]
    if depth < _MAX_DEPTH and issubclass(cls, dict):
        pairs = [*value.items()][:_MAX_ITEMS]
        return [[_sample_value(item, depth + 1) for item in pair] for pair in pairs]
    if depth < _MAX_DEPTH and issubclass(cls, list | tuple):
        stride = max(1, len(value) // _MAX_ITEMS)
        return [len(value), [_sample_value(item, depth + 1) for item in value[::stride]]]
    plain = bool, int, float, complex, type(None), np.generic
    return value if issubclass(cls, plain) else cls.__qualname__


def _middle(array: Any) -> Any:
    """Return a contiguous part of a large array or tensor, which may be memory-mapped."""
    while (total := math.prod(array.shape)) > _MAX_ELEMENTS:
        size = len(array)
        rows = size * _MAX_ELEMENTS // total
        array = array[size // 2 : size // 2 + rows] if rows else array[size // 2]
    return array
