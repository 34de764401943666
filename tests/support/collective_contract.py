"""
The contract of `Collective`, as checks that every rank of a group calls with its own end of it.

The same list is held against the fake in memory and against the backend over Ray, so that what a
strategy is tested with is what it will meet. Values are small whole numbers: sums are exact
whatever the order in which a backend adds.

`CHECKS` leave the group fit for more; each of `FAILURES` breaks it, and wants a group of its own
with a short deadline.
"""

from collections.abc import Callable
from functools import partial

import torch
from contract_parts import PART_CHECKS
from contract_values import all_parts, combined, kinds
from contract_values import part_of as part_of

from distplat.platform.errors import CollectiveError
from distplat.strategies.collective import Collective, ReduceOp

Check = Callable[[Collective], None]


def check_place(group: Collective) -> None:
    """Ranks are numbered from 0, each once."""
    everybody = [torch.zeros(1) for _ in range(group.world)]
    group.all_gather(everybody, torch.tensor([float(group.rank)]))
    assert [int(t) for t in everybody] == list(range(group.world))


def check_all_reduce(group: Collective, op: ReduceOp) -> None:
    """Every rank ends with the combination, in its own tensor."""
    for shape, dtype in kinds(op):
        tensor = part_of(group.rank, shape, dtype)
        group.all_reduce(tensor, op)
        torch.testing.assert_close(tensor, combined(all_parts(group, shape, dtype), op))


def check_all_reduce_same_bits(group: Collective) -> None:
    """Fractions round; yet all ranks must end with the same bits, or their models drift apart."""
    tensor = torch.linspace(0.1, 1.7, 1000) / (group.rank + 3)
    group.all_reduce(tensor)
    everybody = [torch.empty_like(tensor) for _ in range(group.world)]
    group.all_gather(everybody, tensor)
    assert all(torch.equal(everybody[0], other) for other in everybody)


def check_all_reduce_of_a_view(group: Collective) -> None:
    """A run of a longer vector is reduced in place, and its neighbours stay as they are."""
    vector = torch.full((12,), -1.0)
    vector[3:10] = part_of(group.rank)
    group.all_reduce(vector[3:10])
    assert torch.equal(vector[3:10], combined(all_parts(group, (7,), torch.float32), ReduceOp.SUM))
    assert vector[:3].eq(-1).all() and vector[10:].eq(-1).all()


def check_start_all_reduce(group: Collective, op: ReduceOp) -> None:
    """Two may be under way; each result is there once its handle is done."""
    first, second = part_of(group.rank), part_of(group.rank + 1)
    handles = [group.start_all_reduce(first, op), group.start_all_reduce(second, op)]
    for handle in handles:
        handle.wait()
    parts = [part_of(rank) for rank in range(group.world + 1)]
    torch.testing.assert_close(first, combined(parts[:-1], op))
    torch.testing.assert_close(second, combined(parts[1:], op))


def check_starts_that_do_not_wait(group: Collective) -> None:
    """Where the group says that a start waits for nobody, rank 1 may need what comes behind it."""
    for _ in range(30):
        if group.start_waits:  # at the same place on all ranks
            group.all_reduce(torch.ones(1))
    assert not group.start_waits
    tensor, news = part_of(group.rank), torch.zeros(7)
    if group.rank == 1:
        group.recv(news, 0)
    handle = group.start_all_reduce(tensor)
    if group.rank == 0:
        group.send(news, 1)
    handle.wait()
    assert torch.equal(tensor, combined(all_parts(group, (7,), torch.float32), ReduceOp.SUM))


def check_reduce_scatter(group: Collective, op: ReduceOp) -> None:
    """Rank r ends with the combination of everybody's r-th input; inputs stay as they are."""
    for shape, dtype in kinds(op):
        inputs = [part_of(group.rank + 2 * to, shape, dtype) for to in range(group.world)]
        kept = [t.clone() for t in inputs]
        output = torch.zeros(shape, dtype=dtype)
        group.reduce_scatter(output, inputs, op)
        parts = [part_of(r + 2 * group.rank, shape, dtype) for r in range(group.world)]
        torch.testing.assert_close(output, combined(parts, op))
        assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


