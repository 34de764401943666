"""
Loaders of a stream: each rank gets the samples r, r + N, r + 2N, ...

    stream     0 1 2 3 4 5 | 6 7 8 9 10 11 | 12 13 14      2 ranks, batches of 3
    rank 0     0   2   4   | 6   8   10    | 12    14
    rank 1       1   3   5 |   7   9    11 |    13    0    sample 0 is repeated, to have 8 each

The batches are those of a `DistributedSampler` over a map-style data set with the same samples.
Every rank, and each of its loader processes, reads the whole stream, so all of them find the end at
the same sample (docs/decisions/streams.md).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, get_worker_info
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.collective import Collective, mismatched_ranks
from distplat.strategies.function.loader_checks import batch_sampler_of, loader_error
from distplat.strategies.function.sharded_loader import (
    COPIED_ARGUMENTS,
    Collate,
    DataShard,
    OnBatch,
    RankBatch,
    ShardedLoader,
)
from distplat.strategies.loop.sample_hash import fingerprint_of, hash_of
from distplat.strategies.loop.seeding import preserve_rng_state
from distplat.strategies.loop.streams import (
    OVER,
    StreamPosition,
    StreamSamples,
    StreamSeeds,
    is_ray_data,
    length_of,
)
from distplat.strategies.torch_compat import without_worker_info

_WHERE = "prepare() got a DataLoader whose data set"
_NUM_HASHED = 2
"""Number of samples after a position that identify it. A position is recorded before each batch."""


@dataclass
class _Block:
    """The samples of one step of all ranks, as read by one rank."""

    position: StreamPosition
    """The position before the block."""
    samples: list[Any]
    """Samples of this rank."""
    count: int = 0
    """Number of samples of all ranks."""
    fingerprint: int = 0
    """Fingerprint of the first sample, of `count`, and of whether another block follows."""


class StreamLoader(ShardedLoader):
    """
    A loader of a stream, see the module's docstring.

    Args:
        loader: the user's loader.
        shard: see `ShardedLoader`.
        device: see `ShardedLoader`.
        on_batch: see `ShardedLoader`.
        group: all ranks; each calls this.

    Raises:
        SpecError: The loader cannot be split, or ranks have different streams.
        ValueError: The stream has no samples, or is its own iterator.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        shard: DataShard,
        device: torch.device,
        on_batch: OnBatch,
        group: Collective,
    ) -> None:
        super().__init__(loader, shard, device, on_batch)
        _check(loader)
        stream = StreamSamples(loader.dataset, StreamSeeds(shard.seed), _WHERE)
        stream.survey(counts=False, limit_s=0.0)
        if ranks := mismatched_ranks(stream.hashes, group, device):
            names = ", ".join(f"worker-{rank}" for rank in ranks)
            text = f"{_WHERE} gives {names} other samples than worker-0"
            hint = (
                "every worker reads the whole stream and uses its part: do not split it by rank "
                "(do not call split_dataset_by_node; WebDataset: nodesplitter=None), and shuffle "
                "it with the global generators or with the same seed on all workers. Do not "
                "prepare the loader if each worker should read its own samples"
            )
            raise SpecError(Problem(("task",), text, hint))
        self._part = _Part(stream, shard, self.batch_size, drops=batch_sampler_of(loader).drop_last)
        self._arguments = {name: getattr(loader, name) for name in COPIED_ARGUMENTS}
        if loader.worker_init_fn is not None:
            self._arguments["worker_init_fn"] = partial(_without_sharding, loader.worker_init_fn)
        self._collate: Any = _Collate(loader)
        self._loader = self._build_loader()
        self._position: StreamPosition | None = None  #: before the last yielded batch

    def _build_loader(self) -> DataLoader[Any]:
        part: Any = self._part
        return DataLoader(part, batch_size=None, collate_fn=self._collate, **self._arguments)

    @override
    def batches_of_pass(self) -> int:
        size = length_of(self.dataset)
        if size is None:
            raise TypeError("a prepared DataLoader has no len() if its stream has none")
        step_size = self._step_size
        return size // step_size if self._part.drops else -(-size // step_size)

    @override
    def _batches(self, epoch: int, first: int) -> Iterator[RankBatch]:
        self._part.begin(epoch, first)
        for rank_batch, position in self._loader:
            self._position = position
            yield rank_batch

    @override
    def state_dict(self) -> dict[str, Any]:
        """Also contains rank 0's position in the stream; all ranks read the same stream."""
        state = super().state_dict()
        position = self._position if self._at is not None else self._part.position
        if position is None or position.turn != state["epoch"]:
            return {**state, "stream": None}
        return {**state, "stream": position.saved()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._part.position = StreamPosition.read(state.get("stream"))
        self._loader = self._build_loader()  # persistent loader processes keep the old position


class _Part(IterableDataset[Any]):
    """
    One rank's blocks of each pass over a stream.

    Args:
        stream: the whole stream.
        shard: this rank's part.
        batch: batch size of a rank.
        drops: whether to drop a last block that does not fill all ranks' batches.
    """

    def __init__(self, stream: StreamSamples, shard: DataShard, batch: int, *, drops: bool) -> None:
        self.drops = drops
        self.position: StreamPosition | None = None
        """A position to start from, if it belongs to the pass."""
        self._stream, self._shard, self._batch = stream, shard, batch
        # In shared memory, so that persistent loader processes see changes.
        self._next = torch.zeros(2, dtype=torch.int64)
        self._next.share_memory_()  # type: ignore[no-untyped-call]

    def begin(self, epoch: int, first: int) -> None:
        """Set the epoch of the next pass, and the number of its batches to skip."""
        self._next[0], self._next[1] = epoch, first

    @override
    def __iter__(self) -> Iterator[tuple[list[Any], RankBatch, StreamPosition]]:
        info = get_worker_info()
        loader, loaders = (0, 1) if info is None else (info.id, info.num_workers)
        turn, first = self._next.tolist()
        stream = copy.copy(self._stream)  # another pass may begin before this one has ended
        for number, block in enumerate(_mark_last(self._blocks(stream, turn, first))):
            if number % loaders == loader:
                yield self._filled(stream, block)

    def _blocks(self, stream: StreamSamples, turn: int, first: int) -> Iterator[_Block]:
        """Yield the blocks of a pass from `first` on, without a dropped last block."""
        size = self._batch * self._shard.world
        position, is_leader = self.position, self._shard.rank == 0
        if position is not None and (position.turn != turn or position.place > first * size):
            position = None
        with preserve_rng_state():
            current = stream.begin_pass(turn, position)
            if current.place < first * size:
                for _ in range(current.place, first * size):
                    stream.next_of_pass()
                current = stream.here(stateful=is_leader)
        while True:
            with preserve_rng_state():
                block = self._block(stream, current, size)
                is_full = block.count == size
                if is_full:
                    current = stream.here(stateful=is_leader)
            if is_full or (block.count and not self.drops):
                yield block
            if not is_full:
                return

    def _block(self, stream: StreamSamples, current: StreamPosition, size: int) -> _Block:
        """Read the samples of all ranks' next batches."""
        block, hashes = _Block(current, []), []
        for place in range(size):
            sample = stream.next_of_pass()
            if sample is OVER:
                break
            if place < _NUM_HASHED and self._shard.rank == 0 and not current.hashes:
                hashes.append(hash_of(sample))
            if not place and self._shard.world > 1:
                block.fingerprint = fingerprint_of(sample)
            if place % self._shard.world == self._shard.rank:
                block.samples.append(sample)
            block.count += 1
        if hashes:
            block.position = current._replace(hashes=tuple(hashes))
        return block

    def _filled(
        self, stream: StreamSamples, block: _Block
    ) -> tuple[list[Any], RankBatch, StreamPosition]:
        """Add a first sample of the pass if this rank has fewer samples than others."""
        samples, unique, world = block.samples, len(block.samples), self._shard.world
        if unique < -(-block.count // world):
            place = block.position.place + unique * world + self._shard.rank
            total = block.position.place + block.count
            with preserve_rng_state():
                stream.begin_pass(block.position.turn)
                for _ in range((place - total) % total):
                    stream.next_of_pass()
                samples = [*samples, stream.next_of_pass()]
        return samples, RankBatch(None, len(samples), unique, block.fingerprint), block.position


def _mark_last(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """Yield each block, with its fingerprint updated by whether another follows."""
    previous: _Block | None = None
    for block in itertools.chain(blocks, [None]):
        if previous is not None:
            parts = previous.fingerprint, previous.count, "ends" if block is None else "goes on"
            previous.fingerprint = fingerprint_of(parts)
            yield previous
        previous = block


class _Collate(Collate):
    """Collates the samples of one rank."""

    @override
    def __call__(
        self, item: tuple[list[Any], RankBatch, StreamPosition]
    ) -> tuple[RankBatch, StreamPosition]:
        samples, rank_batch, position = item
        return rank_batch._replace(batch=super().__call__(samples)), position


def _without_sharding(init: Callable[[int], object], loader: int) -> None:
    """Call a `worker_init_fn` so that it does not split the stream by loader."""
    with without_worker_info():
        init(loader)


def _check(loader: DataLoader[Any]) -> None:
    batch_sampler_of(loader)
    name = type(loader.dataset).__name__
    if not isinstance(loader.dataset, IterableDataset):
        if type(loader.sampler) is not SequentialSampler:
            raise loader_error(f"shuffles a {name}, a stream", "do not set shuffle or sampler")
        if is_ray_data(loader.dataset) and loader.num_workers:
            text = "reads a Ray Dataset in loader processes, which are not Ray workers"
            raise loader_error(text, "set num_workers=0: Ray's own tasks read the data")
