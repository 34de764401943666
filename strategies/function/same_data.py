"""
Whether all ranks have the data that `prepare` is to deal out, seen before the first batch.

A part that each rank has cut for itself would be dealt out once more: most samples would come to
nobody. And `random_split` behind `prepare(model)`, which seeds each rank differently, cuts on each
rank elsewhere.

Only torch's own data sets are looked into: a sample of the user's may be costly, or another one
each time.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.collective import Collective, gather_bytes
from distplat.strategies.loop.sample_hash import hash_of

_ROWS = 16
"""Samples of a TensorDataset that are compared, over all of its length."""


def check_same_data(data: Any, group: Collective, device: torch.device) -> None:
    """
    See that all ranks have the same data, as far as that is cheap to see; every rank calls this.

    Args:
        data: of a loader that is to be prepared; has a length.
        group: all ranks.
        device: this rank's.

    Raises:
        SpecError: names the ranks that have another one than rank 0.
    """
    if group.world == 1:
        return
    mine = json.dumps([len(data), _described(data)]).encode()
    every = [json.loads(one) for one in gather_bytes(mine, group, device)]
    others = [rank for rank, one in enumerate(every) if one != every[0]]
    if not others:
        return
    size, its, rank = every[0][0], every[others[0]][0], others[0]
    text = f"other samples on rank {rank} than on rank 0"
    if its != size:
        text = f"{its} samples on rank {rank}, {size} on rank 0"
    text = f"prepare() got a DataLoader with {text}"
    hint = (
        "it deals one data set out to all ranks, so give each of them the whole: do not cut it by "
        "rank, and call random_split before prepare(model), or with a generator of a fixed seed"
    )
    raise SpecError(Problem(("task",), text, hint))


def _described(data: Any) -> list[Any]:
    """Say which samples a data set has, without a call of the user's code."""
    if isinstance(data, Subset):
        numbers = hashlib.sha256(repr([int(one) for one in data.indices]).encode()).hexdigest()
        return ["of", numbers[:16], _described(data.dataset)]
    if isinstance(data, ConcatDataset):
        return ["and", *map(_described, data.datasets)]
    if type(data) is TensorDataset:
        size = len(data)
        return [size, [hash_of(data[one]) for one in range(0, size, max(1, size // _ROWS))]]
    return []
