"""
The collective operations of ranks that share memory: in rank order, the same bits on every rank.

Tensors go through the slots of the segment, block by block (block_pipeline.py), or are read where
they are, if they lie in a shared vector. Nothing here knows of Ray: a rank may be a thread.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distplat.actors.collectives.header import Header
from distplat.actors.collectives.shm.block_pipeline import BlockPipeline
from distplat.actors.collectives.shm.kernels import (
    ALIGN,
    Scratch,
    combine,
    cut_evenly,
    in_pieces,
)
from distplat.actors.collectives.shm.liveness import LivenessMonitor, RunningOp
from distplat.actors.collectives.shm.segment import GroupSegment, SharedVectors
from distplat.actors.memory.memfd import MemorySegment
from distplat.platform.even_split import split_evenly
from distplat.strategies.collective import ReduceOp

_CACHED_BYTES = 256 * 1024
"""Shared vectors are combined in pieces of so many bytes, which stay in a core's cache."""
_SMALL_BYTES = 4 * 1024
"""Tensors up to this size are reduced whole by each rank: one exchange is quicker than two."""
_IN_PLACE = 2
"""The first two ranks' parts may hold the sum: it begins with them, and one stream less is read."""
_VIEWS_KEPT = 4096

Bytes = tuple[int, int]
"""Payload (that others read of this rank, that this rank read of others)."""