def check_all_gather(group: Collective) -> None:
    """Every rank ends with everybody's tensor, in rank order."""
    for shape, dtype in kinds(ReduceOp.SUM):
        outputs = [torch.zeros(shape, dtype=dtype) for _ in range(group.world)]
        group.all_gather(outputs, part_of(group.rank, shape, dtype))
        expected = all_parts(group, shape, dtype)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def check_broadcast(group: Collective) -> None:
    """Every rank may be the source."""
    for source in range(group.world):
        for shape, dtype in kinds(ReduceOp.SUM):
            tensor = part_of(group.rank, shape, dtype)
            group.broadcast(tensor, source)
            assert torch.equal(tensor, part_of(source, shape, dtype))


def check_send_recv(group: Collective) -> None:
    """Messages of one sender come in order; even ranks send first, odd ranks receive first."""
    partner = group.rank ^ 1
    if partner < group.world:
        for number in range(3):
            arriving = torch.zeros(7)
            turns = [
                partial(group.send, part_of(group.rank + number), partner),
                partial(group.recv, arriving, partner),
            ]
            for turn in turns if group.rank % 2 == 0 else reversed(turns):
                turn()
            assert torch.equal(arriving, part_of(partner + number))
    group.barrier()


def check_started_sends(group: Collective) -> None:
    """Both sides of a pair begin to send before either receives; nobody stands still."""
    partner = group.rank ^ 1
    if partner < group.world:
        for number in range(3):
            mine, arriving = part_of(group.rank + number), torch.zeros(7)
            pending = group.start_send(mine, partner)
            group.recv(arriving, partner)
            pending.wait()
            assert torch.equal(arriving, part_of(partner + number))
    group.barrier()


def check_sent_is_a_copy(group: Collective) -> None:
    """Once `send` returned, the sender may write into its tensor."""
    tensor = part_of(0)
    if group.rank == 0:
        group.send(tensor, 1)
        tensor.fill_(-1)
    elif group.rank == 1:
        group.recv(tensor.zero_(), 0)
        assert torch.equal(tensor, part_of(0))
    group.barrier()


def check_disjoint_subgroups(group: Collective) -> None:
    """Evens and odds reduce apart from each other, at the same time, and then all together."""
    mine = list(range(group.rank % 2, group.world, 2))
    small = group.subgroup(f"parity-{group.rank % 2}", mine)
    assert (small.rank, small.world) == (mine.index(group.rank), len(mine))
    tensor = part_of(group.rank)
    small.all_reduce(tensor)
    assert torch.equal(tensor, combined([part_of(r) for r in mine], ReduceOp.SUM))
    tensor = part_of(group.rank)
    group.all_reduce(tensor)
    assert torch.equal(tensor, combined([part_of(r) for r in range(group.world)], ReduceOp.SUM))


def check_overlapping_subgroups(group: Collective) -> None:
    """A rank may be in several groups; in one with its ranks turned round it has another place."""
    everyone = list(range(group.world))
    turned = group.subgroup("turned", everyone[::-1])
    assert turned.rank == group.world - 1 - group.rank
    tensor = part_of(group.rank)
    turned.broadcast(tensor, 0)
    assert torch.equal(tensor, part_of(group.world - 1))
    for left in everyone[:-1]:  # 0-1, 1-2, 2-3 ...: neighbours share a rank
        pair = [left, left + 1]
        if group.rank in pair:
            small = group.subgroup(f"pair-{left}", pair)
            tensor = part_of(group.rank)
            small.all_reduce(tensor, ReduceOp.MAX)
            assert torch.equal(tensor, combined([part_of(r) for r in pair], ReduceOp.MAX))
    group.barrier()


def check_late_rank_is_named(group: Collective) -> None:
    """The last rank never comes to an operation: who waits for it gets its name."""
    last = group.world - 1
    if group.rank != last:
        _expect_missing(partial(group.all_reduce, part_of(group.rank)), last)


def check_late_rank_is_named_by_its_place(group: Collective) -> None:
    """In a sub-group, missing ranks are places in the sub-group, as in all its calls."""
    pair = group.subgroup("pair", [1, 0]) if group.rank in (0, 1) else None
    if group.rank == 1 and pair is not None:
        _expect_missing(partial(pair.all_reduce, part_of(0)), 1)


def _expect_missing(operation: Callable[[], None], place: int) -> None:
    try:
        operation()
    except CollectiveError as error:
        assert error.missing == (place,), error
        assert error.operation == "all_reduce"
    else:
        raise AssertionError("the operation ended without a rank of the group")


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
"""By name; every rank of a group of at least two calls them in this order or any other."""

FAILURES: dict[str, Check] = {
    "late_rank": check_late_rank_is_named,
    "late_rank_of_subgroup": check_late_rank_is_named_by_its_place,
}
"""By name; each on a group of its own, of at least two ranks, with a short deadline."""
