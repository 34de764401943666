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
from distplat.strategies.torch_compat import tree_map

_ROWS = 16
"""Samples that are compared, over all of the data's length."""


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
        description = [_length_of(data), self._described(data)]
        alone = self._group.world == 1
        every = [description] if alone else gather_values(description, self._group, self._device)
        size, samples = every[0]
        for rank, other in enumerate(every):
            text = f"{other[0]} samples on rank {rank}, {size} on rank 0"
            if other[0] == size:
                if not _differ(other[1], samples):
                    continue
                text = f"other samples on rank {rank} than on rank 0"
            advice = (
                "it deals one data set out to all ranks, so give each of them the whole: do not "
                "cut it by rank, and call random_split before prepare(model), or with a "
                "generator of a fixed seed; or leave the loader out of prepare(), if each rank has "
                "samples of its own"
            )
            raise SpecError(Problem(("task",), f"prepare() got a DataLoader with {text}", advice))

    def _described(self, data: Any) -> Any:
        """Say which samples a data set has, without a call of the user's code."""
        if isinstance(data, Subset):
            numbers = hashlib.sha256(repr([int(one) for one in data.indices]).encode()).hexdigest()
            return ["of", numbers[:16], self._described(data.dataset)]
        if isinstance(data, ConcatDataset):
            return ["and", *map(self._described, data.datasets)]
        size = _length_of(data)
        if not size:
            return []
        rows = range(0, size, max(1, size // _ROWS))
        if type(data) is TensorDataset or isinstance(data, list | tuple):
            return [size, [_hash_of(data[one]) for one in rows]]
        if _is_of("datasets", data):  # Hugging Face's
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


def _length_of(data: Any) -> int | None:
    """Count samples; None: it does not say, and a sampler of the user's does."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _rows_of(value: Any, size: int, rows: Iterable[int]) -> list[str]:
    """Hash some of a sequence that has as many entries as the data has samples; else none."""
    table = getattr(value, "iloc", None) if _is_of("pandas", value) else None
    if table is None and not isinstance(value, list | tuple | np.ndarray | Tensor):
        return []
    if getattr(value, "ndim", 1) == 0 or len(value) != size:
        return []
    found = [value[one] if table is None else [*np.ravel(table[one])] for one in rows]
    if any(one is None for one in found):  # samples that were read are put there
        return []
    return [_hash_of(one) for one in found]


def _hash_of(sample: Any) -> str:
    """Hash what is kept of a sample, as far as it is text, numbers, arrays and tensors."""
    return hash_of(tree_map(_plain, sample))


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, str | PurePath):
        return Path(leaf).name  # of a path the last part: nodes may have folders of their own
    known = bool, int, float, complex, bytes, type(None), Tensor, np.ndarray, np.generic
    return leaf if isinstance(leaf, known) else type(leaf).__qualname__


def _is_of(package: str, value: object) -> bool:
    return type(value).__module__.partition(".")[0] == package
