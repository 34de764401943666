"""
Whether all ranks have the data that `prepare` is to deal out.

A part that each rank has cut for itself would be dealt out once more: most samples would come to
nobody. And `random_split` behind `prepare(model)`, which seeds each rank differently, cuts on each
rank elsewhere. No sample of the user's is read, which may be costly, or another one each time, or
open a file that loader processes must open. What his data set keeps of each sample is compared,
such as a list of files.
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

_ROWS = 16
"""Samples that are compared, over all of the data's length."""
_PLAIN = list.__getitem__, tuple.__getitem__
_DEPTH = 8
"""Of collections within each other."""
_ITEMS = 64
"""Of a list within one, over all of its length."""
_ELEMENTS = 1 << 16
"""Of an array or a tensor within one, or bytes."""


class DataComparison:
    """
    Compares the data of each loader that is prepared; every rank calls it for each.

    Args:
        group: all ranks.
        device: this rank's.
    """

    def __init__(self, group: Collective, device: torch.device) -> None:
        self._group, self._device = group, device
        #: by identity: in a later epoch it may hold what this rank alone has read
        self._known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def check(self, data: Any) -> None:
        """
        See that all ranks have it alike.

        Raises:
            SpecError: names a rank that has another one than rank 0.
        """
        if self._group.world == 1:
            return
        description = [length_of(data), self._described(data)]
        every = gather_values(description, self._group, self._device)
        size, samples = every[0]
        for rank, other in enumerate(every):
            text = f"{other[0]} samples on rank {rank}, {size} on rank 0"
            if other[0] == size:
                if not _differ(other[1], samples):
                    continue
                text = f"other samples on rank {rank} than on rank 0"
            advice = (
                "it deals one data set out to all ranks, so give each of them the whole: do not "
                "cut it by rank, sort the files of a directory, and draw what it keeps, and call "
                "random_split, before prepare(model), or with a generator of a fixed seed; or "
                "leave the loader out of prepare(), if each rank has samples of its own"
            )
            raise SpecError(Problem(("task",), f"prepare() got a DataLoader with {text}", advice))

    def _described(self, data: Any) -> Any:
        """Say which samples a data set has, without a call of the user's code."""
        if isinstance(data, Subset):
            return ["of", _numbers_of(data.indices), self._described(data.dataset)]
        if isinstance(data, ConcatDataset):
            return ["and", *map(self._described, data.datasets)]
        size = length_of(data)
        if not size:
            return []
        rows = range(0, size, max(1, size // _ROWS))
        if type(data) in (TensorDataset, list, tuple):
            return [size, [_hash_of(data[one]) for one in rows]]
        if type(data).__module__ == "datasets.arrow_dataset":  # Hugging Face's
            table = data.with_format("arrow")  # as it is stored: nothing is decoded
            return [size, [_hash_of(table[one].to_pydict()) for one in rows]]
        return self._kept(data, size, rows)

    def _kept(self, data: Any, size: int, rows: Iterable[int]) -> dict[str, list[str]]:
        """Give hashes of what an object of the user's keeps of samples, the first time."""
        if self._known.get(id(data)) is data:
            return {}
        try:
            self._known[id(data)] = data
        except TypeError:  # of a class that nobody can refer to weakly
            return {}
        held = getattr(data, "__dict__", {}).items()
        return {name: hashes for name, one in held if (hashes := _rows_of(one, size, rows))}


def _differ(one: Any, other: Any) -> bool:
    """Compare two descriptions; of what objects keep the names that both have."""
    if isinstance(one, dict) and isinstance(other, dict):
        return any(one[name] != other[name] for name in one.keys() & other.keys())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) != len(other) or any(map(_differ, one, other))
    return bool(one != other)


def _numbers_of(indices: Any) -> str:
    """Hash what a Subset has of samples: numbers, or keys of a data set that has such."""
    try:
        numbers = np.fromiter(map(int, indices), np.int64, len(indices))
    except (TypeError, ValueError):
        return hash_of([_sketch(one) for one in indices])
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


def _rows_of(value: Any, size: int, rows: Iterable[int]) -> list[str]:
    """Hash some of a sequence that has as many entries as the data has samples; else none."""
    kind = type(value)
    pandas = str(kind.__module__).partition(".")[0] == "pandas"
    table = getattr(value, "iloc", None) if pandas else None
    if table is None and not issubclass(kind, list | tuple | np.ndarray | Tensor):
        return []
    if issubclass(kind, list | tuple) and kind.__getitem__ not in _PLAIN:  # it may read files
        return []
    try:
        if getattr(value, "ndim", 1) == 0 or len(value) != size:
            return []
        entries = [value[one] if table is None else [*np.ravel(table[one])] for one in rows]
        if any(one is None for one in entries):  # samples that were read are put there
            return []
        return [_hash_of(one) for one in entries]
    except Exception:  # of the user's, which may be of any kind: it is not compared
        return []


def _hash_of(sample: Any) -> str:
    """Hash what is kept of a sample, as far as it is text, numbers, arrays and tensors."""
    return hash_of(_sketch(sample))


def _sketch(value: Any, depth: int = 0) -> Any:
    """Give what is hashed of a value: little of a large one, and no address of an object."""
    kind = type(value)
    if issubclass(kind, str | PurePath):
        return Path(value).name  # of a path the last part: nodes may have folders of their own
    if issubclass(kind, np.ndarray | np.generic) and value.dtype.hasobject:
        return _sketch(_middle(value).tolist(), depth + 1)  # a text of it would have addresses
    if issubclass(kind, Tensor | np.ndarray):
        return [[*value.shape], _middle(value)]
    if issubclass(kind, bytes):
        return [len(value), value[:_ELEMENTS]]
    if depth < _DEPTH and issubclass(kind, dict):
        return [[_sketch(one, depth + 1) for one in pair] for pair in [*value.items()][:_ITEMS]]
    if depth < _DEPTH and issubclass(kind, list | tuple):
        every = max(1, len(value) // _ITEMS)
        return [len(value), [_sketch(one, depth + 1) for one in value[::every]]]
    known = bool, int, float, complex, type(None), np.generic
    return value if issubclass(kind, known) else kind.__qualname__


def _middle(array: Any) -> Any:
    """Give a part of an array or a tensor, in one piece: it may lie in a file."""
    while (total := math.prod(array.shape)) > _ELEMENTS:
        size = len(array)
        kept = size * _ELEMENTS // total
        array = array[size // 2 : size // 2 + kept] if kept else array[size // 2]
    return array
