"""Messages through shared memory: in order, of any length, without waiting where there is room."""

import threading
import time

import pytest
import torch
from shm_ranks import on_shm_ranks

from distplat.actors.collectives.shm import p2p
from distplat.actors.collectives.shm.shm_group import ShmGroup
from distplat.platform.errors import CollectiveError, MismatchError

SOON = 0.4


def test_lengths_and_dtypes_may_change_from_message_to_message() -> None:
    lengths = [3, 0, 70_000, 5, 300_000, 1, 70_001]
    dtypes = [torch.float32, torch.int64, torch.bfloat16, torch.bool]

    def message(number: int) -> torch.Tensor:
        return torch.arange(lengths[number]).add(number).to(dtypes[number % len(dtypes)])

    def body(group: ShmGroup) -> None:
        for number in range(len(lengths)):
            if group.rank == 0:
                group.send(message(number), 1)
            else:
                arriving = torch.zeros_like(message(number))
                group.recv(arriving, 0)
                assert torch.equal(arriving, message(number))

    on_shm_ranks(2, body)


@pytest.mark.parametrize("length", [100_003, 9 * 2**20])
def test_both_send_before_they_receive_whatever_the_length(length: int) -> None:
    """As stages of a pipeline do: activations go one way while gradients come the other."""

    def body(group: ShmGroup) -> None:
        other = 1 - group.rank
        for number in range(2):
            sent = torch.arange(length) + number + group.rank
            group.send(sent, other)
            group.send(torch.ones(2), other)
            arriving, after = torch.zeros_like(sent), torch.zeros(2)
            group.recv(arriving, other)
            group.recv(after, other)
            assert torch.equal(arriving, sent - group.rank + other) and after.eq(1).all()

    on_shm_ranks(2, body)


def test_a_message_in_memory_that_is_another_by_now_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The descriptor's number may be used again: the inode tells."""
    read = p2p._P2PChannel.read_announcement

    def changed(channel: p2p._P2PChannel, number: int) -> object:
        (fd, size, inode), head = read(channel, number)
        return (fd, size, inode + 1), head

    monkeypatch.setattr(p2p._P2PChannel, "read_announcement", changed)

    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            group.send(torch.ones(4), 1)
            return
        with pytest.raises(CollectiveError, match="its message is gone"):
            group.recv(torch.zeros(4), 0)

    on_shm_ranks(2, body)


def test_two_messages_wait_for_nobody_and_the_third_does() -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            began = time.monotonic()
            group.send(torch.full((4,), 0.0), 1)
            group.send(torch.full((200_000,), 1.0), 1)  # the other slot, grown
            group.barrier()  # only then does the other receive
            group.send(torch.full((4,), 2.0), 1)
            assert time.monotonic() - began > 0.4
        else:
            group.barrier()
            time.sleep(0.4)
            for number, length in enumerate([4, 200_000, 4]):
                arriving = torch.zeros(length)
                group.recv(arriving, 0)
                assert arriving.eq(number).all()

    on_shm_ranks(2, body)


def test_both_ways_at_once_and_beside_collectives() -> None:
    def body(group: ShmGroup) -> None:
        partner = 1 - group.rank
        for number in range(20):
            handle = group.start_all_reduce(total := torch.full((10_000,), 1.0))
            group.send(torch.full((30_000,), float(group.rank + number)), partner)
            arriving = torch.zeros(30_000)
            group.recv(arriving, partner)
            handle.wait()
            assert arriving.eq(partner + number).all() and total.eq(2).all()

    on_shm_ranks(2, body)


def test_a_message_may_be_taken_before_an_operation_that_its_sender_is_in() -> None:
    """Messages have no place in the order of operations: here that order would stand still."""

    def body(group: ShmGroup) -> None:
        tensor = torch.ones(3)
        if group.rank == 0:
            handle = group.start_all_reduce(tensor)
            group.send(torch.ones(3), 1)
            handle.wait()
        else:
            group.recv(torch.zeros(3), 0)
            group.all_reduce(tensor)
        assert tensor.eq(2).all()

    on_shm_ranks(2, body)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [(torch.zeros(4), "4 float32"), (torch.zeros(3, dtype=torch.int32), "3 int32")],
)
def test_a_message_that_is_not_what_is_wanted(wanted: torch.Tensor, text: str) -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            group.send(torch.ones(3), 1)
            group.barrier()
        else:
            with pytest.raises(MismatchError) as caught:
                group.recv(wanted.clone(), 0)
            assert caught.value.missing == (0,)
            assert "3 float32" in str(caught.value) and text in str(caught.value)
            raise caught.value

    with pytest.raises(CollectiveError):
        on_shm_ranks(2, body)


@pytest.mark.parametrize("operation", ["send", "recv"])
def test_a_rank_that_does_not_answer_is_named(operation: str) -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            with pytest.raises(CollectiveError) as caught:
                for _ in range(3):
                    getattr(group, operation)(torch.ones(3), 2)
            assert (caught.value.operation, caught.value.missing) == (operation, (2,))

    on_shm_ranks(3, body, operation_s=SOON)


def test_who_leaves_sees_its_last_messages_taken() -> None:
    """Their memory is the sender's process's; however late they are read."""

    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            group.send(torch.full((4,), 3.0), 1)
            group.send(torch.full((200_000,), 4.0), 1)
        else:
            time.sleep(SOON)
            for number, length in ((3, 4), (4, 200_000)):
                arriving = torch.zeros(length)
                group.recv(arriving, 0)
                assert arriving.eq(number).all()
        group.close()

    on_shm_ranks(2, body)


def test_nobody_stays_for_who_has_left_or_is_late() -> None:
    left = threading.Event()

    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            group.send(torch.ones(3), 1)  # which leaves without having read it
            group.send(torch.ones(3), 2)  # which stays longer than the deadline
        if group.rank == 2:
            assert left.wait(60)
        group.close()
        if group.rank == 0:
            left.set()

    on_shm_ranks(3, body, operation_s=SOON)
