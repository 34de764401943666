"""Faults between ranks that share memory: mismatches, late and lost ranks, abort, close."""

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shm_ranks import on_shm_ranks

from distplat.actors.collectives.rendezvous import GroupSettings
from distplat.actors.collectives.shm.shm_group import ShmGroup
from distplat.platform.errors import CollectiveError, MismatchError
from distplat.strategies.collective import ReduceOp

SHORT_S = 0.4
"""Deadline of operations that should time out, seconds."""
LIMIT_S = 60.0
LONG_S = 1000.0
"""Deadline that must not expire: longer than the timeout of `on_ranks`."""

Body = Callable[[ShmGroup], None]


def errors_of(world: int, body: Body, operation_s: float = LONG_S) -> list[CollectiveError | None]:
    """Return the error of each rank."""

    def catch(group: ShmGroup) -> CollectiveError | None:
        try:
            body(group)
        except CollectiveError as error:
            return error
        return None

    return on_shm_ranks(world, catch, operation_s=operation_s)


def assert_mismatch(rank_1: Body, other_ranks: Body, texts: list[str], world: int = 3) -> None:
    """Assert that all ranks' errors name rank 1, which runs another body, and contain the texts."""
    errors = errors_of(world, lambda group: (rank_1 if group.rank == 1 else other_ranks)(group))
    for error in errors:
        assert isinstance(error, MismatchError)
        assert error.missing == (1,)
        for text in texts:
            assert text in str(error)


def signal_wait(group: ShmGroup, waiting: threading.Event) -> None:
    """Set the event once a wait of this rank, from now on, has lasted for a time slice."""
    check = group._liveness._check_peers

    def signal_and_check(*args: Any) -> None:
        waiting.set()
        check(*args)

    group._liveness._check_peers = signal_and_check  # type: ignore[method-assign,assignment]


def stop_in_wait(group: ShmGroup, stop: Callable[[], None]) -> None:
    """Call `stop` in a thread once a wait of this rank has lasted for a time slice."""
    waiting = threading.Event()
    signal_wait(group, waiting)

    def wait_and_stop() -> None:
        assert waiting.wait(LIMIT_S)
        stop()

    threading.Thread(target=wait_and_stop, daemon=True).start()


def test_mismatch_of_operations() -> None:
    assert_mismatch(
        lambda g: g.broadcast(torch.ones(7), 2),
        lambda g: g.all_reduce(torch.ones(5000), ReduceOp.MAX),
        ["ranks 0, 2 in all_reduce of 5000 float32 by MAX", "rank 1 in broadcast of 7 float"],
    )


def test_mismatch_of_lengths() -> None:
    assert_mismatch(
        lambda g: g.all_reduce(torch.ones(3_000_000)),
        lambda g: g.all_reduce(torch.ones(5)),
        ["of 3000000 float32", "of 5 float32"],
    )


def test_mismatch_of_dtypes() -> None:
    assert_mismatch(
        lambda g: g.all_reduce(torch.ones(8, dtype=torch.int32)),
        lambda g: g.all_reduce(torch.ones(8)),
        ["of 8 int32", "of 8 float32"],
    )


def test_mismatch_of_roots() -> None:
    assert_mismatch(
        lambda g: g.broadcast(torch.ones(8), 1),
        lambda g: g.broadcast(torch.ones(8), 0),
        ["from rank 1", "from rank 0"],
    )


def test_mismatch_of_number_of_operations() -> None:
    def rank_1(group: ShmGroup) -> None:
        group.barrier()
        group.all_reduce(torch.ones(3))

    def other_ranks(group: ShmGroup) -> None:
        group.all_reduce(torch.ones(3))
        group.all_reduce(torch.ones(3))

    assert_mismatch(
        rank_1, other_ranks, ["ranks 0, 2 in all_reduce of 3 float32", "rank 1 in barrier"]
    )


def test_mismatch_of_uneven_parts() -> None:
    def gather(group: ShmGroup, sizes: list[int]) -> None:
        outputs = [torch.zeros(size) for size in sizes]
        group.all_gather(outputs, torch.ones(sizes[group.rank]))

    assert_mismatch(
        lambda g: gather(g, [3, 4, 9]),
        lambda g: gather(g, [3, 4, 5]),
        ["sizes of the ranks' parts"],
    )


def test_mismatch_of_plain_and_shared_vector() -> None:
    def body(group: ShmGroup, is_plain: bool) -> None:
        vector = group.share(torch.zeros(5000))
        group.all_reduce(torch.zeros(5000) if is_plain else vector)

    assert_mismatch(
        lambda g: body(g, True), lambda g: body(g, False), ["in shared vector 0 from byte 0"]
    )


def test_mismatch_of_parts_of_shared_vector() -> None:
    def body(group: ShmGroup, start: int) -> None:
        group.all_reduce(group.share(torch.zeros(5000))[start : start + 2000])

    assert_mismatch(
        lambda g: body(g, 100), lambda g: body(g, 200), ["from byte 400", "from byte 800"]
    )


def test_mismatch_of_positions_in_shared_vector() -> None:
    def body(group: ShmGroup, start: int) -> None:
        vector = group.share(torch.zeros(500))
        parts = [vector[:10], vector[start : start + 10], vector[400:]]
        group.reduce_scatter(parts[group.rank], parts)

    assert_mismatch(lambda g: body(g, 10), lambda g: body(g, 20), ["sizes of the ranks' parts"])


