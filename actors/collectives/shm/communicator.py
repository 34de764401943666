"""
Collective operations in shared memory; reductions in rank order, bitwise equal on every rank.

Tensors pass through the slots of the segment, block by block (block_pipeline.py), or are read in
place if they are in a shared vector. This module does not use Ray: a rank may be a thread.
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
    split_by_length,
)
from distplat.actors.collectives.shm.liveness import LivenessMonitor, RunningOp
from distplat.actors.collectives.shm.segment import GroupSegment, SharedVectors
from distplat.actors.memory.memfd import MemorySegment
from distplat.platform.even_split import split_evenly
from distplat.strategies.collective import ReduceOp

_CACHED_BYTES = 256 * 1024
"""Shared vectors are reduced in pieces of this size, which stay in a core's cache."""
_SMALL_BYTES = 4 * 1024
"""Each rank reduces whole tensors up to this size: one exchange is faster than two."""
_IN_PLACE = 2
"""The sum may overwrite the parts of this many first ranks: it starts with them, and one memory
stream less is read."""
_MAX_CACHED_VIEWS = 4096

TrafficBytes = tuple[int, int]
"""(Bytes that other ranks read of this rank, bytes that this rank read of other ranks)."""


class ShmCommunicator:
    """
    One rank's side of the group's operations, one at a time; tensors are flat and contiguous.

    With `shared`, the ranks' tensors are at the same position of a shared vector.

    Args:
        group: name of the group, for errors.
        segment: the ranks' shared memory.
        liveness: for waits.
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
        """Announce this rank; no operation may start before all ranks have entered."""
        self._segment.enter()
        self._pipeline.post()

    def begin(self, header: Header, op: RunningOp) -> None:
        """Announce the next operation."""
        self._pipeline.begin(header, op)

    def barrier(self) -> TrafficBytes:
        """Wait for all ranks."""
        self._pipeline.barrier()
        return 0, 0

    def share(self, segment: MemorySegment) -> TrafficBytes:
        """Map every rank's segment of a new shared vector; `segment` is this rank's."""
        self._segment.publish_vector(segment.address)
        self._pipeline.between_barriers(
            lambda: self.vectors.add(segment, self._segment.read_vectors())
        )
        return 0, 0

    def all_reduce(self, flat: Tensor, op: ReduceOp, *, shared: bool) -> TrafficBytes:
        """Reduce `flat`, shape [n], in place."""
        if (self._world == 2 and not shared) or flat.nbytes <= _SMALL_BYTES:
            return self._reduce_whole(flat, op)
        if shared:
            bounds = self._chunks(flat.numel())
            self._pipeline.between_barriers(lambda: self._reduce_shared_chunk(flat, bounds, op))
            own_bytes = (bounds[self._rank][1] - bounds[self._rank][0]) * flat.itemsize
        else:
            own_bytes = self._reduce_in_chunks(flat, op)
        traffic = flat.nbytes - own_bytes + own_bytes * len(self._others)
        return traffic, traffic

    def reduce(self, flat: Tensor, op: ReduceOp, root: int, *, shared: bool) -> TrafficBytes:
        """Reduce into the root's `flat`, shape [n]; the tensors of other ranks do not change."""
        is_root = self._rank == root
        if shared:
            vectors = self.vectors.views(flat)
            self._pipeline.between_barriers(
                lambda: self._combine_in_pieces(vectors, flat, op) if is_root else None
            )
        else:
            pieces = self._blocks(flat)

            def put(block: int, slot: int) -> None:
                if not is_root:
                    self._own_slot_view(pieces[block], slot).copy_(pieces[block])

            def take(block: int, slot: int) -> None:
                if is_root:
                    parts = self._all_slot_views(pieces[block], slot)
                    parts[root] = pieces[block]
                    combine(parts, pieces[block], op, self._scratch)

            self._pipeline.exchange(len(pieces), put, take)
        return flat.nbytes * (not is_root), flat.nbytes * len(self._others) * is_root

    def broadcast(self, flat: Tensor, root: int, *, shared: bool) -> TrafficBytes:
        """Copy the root's `flat`, shape [n], into that of the other ranks."""
        is_root = self._rank == root
        if shared:
            source = self.vectors.views(flat)[root]
            self._pipeline.between_barriers(lambda: None if is_root else flat.copy_(source))
        else:
            pieces = self._blocks(flat)

            def put(block: int, slot: int) -> None:
                if is_root:
                    self._own_slot_view(pieces[block], slot).copy_(pieces[block])

            def take(block: int, slot: int) -> None:
                if not is_root:
                    pieces[block].copy_(self._slot_view(root, pieces[block], slot))

            self._pipeline.exchange(len(pieces), put, take)
        return flat.nbytes * len(self._others) * is_root, flat.nbytes * (not is_root)

    def all_gather(self, outputs: Sequence[Tensor], flat: Tensor, *, shared: bool) -> TrafficBytes:
        """Copy rank r's `flat` into `outputs[r]` of all ranks, shape [n_r]."""
        own = outputs[self._rank]
        if own.data_ptr() != flat.data_ptr():
            own.copy_(flat)
        if shared:
            self._pipeline.between_barriers(lambda: self._all_gather_shared(outputs))
        else:
            self._all_gather_staged(outputs)
        return flat.nbytes * len(self._others), sum(t.nbytes for t in outputs) - flat.nbytes

    def _all_gather_shared(self, outputs: Sequence[Tensor]) -> None:
        for rank in self._others:
            if outputs[rank].numel():
                outputs[rank].copy_(self.vectors.views(outputs[rank])[rank])

    def _all_gather_staged(self, outputs: Sequence[Tensor]) -> None:
        limit = self._segment.layout.slot_bytes // outputs[0].itemsize // ALIGN * ALIGN
        blocks = max(1, *(-(-output.numel() // limit) for output in outputs))
        pieces = [cut_evenly(output, blocks) for output in outputs]

        def put(block: int, slot: int) -> None:
            own_piece = pieces[self._rank][block]
            self._own_slot_view(own_piece, slot).copy_(own_piece)

        def take(block: int, slot: int) -> None:
            for rank in self._others:
                piece = pieces[rank][block]
                piece.copy_(self._slot_view(rank, piece, slot))

        self._pipeline.exchange(blocks, put, take)

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp, *, shared: bool
    ) -> TrafficBytes:
        """Reduce all ranks' `inputs[r]`, shape [n_r], into rank r's `output`."""
        own_input = inputs[self._rank]
        if shared:
            self._pipeline.between_barriers(
                lambda: self._reduce_scatter_shared(own_input, output, op)
            )
        else:
            self._reduce_scatter_staged(output, inputs, op)
        sent = sum(t.nbytes for t in inputs) - own_input.nbytes
        return sent, own_input.nbytes * len(self._others)

    def _reduce_scatter_staged(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp
    ) -> None:
        """Every block has a piece for each rank, so that all ranks reduce in every block."""
        limit = self._segment.layout.slot_bytes // output.itemsize - 2 * ALIGN * self._world
        blocks = max(1, -(-sum(t.numel() for t in inputs) // limit))
        pieces = [cut_evenly(t, blocks) for t in inputs]
        results = cut_evenly(output, blocks)

        def offsets(block: int) -> list[int]:
            offset, in_slot = 0, []
            for input_pieces in pieces:
                in_slot.append(offset)
                offset += -(-input_pieces[block].numel() // ALIGN) * ALIGN
            return in_slot

        def put(block: int, slot: int) -> None:
            for rank, offset in enumerate(offsets(block)):
                if rank != self._rank:
                    piece = pieces[rank][block]
                    self._slot_view(self._rank, piece, slot, offset).copy_(piece)

        def take(block: int, slot: int) -> None:
            parts = self._all_slot_views(results[block], slot, offsets(block)[self._rank])
            parts[self._rank] = pieces[self._rank][block]
            combine(parts, results[block], op, self._scratch)

        self._pipeline.exchange(blocks, put, take)

    def _reduce_whole(self, flat: Tensor, op: ReduceOp) -> TrafficBytes:
        """Reduce the whole vector on every rank, in one exchange; for two ranks and small n."""
        pieces = self._blocks(flat)

        def put(block: int, slot: int) -> None:
            self._own_slot_view(pieces[block], slot).copy_(pieces[block])

        def take(block: int, slot: int) -> None:
            own_piece, parts = pieces[block], self._all_slot_views(pieces[block], slot)
            if self._rank < _IN_PLACE:
                parts[self._rank] = own_piece
            combine(parts, own_piece, op, self._scratch)

        self._pipeline.exchange(len(pieces), put, take)
        return flat.nbytes * len(self._others), flat.nbytes * len(self._others)

    def _reduce_in_chunks(self, flat: Tensor, op: ReduceOp) -> int:
        """Reduce chunk r of every block on rank r; return the bytes of this rank's chunks."""
        rank, world = self._rank, self._world
        blocks = self._block_lengths(flat)
        bounds = [self._chunks(length) for length in blocks]
        pieces = torch.split_with_sizes(flat, [b - a for block in bounds for a, b in block])

        def put(block: int, slot: int) -> None:
            for to in self._others:
                piece = pieces[block * world + to]
                self._slot_view(rank, piece, slot, bounds[block][to][0]).copy_(piece)

        def reduce(block: int, slot: int) -> None:
            own_piece = pieces[block * world + rank]
            parts = self._all_slot_views(own_piece, slot, bounds[block][rank][0])
            result, parts[rank] = parts[rank], own_piece
            target, copy = (own_piece, result) if rank < _IN_PLACE else (result, own_piece)
            combine(parts, target, op, self._scratch)
            copy.copy_(target)

        def take(block: int, slot: int) -> None:
            for source in self._others:
                piece = pieces[block * world + source]
                piece.copy_(self._slot_view(source, piece, slot, bounds[block][source][0]))

        self._pipeline.exchange_twice(len(blocks), put, reduce, take)
        return sum(pieces[block * world + rank].nbytes for block in range(len(blocks)))

    def _reduce_shared_chunk(
        self, flat: Tensor, bounds: list[tuple[int, int]], op: ReduceOp
    ) -> None:
        """Reduce this rank's chunk of all shared vectors, and write the result to all of them."""
        first, last = bounds[self._rank]
        if first == last:
            return
        vectors = self.vectors.views(flat[first:last])
        size = _CACHED_BYTES // flat.itemsize
        # Only this rank accesses the chunk in any vector, so the first vector can hold the sum.
        for parts in zip(*(split_by_length(vector, size) for vector in vectors), strict=True):
            combine(parts, parts[0], op, self._scratch)
            for part in parts[1:]:
                part.copy_(parts[0])

    def _reduce_scatter_shared(self, own_input: Tensor, output: Tensor, op: ReduceOp) -> None:
        if own_input.numel():
            self._combine_in_pieces(self.vectors.views(own_input), output, op)

    def _combine_in_pieces(self, vectors: Sequence[Tensor], output: Tensor, op: ReduceOp) -> None:
        size = _CACHED_BYTES // output.itemsize
        pieces = [split_by_length(vector, size) for vector in (output, *vectors)]
        for out, *parts in zip(*pieces, strict=True):
            combine(parts, out, op, self._scratch)

    def _chunks(self, length: int) -> list[tuple[int, int]]:
        return split_evenly(length, self._world, align=ALIGN)

    def _block_lengths(self, flat: Tensor) -> list[int]:
        """Return the lengths of a vector's blocks; an empty vector is one block."""
        size = self._segment.layout.slot_bytes // flat.itemsize // ALIGN * ALIGN
        whole, rest = divmod(flat.numel(), size)
        return [size] * whole + ([rest] if rest or not whole else [])

    def _blocks(self, flat: Tensor) -> Sequence[Tensor]:
        return torch.split_with_sizes(flat, self._block_lengths(flat))

    def _own_slot_view(self, piece: Tensor, slot: int) -> Tensor:
        return self._slot_view(self._rank, piece, slot)

    def _all_slot_views(self, piece: Tensor, slot: int, start: int = 0) -> list[Tensor]:
        """Return views like `piece` of all ranks' slots, in rank order."""
        return [self._slot_view(rank, piece, slot, start) for rank in range(self._world)]

    def _slot_view(self, rank: int, piece: Tensor, slot: int, start: int = 0) -> Tensor:
        """Return a view of a rank's slot from element `start`, with the length of `piece`."""
        key = (piece.dtype, slot, rank, start, piece.numel())
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MAX_CACHED_VIEWS:
                self._views.clear()
            view = self._segment.slots(piece.dtype)[slot][rank][start : start + piece.numel()]
            self._views[key] = view
        return view