class ShmCommunicator:
    """
    One rank's part in the group's operations, one at a time; tensors are flat and contiguous.

    Where tensors are said to be shared, every rank's lie at the same place of a shared vector.

    Args:
        group: its name, for errors.
        segment: what the ranks share.
        liveness: does the sleeping.
    """

    def __init__(self, group: str, segment: GroupSegment, liveness: LivenessMonitor) -> None:
        self._segment = segment
        self.vectors = SharedVectors()
        self._pipeline = BlockPipeline(group, segment, liveness)
        self._scratch = Scratch()
        self._rank, self._world = segment.rank, segment.world
        self._others = [r for r in range(self._world) if r != self._rank]
        self._views: dict[tuple[torch.dtype, int, int, int, int], Tensor] = {}

    def enter(self) -> None:
        """Announce this rank; nothing else may be called before all ranks have."""
        self._segment.enter()
        self._pipeline.post()

    def begin(self, header: Header, op: RunningOp) -> None:
        """Announce the operation that is called next."""
        self._pipeline.begin(header, op)

    def barrier(self) -> Bytes:
        """Wait for all."""
        self._pipeline.barrier()
        return 0, 0

    def share(self, mine: MemorySegment) -> Bytes:
        """Map every rank's part of a new shared vector; `mine` is this rank's."""
        self._segment.offer(mine.address)
        self._pipeline.in_place(lambda: self.vectors.add(mine, self._segment.offers()))
        return 0, 0

    def all_reduce(self, flat: Tensor, op: ReduceOp, *, shared: bool) -> Bytes:
        """Combine into `flat`, shape [n]."""
        if (self._world == 2 and not shared) or flat.nbytes <= _SMALL_BYTES:
            return self._reduce_whole(flat, op)
        if shared:
            bounds = self._chunks(flat.numel())
            self._pipeline.in_place(lambda: self._combine_everywhere(flat, bounds, op))
            own = (bounds[self._rank][1] - bounds[self._rank][0]) * flat.itemsize
        else:
            own = self._reduce_in_chunks(flat, op)
        moved = flat.nbytes - own + own * len(self._others)
        return moved, moved

    def reduce(self, flat: Tensor, op: ReduceOp, root: int, *, shared: bool) -> Bytes:
        """Combine into the root's `flat`, shape [n]; the others' stay as they are."""
        is_root = self._rank == root
        if shared:
            parts = self.vectors.views(flat)
            self._pipeline.in_place(
                lambda: self._combine_here(parts, flat, op) if is_root else None
            )
        else:
            pieces = self._blocks(flat)

            def put(block: int, slot: int) -> None:
                if not is_root:
                    self._own(pieces[block], slot).copy_(pieces[block])

            def take(block: int, slot: int) -> None:
                if is_root:
                    parts = self._everybodys(pieces[block], slot)
                    parts[root] = pieces[block]
                    combine(parts, pieces[block], op, self._scratch)

            self._pipeline.exchange(len(pieces), put, take)
        return flat.nbytes * (not is_root), flat.nbytes * len(self._others) * is_root

    def broadcast(self, flat: Tensor, root: int, *, shared: bool) -> Bytes:
        """Copy the root's `flat`, shape [n], into the others'."""
        is_root = self._rank == root
        if shared:
            source = self.vectors.views(flat)[root]
            self._pipeline.in_place(lambda: None if is_root else flat.copy_(source))
        else:
            pieces = self._blocks(flat)

            def put(block: int, slot: int) -> None:
                if is_root:
                    self._own(pieces[block], slot).copy_(pieces[block])

            def take(block: int, slot: int) -> None:
                if not is_root:
                    pieces[block].copy_(self._of(root, pieces[block], slot))

            self._pipeline.exchange(len(pieces), put, take)
        return flat.nbytes * len(self._others) * is_root, flat.nbytes * (not is_root)

    def all_gather(self, outputs: Sequence[Tensor], flat: Tensor, *, shared: bool) -> Bytes:
        """Copy rank r's `flat` into everybody's `outputs[r]`, shape [n_r]."""
        own = outputs[self._rank]
        if own.data_ptr() != flat.data_ptr():
            own.copy_(flat)
        if shared:
            self._pipeline.in_place(lambda: self._fetch(outputs))
        else:
            self._gather_staged(outputs)
        return flat.nbytes * len(self._others), sum(t.nbytes for t in outputs) - flat.nbytes

    def _fetch(self, outputs: Sequence[Tensor]) -> None:
        for rank in self._others:
            if outputs[rank].numel():
                outputs[rank].copy_(self.vectors.views(outputs[rank])[rank])

    def _gather_staged(self, outputs: Sequence[Tensor]) -> None:
        limit = self._segment.layout.slot_bytes // outputs[0].itemsize // ALIGN * ALIGN
        blocks = max(1, *(-(-output.numel() // limit) for output in outputs))
        cuts = [cut_evenly(output, blocks) for output in outputs]

        def put(block: int, slot: int) -> None:
            own_piece = cuts[self._rank][block]
            self._own(own_piece, slot).copy_(own_piece)

        def take(block: int, slot: int) -> None:
            for rank in self._others:
                piece = cuts[rank][block]
                piece.copy_(self._of(rank, piece, slot))

        self._pipeline.exchange(blocks, put, take)

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp, *, shared: bool
    ) -> Bytes:
        """Combine everybody's `inputs[r]`, shape [n_r], into rank r's `output`."""
        own_input = inputs[self._rank]
        if shared:
            self._pipeline.in_place(lambda: self._combine_shared(own_input, output, op))
        else:
            self._reduce_scatter_staged(output, inputs, op)
        sent = sum(t.nbytes for t in inputs) - own_input.nbytes
        return sent, own_input.nbytes * len(self._others)

    def _reduce_scatter_staged(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp
    ) -> None:
        """Every block has a piece for each rank, so that all of them reduce all the time."""
        limit = self._segment.layout.slot_bytes // output.itemsize - 2 * ALIGN * self._world
        blocks = max(1, -(-sum(t.numel() for t in inputs) // limit))
        cuts = [cut_evenly(t, blocks) for t in inputs]
        results = cut_evenly(output, blocks)

        def starts(block: int) -> list[int]:
            begin, offsets = 0, []
            for cut in cuts:
                offsets.append(begin)
                begin += -(-cut[block].numel() // ALIGN) * ALIGN
            return offsets

        def put(block: int, slot: int) -> None:
            for rank, start in enumerate(starts(block)):
                if rank != self._rank:
                    piece = cuts[rank][block]
                    self._of(self._rank, piece, slot, start).copy_(piece)

        def take(block: int, slot: int) -> None:
            parts = self._everybodys(results[block], slot, starts(block)[self._rank])
            parts[self._rank] = cuts[self._rank][block]
            combine(parts, results[block], op, self._scratch)

        self._pipeline.exchange(blocks, put, take)

    def _reduce_whole(self, flat: Tensor, op: ReduceOp) -> Bytes:
        """Every rank reads all the others' parts: one exchange, for two ranks and small n."""
        pieces = self._blocks(flat)

        def put(block: int, slot: int) -> None:
            self._own(pieces[block], slot).copy_(pieces[block])

        def take(block: int, slot: int) -> None:
            own_piece, parts = pieces[block], self._everybodys(pieces[block], slot)
            if self._rank < _IN_PLACE:
                parts[self._rank] = own_piece
            combine(parts, own_piece, op, self._scratch)

        self._pipeline.exchange(len(pieces), put, take)
        return flat.nbytes * len(self._others), flat.nbytes * len(self._others)

    def _reduce_in_chunks(self, flat: Tensor, op: ReduceOp) -> int:
        """Rank r reduces chunk r of every block, and the others copy it; give r's bytes."""
        rank, world = self._rank, self._world
        blocks = self._block_lengths(flat)
        bounds = [self._chunks(length) for length in blocks]
        pieces = torch.split_with_sizes(flat, [b - a for block in bounds for a, b in block])

        def put(block: int, slot: int) -> None:
            for to in self._others:
                piece = pieces[block * world + to]
                self._of(rank, piece, slot, bounds[block][to][0]).copy_(piece)

        def reduce(block: int, slot: int) -> None:
            own_piece = pieces[block * world + rank]
            parts = self._everybodys(own_piece, slot, bounds[block][rank][0])
            result, parts[rank] = parts[rank], own_piece
            target, copy = (own_piece, result) if rank < _IN_PLACE else (result, own_piece)
            combine(parts, target, op, self._scratch)
            copy.copy_(target)

        def take(block: int, slot: int) -> None:
            for by in self._others:
                piece = pieces[block * world + by]
                piece.copy_(self._of(by, piece, slot, bounds[block][by][0]))

        self._pipeline.exchange_twice(len(blocks), put, reduce, take)
        return sum(pieces[block * world + rank].nbytes for block in range(len(blocks)))

    def _combine_everywhere(
        self, flat: Tensor, bounds: list[tuple[int, int]], op: ReduceOp
    ) -> None:
        """Combine this rank's chunk of all shared vectors and write it into all of them."""
        first, last = bounds[self._rank]
        if first == last:
            return
        vectors = self.vectors.views(flat[first:last])
        size = _CACHED_BYTES // flat.itemsize
        # The chunk is this rank's alone in all vectors, so the first one can hold the sum.
        for parts in zip(*(in_pieces(vector, size) for vector in vectors), strict=True):
            combine(parts, parts[0], op, self._scratch)
            for part in parts[1:]:
                part.copy_(parts[0])

    def _combine_shared(self, mine: Tensor, output: Tensor, op: ReduceOp) -> None:
        if mine.numel():
            self._combine_here(self.vectors.views(mine), output, op)

    def _combine_here(self, vectors: Sequence[Tensor], output: Tensor, op: ReduceOp) -> None:
        size = _CACHED_BYTES // output.itemsize
        for out, *parts in zip(*(in_pieces(v, size) for v in (output, *vectors)), strict=True):
            combine(parts, out, op, self._scratch)

    def _chunks(self, length: int) -> list[tuple[int, int]]:
        return split_evenly(length, self._world, align=ALIGN)

    def _block_lengths(self, flat: Tensor) -> list[int]:
        """Cut into blocks of one size, the last one shorter; an empty tensor is one block."""
        size = self._segment.layout.slot_bytes // flat.itemsize // ALIGN * ALIGN
        whole, rest = divmod(flat.numel(), size)
        return [size] * whole + ([rest] if rest or not whole else [])

    def _blocks(self, flat: Tensor) -> Sequence[Tensor]:
        return torch.split_with_sizes(flat, self._block_lengths(flat))

    def _own(self, piece: Tensor, slot: int) -> Tensor:
        return self._of(self._rank, piece, slot)

    def _everybodys(self, piece: Tensor, slot: int, start: int = 0) -> list[Tensor]:
        """Give what corresponds to `piece` in all ranks' slots."""
        return [self._of(rank, piece, slot, start) for rank in range(self._world)]

    def _of(self, rank: int, piece: Tensor, slot: int, start: int = 0) -> Tensor:
        """Give a vector as long as `piece`, in a rank's slot from element `start`."""
        key = (piece.dtype, slot, rank, start, piece.numel())
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _VIEWS_KEPT:
                self._views.clear()
            view = self._segment.slots(piece.dtype)[slot][rank][start : start + piece.numel()]
            self._views[key] = view
        return view
