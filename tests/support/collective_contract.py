"""
The contract of `Collective`, as checks that every rank of a group calls.

The in-memory fake and the backends over Ray run the same checks, so that strategies can be tested
with the fake. Values are small integers: sums are exact in any order.

After `CHECKS` the group is still usable; each of `FAILURES` breaks it, and needs a separate group
with a short deadline.
"""

from collections.abc import Callable
from functools import partial

import torch
from contract_parts import PART_CHECKS
from contract_values import all_parts, reduce_parts, shapes_and_dtypes
from contract_values import part_of as part_of

from distplat.platform.errors import CollectiveError
from distplat.strategies.collective import Collective, ReduceOp

Check = Callable[[Collective], None]


def check_place(group: Collective) -> None:
    """Ranks are numbered from 0, each number once."""
    ranks = [torch.zeros(1) for _ in range(group.world)]
    group.all_gather(ranks, torch.tensor([float(group.rank)]))
    assert [int(t) for t in ranks] == list(range(group.world))


def check_all_reduce(group: Collective, op: ReduceOp) -> None:
    """Every rank has the result in its own tensor."""
    for shape, dtype in shapes_and_dtypes(op):
        tensor = part_of(group.rank, shape, dtype)
        group.all_reduce(tensor, op)
        torch.testing.assert_close(tensor, reduce_parts(all_parts(group, shape, dtype), op))


def check_all_reduce_same_bits(group: Collective) -> None:
    """Rounded results are bitwise equal on all ranks, or the ranks' models would diverge."""
    tensor = torch.linspace(0.1, 1.7, 1000) / (group.rank + 3)
    group.all_reduce(tensor)
    results = [torch.empty_like(tensor) for _ in range(group.world)]
    group.all_gather(results, tensor)
    assert all(torch.equal(results[0], result) for result in results)


def check_all_reduce_of_a_view(group: Collective) -> None:
    """A slice of a longer vector is reduced in place, and the rest does not change."""
    vector = torch.full((12,), -1.0)
    vector[3:10] = part_of(group.rank)
    group.all_reduce(vector[3:10])
    assert torch.equal(
        vector[3:10], reduce_parts(all_parts(group, (7,), torch.float32), ReduceOp.SUM)
    )
    assert vector[:3].eq(-1).all() and vector[10:].eq(-1).all()


def check_start_all_reduce(group: Collective, op: ReduceOp) -> None:
    """Two operations may be pending; each result is complete once its handle is done."""
    first, second = part_of(group.rank), part_of(group.rank + 1)
    handles = [group.start_all_reduce(first, op), group.start_all_reduce(second, op)]
    for handle in handles:
        handle.wait()
    parts = [part_of(rank) for rank in range(group.world + 1)]
    torch.testing.assert_close(first, reduce_parts(parts[:-1], op))
    torch.testing.assert_close(second, reduce_parts(parts[1:], op))


def check_starts_that_do_not_wait(group: Collective) -> None:
    """Unless `start_waits`, a rank may send after a start, before the other ranks start."""
    for _ in range(30):
        if group.start_waits:  # equal on all ranks here
            group.all_reduce(torch.ones(1))
    assert not group.start_waits
    tensor, message = part_of(group.rank), torch.zeros(7)
    if group.rank == 1:
        group.recv(message, 0)
    handle = group.start_all_reduce(tensor)
    if group.rank == 0:
        group.send(message, 1)
    handle.wait()
    assert torch.equal(tensor, reduce_parts(all_parts(group, (7,), torch.float32), ReduceOp.SUM))


def check_reduce_scatter(group: Collective, op: ReduceOp) -> None:
    """Rank r has the reduction of all r-th inputs; inputs do not change."""
    for shape, dtype in shapes_and_dtypes(op):
        inputs = [part_of(group.rank + 2 * to, shape, dtype) for to in range(group.world)]
        copies = [t.clone() for t in inputs]
        output = torch.zeros(shape, dtype=dtype)
        group.reduce_scatter(output, inputs, op)
        parts = [part_of(r + 2 * group.rank, shape, dtype) for r in range(group.world)]
        torch.testing.assert_close(output, reduce_parts(parts, op))
        assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def check_all_gather(group: Collective) -> None:
    """Every rank has the tensors of all ranks, in rank order."""
    for shape, dtype in shapes_and_dtypes(ReduceOp.SUM):
        outputs = [torch.zeros(shape, dtype=dtype) for _ in range(group.world)]
        group.all_gather(outputs, part_of(group.rank, shape, dtype))
        expected = all_parts(group, shape, dtype)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def check_broadcast(group: Collective) -> None:
    """Every rank may be the source."""
    for source in range(group.world):
        for shape, dtype in shapes_and_dtypes(ReduceOp.SUM):
            tensor = part_of(group.rank, shape, dtype)
            group.broadcast(tensor, source)
            assert torch.equal(tensor, part_of(source, shape, dtype))


