"""
A DataLoader over a stream, of which each rank gets its part: samples r, r + N, r + 2N, ...

    stream     0 1 2 3 4 5 | 6 7 8 9 10 11 | 12 13 14      2 ranks, batches of 3
    rank 0     0   2   4   | 6   8   10    | 12    14
    rank 1       1   3   5 |   7   9    11 |    13    0    the first ones again: all have as many

So the batches are those of a `DistributedSampler` over the same samples by number. Every rank, and
each of its loader processes, reads the whole stream, and all find its end at the same sample
(docs/decisions/streams.md).
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
from distplat.strategies.function.loader_kinds import batches_of, refused
from distplat.strategies.function.sharded_loader import (
    KEPT,
    Collate,
    DataShard,
    RankBatch,
    Read,
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
_HASHED = 2
"""Samples after a position by which it is recognised: one is made before each batch."""


@dataclass
class _Block:
    """What all ranks' batches that come together are made of, as one rank reads it."""

    mark: StreamPosition
    """The position before it."""
    mine: list[Any]
    """Samples of this rank."""
    count: int = 0
    """Samples of all ranks."""
    fingerprint: int = 0
    """Of the first sample, their number, and whether another block follows."""


class StreamLoader(ShardedLoader):
    """
    Of a stream, see the top of the file.

    Args:
        loader: the user's.
        cut: see `ShardedLoader`.
        device: see there.
        read: see there.
        group: all ranks; each calls this.

    Raises:
        SpecError: a loader that cannot be cut into parts, or ranks that have other streams.
        ValueError: the stream has no samples, or is its own iterator.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        cut: DataShard,
        device: torch.device,
        read: Read,
        group: Collective,
    ) -> None:
        super().__init__(loader, cut, device, read)
        _check(loader)
        stream = StreamSamples(loader.dataset, StreamSeeds(cut.seed), _WHERE)
        stream.survey(counts=False, limit_s=0.0)
        if others := mismatched_ranks(stream.hashes, group, device):
            names = ", ".join(f"worker-{rank}" for rank in others)
            text = f"{_WHERE} gives {names} other samples than worker-0"
            hint = (
                "every worker reads all of the stream and gets its part: do not cut it by rank "
                "(leave split_dataset_by_node out; WebDataset: nodesplitter=None), and shuffle it "
                "by the global generators or by a seed that all workers have. Leave the loader out "
                "of prepare() if each worker is to read samples of its own"
            )
            raise SpecError(Problem(("task",), text, hint))
        self._part = _Part(stream, cut, self.batch_size, drops=batches_of(loader).drop_last)
        self._kept = {name: getattr(loader, name) for name in KEPT}
        if loader.worker_init_fn is not None:
            self._kept["worker_init_fn"] = partial(_without_sharding, loader.worker_init_fn)
        self._collate: Any = _Collate(loader)
        self._loader = self._made()
        self._mark: StreamPosition | None = None  #: before the last batch that was given

    def _made(self) -> DataLoader[Any]:
        part: Any = self._part
        return DataLoader(part, batch_size=None, collate_fn=self._collate, **self._kept)

    @override
    def batches_of_pass(self) -> int:
        size = length_of(self.dataset)
        if size is None:
            raise TypeError("a prepared DataLoader has no len() where its stream has none")
        batch = int(self.batch_size) * self._cut.world
        return size // batch if self._part.drops else -(-size // batch)

    @override
    def _batches(self, epoch: int, first: int) -> Iterator[RankBatch]:
        self._part.begin(epoch, first)
        for rank_batch, mark in self._loader:
            self._mark = mark
            yield rank_batch

    @override
    def state_dict(self) -> dict[str, Any]:
        """With the position in the stream, of rank 0; all read the same one."""
        state = super().state_dict()
        mark = self._mark if self._at is not None else self._part.mark
        near = mark is not None and mark.turn == state["epoch"]
        return {**state, "stream": mark.saved() if mark is not None and near else None}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._part.mark = StreamPosition.read(state.get("stream"))
        self._loader = self._made()  # loader processes that live on would know nothing of it


class _Part(IterableDataset[Any]):
    """
    One rank's blocks of each pass over a stream.

    Args:
        stream: the whole.
        cut: which rank.
        batch: samples of a rank's batch.
        drops: whether what is left for no whole batch of all ranks is left out.
    """

    def __init__(self, stream: StreamSamples, cut: DataShard, batch: int, *, drops: bool) -> None:
        self.drops = drops
        """See the arguments."""
        self.mark: StreamPosition | None = None
        """A position to begin at, where it is one of the pass."""
        self._stream, self._cut, self._batch = stream, cut, batch
        # Loader processes that live on through several passes see it change.
        self._next = torch.zeros(2, dtype=torch.int64)
        self._next.share_memory_()  # type: ignore[no-untyped-call]

    def begin(self, epoch: int, first: int) -> None:
        """Say which pass is the next one, and how many batches of it are passed over."""
        self._next[0], self._next[1] = epoch, first

    def __iter__(self) -> Iterator[tuple[list[Any], RankBatch, StreamPosition]]:
        info = get_worker_info()
        loader, loaders = (0, 1) if info is None else (info.id, info.num_workers)
        turn, first = self._next.tolist()
        stream = copy.copy(self._stream)  # another pass may begin before this one has ended
        for number, block in enumerate(_mark_last(self._blocks(stream, turn, first))):
            if number % loaders == loader:
                yield self._filled(stream, block)

    def _blocks(self, stream: StreamSamples, turn: int, first: int) -> Iterator[_Block]:
        """Give the blocks of a pass from one on, without a last one that is dropped."""
        size = self._batch * self._cut.world
        mark, leads = self.mark, self._cut.rank == 0
        if mark is not None and (mark.turn != turn or mark.place > first * size):
            mark = None
        with preserve_rng_state():
            here = stream.begin_pass(turn, mark)
            if here.place < first * size:
                for _ in range(here.place, first * size):
                    stream.next_of_pass()
                here = stream.here(stateful=leads)
        while True:
            with preserve_rng_state():
                block = self._block(stream, here, size)
                whole = block.count == size
                if whole:
                    here = stream.here(stateful=leads)
            if whole or (block.count and not self.drops):
                yield block
            if not whole:
                return

    def _block(self, stream: StreamSamples, here: StreamPosition, size: int) -> _Block:
        """Read what all ranks' next batches are made of."""
        block, hashes = _Block(here, []), []
        for place in range(size):
            sample = stream.next_of_pass()
            if sample is OVER:
                break
            if place < _HASHED and self._cut.rank == 0 and not here.hashes:
                hashes.append(hash_of(sample))
            if not place and self._cut.world > 1:
                block.fingerprint = fingerprint_of(sample)
            if place % self._cut.world == self._cut.rank:
                block.mine.append(sample)
            block.count += 1
        if hashes:
            block.mark = here._replace(hashes=tuple(hashes))
        return block

    def _filled(
        self, stream: StreamSamples, block: _Block
    ) -> tuple[list[Any], RankBatch, StreamPosition]:
        """Have as many samples on all ranks; the first ones of the pass come once more."""
        mine, own, world = block.mine, len(block.mine), self._cut.world
        if own < -(-block.count // world):
            place = block.mark.place + own * world + self._cut.rank
            every = block.mark.place + block.count
            with preserve_rng_state():
                stream.begin_pass(block.mark.turn)
                for _ in range((place - every) % every):
                    stream.next_of_pass()
                mine = [*mine, stream.next_of_pass()]
        return mine, RankBatch(None, len(mine), own, block.fingerprint), block.mark


def _mark_last(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """Give each block once it is known whether another follows; its fingerprint says so, too."""
    before: _Block | None = None
    for block in itertools.chain(blocks, [None]):
        if before is not None:
            parts = before.fingerprint, before.count, "ends" if block is None else "goes on"
            before.fingerprint = fingerprint_of(parts)
            yield before
        before = block


class _Collate(Collate):
    """Makes the batch of a rank's samples."""

    @override
    def __call__(
        self, read: tuple[list[Any], RankBatch, StreamPosition]
    ) -> tuple[RankBatch, StreamPosition]:
        samples, rank_batch, mark = read
        return rank_batch._replace(batch=super().__call__(samples)), mark


def _without_sharding(init: Callable[[int], object], loader: int) -> None:
    """Call a `worker_init_fn` that may want to cut the stream: every loader reads all of it."""
    with without_worker_info():
        init(loader)


def _check(loader: DataLoader[Any]) -> None:
    batches_of(loader)
    kind = type(loader.dataset).__name__
    if not isinstance(loader.dataset, IterableDataset):
        if type(loader.sampler) is not SequentialSampler:
            raise refused(f"shuffles a {kind}, a stream", "leave shuffle and sampler out")
        if is_ray_data(loader.dataset) and loader.num_workers:
            text = "reads a Ray Dataset in loader processes, which are none of Ray's"
            raise refused(text, "give num_workers=0: Ray's own tasks do the reading")
