"""Checks of `Collective`: uneven parts, parts of one vector, shared vectors, and traffic."""

from dataclasses import replace

import torch
from contract_values import all_parts, part_of, reduce_parts
from torch import Tensor

from distplat.strategies.collective import Collective, ReduceOp


def uneven(group: Collective) -> list[int]:
    """Return the sizes of the ranks' parts; the part of rank 1 is empty."""
    return [(rank * 7 + 5) % (4 * group.world) if rank != 1 else 0 for rank in range(group.world)]


def check_uneven_reduce_scatter(group: Collective) -> None:
    """Outputs may have different sizes, or be empty."""
    sizes = uneven(group)
    inputs = [part_of(group.rank + 2 * to, (size,)) for to, size in enumerate(sizes)]
    output = torch.zeros(sizes[group.rank])
    group.reduce_scatter(output, inputs)
    parts = [part_of(r + 2 * group.rank, (sizes[group.rank],)) for r in range(group.world)]
    assert torch.equal(output, reduce_parts(parts, ReduceOp.SUM))


def check_uneven_all_gather(group: Collective) -> None:
    """Inputs may have different sizes, or be empty."""
    sizes = uneven(group)
    outputs = [torch.zeros(size) for size in sizes]
    group.all_gather(outputs, part_of(group.rank, (sizes[group.rank],)))
    assert all(torch.equal(t, part_of(r, (sizes[r],))) for r, t in enumerate(outputs))


def check_parts_of_one_vector(group: Collective) -> None:
    """Reduce-scatter into the rank's part of a vector, then all-gather, equals all-reduce."""
    _scatter_and_gather(group, torch.zeros(sum(uneven(group))))


def _scatter_and_gather(group: Collective, vector: Tensor) -> None:
    vector.copy_(part_of(group.rank, (vector.numel(),)))
    parts = list(torch.split_with_sizes(vector, uneven(group)))
    group.reduce_scatter(parts[group.rank], parts)
    group.all_gather(parts, parts[group.rank])
    expected = reduce_parts(all_parts(group, (vector.numel(),), torch.float32), ReduceOp.SUM)
    assert torch.equal(vector, expected)


def check_shared_vector(group: Collective) -> None:
    """A shared vector is zero-filled, and every operation works on it as on other tensors."""
    shared = group.share(torch.ones(4, 5))
    assert shared.shape == (4, 5) and shared.eq(0).all()
    assert shared.dtype is torch.float32 and shared.is_contiguous()
    vector = shared.view(-1)
    for op in (ReduceOp.SUM, ReduceOp.AVG, ReduceOp.MAX):
        vector.copy_(part_of(group.rank, (20,)))
        group.all_reduce(shared, op)
        expected = reduce_parts(all_parts(group, (20,), torch.float32), op)
        torch.testing.assert_close(vector, expected)
    vector.fill_(-1.0)
    vector[3:10] = part_of(group.rank)
    group.start_all_reduce(vector[3:10]).wait()
    assert torch.equal(
        vector[3:10], reduce_parts(all_parts(group, (7,), torch.float32), ReduceOp.SUM)
    )
    assert vector[:3].eq(-1).all() and vector[10:].eq(-1).all()
    vector.copy_(part_of(group.rank, (20,)))
    group.broadcast(vector, 1)
    assert torch.equal(vector, part_of(1, (20,)))
    _scatter_and_gather(group, group.share(torch.zeros(sum(uneven(group)))))


def check_traffic(group: Collective) -> None:
    """Operations increase the traffic counters."""
    before = replace(group.traffic)
    group.all_reduce(torch.ones(4096))
    after = group.traffic
    assert after.sent_bytes > before.sent_bytes
    assert after.received_bytes > before.received_bytes
    assert after.waiting_s >= before.waiting_s and after.working_s >= before.working_s


PART_CHECKS = {
    "uneven_reduce_scatter": check_uneven_reduce_scatter,
    "uneven_all_gather": check_uneven_all_gather,
    "parts_of_one_vector": check_parts_of_one_vector,
    "shared_vector": check_shared_vector,
    "traffic": check_traffic,
}