def check_send_recv(group: Collective) -> None:
    """Messages of a sender arrive in order; even ranks send first, odd ranks receive first."""
    partner = group.rank ^ 1
    if partner < group.world:
        for number in range(3):
            received = torch.zeros(7)
            operations = [
                partial(group.send, part_of(group.rank + number), partner),
                partial(group.recv, received, partner),
            ]
            for operation in operations if group.rank % 2 == 0 else reversed(operations):
                operation()
            assert torch.equal(received, part_of(partner + number))
    group.barrier()


def check_started_sends(group: Collective) -> None:
    """Both ranks of a pair may start to send before either receives, without a deadlock."""
    partner = group.rank ^ 1
    if partner < group.world:
        for number in range(3):
            sent, received = part_of(group.rank + number), torch.zeros(7)
            handle = group.start_send(sent, partner)
            group.recv(received, partner)
            handle.wait()
            assert torch.equal(received, part_of(partner + number))
    group.barrier()


def check_sent_is_a_copy(group: Collective) -> None:
    """After `send` returns, the sender may write to its tensor."""
    tensor = part_of(0)
    if group.rank == 0:
        group.send(tensor, 1)
        tensor.fill_(-1)
    elif group.rank == 1:
        group.recv(tensor.zero_(), 0)
        assert torch.equal(tensor, part_of(0))
    group.barrier()


def check_disjoint_subgroups(group: Collective) -> None:
    """Even and odd ranks reduce separately at the same time, and then all ranks together."""
    ranks = list(range(group.rank % 2, group.world, 2))
    subgroup = group.subgroup(f"parity-{group.rank % 2}", ranks)
    assert (subgroup.rank, subgroup.world) == (ranks.index(group.rank), len(ranks))
    tensor = part_of(group.rank)
    subgroup.all_reduce(tensor)
    assert torch.equal(tensor, reduce_parts([part_of(r) for r in ranks], ReduceOp.SUM))
    tensor = part_of(group.rank)
    group.all_reduce(tensor)
    assert torch.equal(tensor, reduce_parts([part_of(r) for r in range(group.world)], ReduceOp.SUM))


def check_overlapping_subgroups(group: Collective) -> None:
    """A rank may be in several groups; a sub-group of all ranks may have another rank order."""
    ranks = list(range(group.world))
    reverse = group.subgroup("reversed", ranks[::-1])
    assert reverse.rank == group.world - 1 - group.rank
    tensor = part_of(group.rank)
    reverse.broadcast(tensor, 0)
    assert torch.equal(tensor, part_of(group.world - 1))
    for left in ranks[:-1]:  # 0-1, 1-2, 2-3 ...: neighbours share a rank
        pair = [left, left + 1]
        if group.rank in pair:
            subgroup = group.subgroup(f"pair-{left}", pair)
            tensor = part_of(group.rank)
            subgroup.all_reduce(tensor, ReduceOp.MAX)
            assert torch.equal(tensor, reduce_parts([part_of(r) for r in pair], ReduceOp.MAX))
    group.barrier()


def check_late_rank_is_named(group: Collective) -> None:
    """The last rank never calls an operation: the errors of the waiting ranks name it."""
    last = group.world - 1
    if group.rank != last:
        _expect_missing(partial(group.all_reduce, part_of(group.rank)), last)


def check_late_rank_is_named_by_its_place(group: Collective) -> None:
    """Errors of a sub-group name missing ranks by their ranks in the sub-group."""
    pair = group.subgroup("pair", [1, 0]) if group.rank in (0, 1) else None
    if group.rank == 1 and pair is not None:
        _expect_missing(partial(pair.all_reduce, part_of(0)), 1)


def _expect_missing(operation: Callable[[], None], rank: int) -> None:
    try:
        operation()
    except CollectiveError as error:
        assert error.missing == (rank,), error
        assert error.operation == "all_reduce"
    else:
        raise AssertionError("the operation completed without a rank of the group")


CHECKS: dict[str, Check] = {
    "place": check_place,
    **{f"all_reduce-{op}": partial(check_all_reduce, op=op) for op in ReduceOp},
    "all_reduce-same-bits": check_all_reduce_same_bits,
    "all_reduce-view": check_all_reduce_of_a_view,
    **{f"start_all_reduce-{op}": partial(check_start_all_reduce, op=op) for op in ReduceOp},
    "starts_that_do_not_wait": check_starts_that_do_not_wait,
    **{f"reduce_scatter-{op}": partial(check_reduce_scatter, op=op) for op in ReduceOp},
    "all_gather": check_all_gather,
    **PART_CHECKS,
    "broadcast": check_broadcast,
    "send_recv": check_send_recv,
    "started_sends": check_started_sends,
    "sent_is_a_copy": check_sent_is_a_copy,
    "disjoint_subgroups": check_disjoint_subgroups,
    "overlapping_subgroups": check_overlapping_subgroups,
}
"""Checks by name; all ranks of a group of at least two call them in the same order."""

FAILURES: dict[str, Check] = {
    "late_rank": check_late_rank_is_named,
    "late_rank_of_subgroup": check_late_rank_is_named_by_its_place,
}
"""Checks by name; each needs a separate group of at least two ranks, with a short deadline."""
