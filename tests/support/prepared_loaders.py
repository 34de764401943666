"""Loaders of a train function, prepared for one rank."""

from typing import Any

import torch
from torch.utils.data import DataLoader

from distplat.strategies.fakes import Fabric
from distplat.strategies.function.sharded_loader import (
    DataShard,
    MapStyleLoader,
    RankBatch,
    ShardedLoader,
)
from distplat.strategies.function.stream_loader import StreamLoader


def ignore(loader: object, batch: RankBatch | None, waited_s: float, epoch: int) -> None:
    del batch, waited_s, epoch


def prepare_loader(
    data: Any, rank: int = 0, world: int = 1, batch: int = 3, read: Any = ignore, **options: Any
) -> ShardedLoader:
    """Prepare a loader of a rank, without other ranks."""
    loader: DataLoader[Any] = DataLoader(data, batch_size=batch, **options)
    shard, device = DataShard(rank, world, 5), torch.device("cpu")
    if isinstance(data, list):
        return MapStyleLoader(loader, shard, device, read)
    return StreamLoader(loader, shard, device, read, Fabric(1, 10.0).collective(0))
