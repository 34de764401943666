"""Messages through shared memory: order, any length, blocking, faults."""

import threading
import time

import pytest
import torch
from shm_ranks import on_shm_ranks

from distplat.actors.collectives.shm import p2p
from distplat.actors.collectives.shm.shm_group import ShmGroup
from distplat.platform.errors import CollectiveError, MismatchError

SHORT_S = 0.4


def test_lengths_and_dtypes_may_change_between_messages() -> None:
    lengths = [3, 0, 70_000, 5, 300_000, 1, 70_001]
    dtypes = [torch.float32, torch.int64, torch.bfloat16, torch.bool]

    def message(number: int) -> torch.Tensor:
        return torch.arange(lengths[number]).add(number).to(dtypes[number % len(dtypes)])

    def body(group: ShmGroup) -> None:
        for number in range(len(lengths)):
            if group.rank == 0:
                group.send(message(number), 1)
            else:
                received = torch.zeros_like(message(number))
                group.recv(received, 0)
                assert torch.equal(received, message(number))

    on_shm_ranks(2, body)


@pytest.mark.parametrize("length", [100_003, 9 * 2**20])
def test_both_ranks_send_before_they_receive(length: int) -> None:
    """Like pipeline stages: activations and gradients travel in opposite directions."""

    def body(group: ShmGroup) -> None:
        other = 1 - group.rank
        for iteration in range(2):
            sent = torch.arange(length) + iteration + group.rank
            group.send(sent, other)
            group.send(torch.ones(2), other)
            received, second = torch.zeros_like(sent), torch.zeros(2)
            group.recv(received, other)
            group.recv(second, other)
            assert torch.equal(received, sent - group.rank + other) and second.eq(1).all()

    on_shm_ranks(2, body)


def test_rejects_message_whose_inode_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A descriptor number may be reused: the inode identifies the memory."""
    read = p2p._P2PChannel.read_announcement

    def read_other_inode(channel: p2p._P2PChannel, number: int) -> object:
        (fd, size, inode), head = read(channel, number)
        return (fd, size, inode + 1), head

    monkeypatch.setattr(p2p._P2PChannel, "read_announcement", read_other_inode)

    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            group.send(torch.ones(4), 1)
            return
        with pytest.raises(CollectiveError, match="its message is gone"):
            group.recv(torch.zeros(4), 0)

    on_shm_ranks(2, body)


def test_third_unreceived_message_blocks_the_sender() -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            began = time.monotonic()
            group.send(torch.full((4,), 0.0), 1)
            group.send(torch.full((200_000,), 1.0), 1)  # the second slot grows
            group.barrier()  # rank 1 receives only after this
            group.send(torch.full((4,), 2.0), 1)
            assert time.monotonic() - began > 0.4
        else:
            group.barrier()
            time.sleep(0.4)
            for number, length in enumerate([4, 200_000, 4]):
                received = torch.zeros(length)
                group.recv(received, 0)
                assert received.eq(number).all()

    on_shm_ranks(2, body)


def test_both_directions_concurrent_with_collectives() -> None:
    def body(group: ShmGroup) -> None:
        partner = 1 - group.rank
        for number in range(20):
            handle = group.start_all_reduce(total := torch.full((10_000,), 1.0))
            group.send(torch.full((30_000,), float(group.rank + number)), partner)
            received = torch.zeros(30_000)
            group.recv(received, partner)
            handle.wait()
            assert received.eq(partner + number).all() and total.eq(2).all()

    on_shm_ranks(2, body)


def test_recv_does_not_wait_for_senders_pending_all_reduce() -> None:
    """Messages are not in the order of operations: here that order would deadlock."""

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
    ("output", "text"),
    [(torch.zeros(4), "4 float32"), (torch.zeros(3, dtype=torch.int32), "3 int32")],
)
def test_mismatch_of_message_and_output(output: torch.Tensor, text: str) -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            group.send(torch.ones(3), 1)
            group.barrier()
        else:
            with pytest.raises(MismatchError) as caught:
                group.recv(output.clone(), 0)
            assert caught.value.missing == (0,)
            assert "3 float32" in str(caught.value) and text in str(caught.value)
            raise caught.value

    with pytest.raises(CollectiveError):
        on_shm_ranks(2, body)


@pytest.mark.parametrize("operation", ["send", "recv"])
def test_unresponsive_rank_is_named(operation: str) -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            with pytest.raises(CollectiveError) as caught:
                for _ in range(3):
                    getattr(group, operation)(torch.ones(3), 2)
            assert (caught.value.operation, caught.value.missing) == (operation, (2,))

    on_shm_ranks(3, body, operation_s=SHORT_S)


def test_close_waits_until_messages_are_received() -> None:
    """The messages are in memory of the sender's process."""

    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            group.send(torch.full((4,), 3.0), 1)
            group.send(torch.full((200_000,), 4.0), 1)
        else:
            time.sleep(SHORT_S)
            for number, length in ((3, 4), (4, 200_000)):
                received = torch.zeros(length)
                group.recv(received, 0)
                assert received.eq(number).all()
        group.close()

    on_shm_ranks(2, body)


def test_close_does_not_wait_for_closed_or_late_receiver() -> None:
    has_left = threading.Event()

    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            group.send(torch.ones(3), 1)  # rank 1 closes without receiving
            group.send(torch.ones(3), 2)  # rank 2 closes after the deadline
        if group.rank == 2:
            assert has_left.wait(60)
        group.close()
        if group.rank == 0:
            has_left.set()

    on_shm_ranks(3, body, operation_s=SHORT_S)