def test_late_rank_is_named_after_the_deadline() -> None:
    def body(group: ShmGroup) -> None:
        for _ in range(3):
            group.all_reduce(torch.ones(5000))
        if group.rank != 1:
            settings = GroupSettings(SHORT_S, setting="strategy.timeout_s")
            group._liveness._settings = settings
            began = time.monotonic()
            try:
                group.all_reduce(torch.ones(5000))
            finally:
                assert time.monotonic() - began >= SHORT_S

    errors = errors_of(3, body)
    assert errors[1] is None
    for error in (errors[0], errors[2]):
        assert isinstance(error, CollectiveError)
        assert (error.operation, error.number, error.missing) == ("all_reduce", 3, (1,))
        assert "deadline 0.4 s (`strategy.timeout_s` changes it)" in str(error)


def test_all_late_ranks_are_named() -> None:
    errors = errors_of(4, lambda g: g.barrier() if g.rank == 2 else None, SHORT_S)
    assert errors[2] is not None and errors[2].missing == (0, 1, 3)


def test_rank_that_leaves_is_named_at_once() -> None:
    waiting = {rank: threading.Event() for rank in (0, 2)}

    def body(group: ShmGroup) -> None:
        group.barrier()
        if group.rank == 1:
            assert all(event.wait(LIMIT_S) for event in waiting.values())
            group.close()
        else:
            signal_wait(group, waiting[group.rank])
            group.all_reduce(torch.ones(100_000))

    errors = errors_of(3, body)
    for rank in (0, 2):
        error = errors[rank]
        assert error is not None and error.missing == (1,) and "left" in error.cause


def test_operations_before_close_are_completed() -> None:
    closing_or_closed = threading.Event()

    def body(group: ShmGroup) -> list[float]:
        tensor = torch.ones(3)
        group.all_reduce(tensor)
        if group.rank == 0:
            group.send(torch.full((1,), 9.0), 1)
            signal_wait(group, closing_or_closed)
            group.close()
            closing_or_closed.set()
        else:
            assert closing_or_closed.wait(LIMIT_S)
            group.recv(tensor[2:], 0)
        return tensor.tolist()

    assert on_shm_ranks(2, body) == [[2.0, 2.0, 2.0], [2.0, 2.0, 9.0]]


@pytest.mark.parametrize("by_settings", [False, True])
def test_abort_ends_wait_of_this_rank(by_settings: bool) -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            stop = group.settings.abandoned.set if by_settings else group.abort
            stop_in_wait(group, stop)
            group.barrier()

    errors = errors_of(2, body)
    assert errors[0] is not None and "told to give up" in errors[0].cause and errors[1] is None


def test_abort_ends_pending_operations() -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            tensors = [torch.ones(3) for _ in range(3)]
            stop_in_wait(group, group.abort)
            handles = [group.start_all_reduce(tensor) for tensor in tensors]
            for handle in handles:
                with pytest.raises(CollectiveError, match="told to give up"):
                    handle.wait()
            with pytest.raises(CollectiveError, match="told to give up"):
                group.recv(torch.ones(3), 1)

    on_shm_ranks(2, body, operation_s=LONG_S)


def test_operations_after_failure_fail_with_the_same_rank() -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            for _ in range(2):
                with pytest.raises(CollectiveError) as caught:
                    group.all_reduce(torch.ones(3))
                assert caught.value.missing == (1,)
            assert "the group failed before, in all_reduce #0" in str(caught.value)

    on_shm_ranks(2, body, operation_s=SHORT_S)


def test_failed_rank_fails_the_other_ranks() -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            group.recv(torch.ones(3), 2)  # rank 2 sends four elements
        elif group.rank == 1:
            group.barrier()
        else:
            group.send(torch.ones(4), 0)

    errors = errors_of(3, body)
    assert isinstance(errors[0], MismatchError) and errors[2] is None
    assert errors[1] is not None and errors[1].missing == (0,)


@pytest.mark.parametrize(
    ("tensor", "error"),
    [(torch.ones(3, dtype=torch.complex64), TypeError), (torch.ones(4, 4).t(), ValueError)],
)
def test_unsupported_tensor_is_rejected_without_effect(
    tensor: torch.Tensor, error: type[Exception]
) -> None:
    def body(group: ShmGroup) -> None:
        with pytest.raises(error):
            group.all_reduce(tensor.clone() if error is TypeError else tensor)
        group.barrier()

    on_shm_ranks(2, body)


def test_rejects_parts_of_wrong_size() -> None:
    def body(group: ShmGroup) -> None:
        with pytest.raises(ValueError, match="one part per rank"):
            group.all_gather([torch.ones(3)], torch.ones(3))
        with pytest.raises(ValueError, match="of equal size"):
            group.reduce_scatter(torch.ones(2), [torch.ones(3), torch.ones(3)])
        group.barrier()

    on_shm_ranks(2, body)


def count_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:distplat")


def test_close_releases_mappings_descriptors_and_threads() -> None:
    def body(group: ShmGroup) -> None:
        vector = group.share(torch.ones(1000))
        group.start_all_reduce(vector).wait()
        group.all_reduce(torch.ones(100_000))
        partner = 1 - group.rank
        group.send(torch.ones(5), partner)
        group.recv(torch.ones(5), partner)
        group.barrier()
        group.close()

    def state() -> tuple[int, int, int]:
        return count_mappings(), len(os.listdir("/proc/self/fd")), threading.active_count()

    def leaks() -> list[tuple[int, int]]:
        """Return counts that grew with each group; earlier tests may open a few files."""
        return [(old, new) for old, new in zip(before, state(), strict=True) if new - old >= groups]

    gc.collect()  # mappings of failed groups in earlier tests
    before, groups = state(), 10
    for _ in range(groups):
        on_shm_ranks(2, body)
    deadline = time.monotonic() + 5
    while leaks() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not leaks()
