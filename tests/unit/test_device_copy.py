"""Transfers between host and device, with a fake stream."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distplat.actors.memory.device_copy import DeviceTransfer, DirectTransfer
from distplat.platform.errors import DeadlineExceeded

LIMIT_S = 60.0


class Stream:
    """A fake stream that executes its copies only when `go` is set, or at `join`."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.go = threading.Event()
        self._pending: list[Callable[[], object]] = []

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.events.append("copy")
        self._pending.append(lambda: to.copy_(source))

    def record_event(self) -> "StreamEvent":
        return StreamEvent(self, len(self._pending))

    def join(self) -> None:
        self.events.append("join")
        self.run(len(self._pending))

    def run(self, count: int) -> None:
        for number in range(count):
            self._pending[number]()
            self._pending[number] = lambda: None


class StreamEvent:
    """A recorded event: complete after the first `count` copies of a stream."""

    def __init__(self, stream: Stream, count: int) -> None:
        self._stream, self._count = stream, count

    def synchronize(self) -> None:
        assert self._stream.go.wait(LIMIT_S)
        self._stream.run(self._count)


class TransferSetup:
    """A transfer of vectors of eight elements, sent in two parts."""

    def __init__(self) -> None:
        self.stream = Stream()
        self.gradients, self.parameters = torch.arange(8.0), torch.zeros(8)
        self.shared, self.values = torch.zeros(8), torch.arange(8.0) + 10
        self.transfer = DeviceTransfer(self.gradients, self.parameters, self.stream)
        self.sent: list[list[float]] = []

    def send(self, start: int, stop: int) -> None:
        """Send a part, and record the contents of shared memory in its callback."""
        part = self.shared[start:stop]
        self.transfer.to_host(part, start, lambda: self.sent.append(part.tolist()))


def test_callbacks_run_after_their_copies() -> None:
    setup = TransferSetup()
    setup.send(4, 8)
    setup.send(0, 4)
    assert setup.sent == [] and setup.shared.sum() == 0
    setup.stream.go.set()
    setup.transfer.wait(LIMIT_S)
    assert setup.sent == [[4, 5, 6, 7], [0, 1, 2, 3]]
    setup.transfer.close()


def test_to_host_does_not_block() -> None:
    """A blocking copy would wait until the device has finished backward."""
    setup = TransferSetup()
    setup.send(4, 8)
    assert setup.stream.events == ["copy"] and setup.sent == []
    setup.stream.go.set()
    setup.transfer.wait(LIMIT_S)


def test_to_device_completes_at_join() -> None:
    setup = TransferSetup()
    setup.transfer.to_device(setup.values[4:], 4)
    setup.transfer.to_device(setup.values[:4], 0)
    assert setup.parameters.sum() == 0
    setup.transfer.join()
    assert torch.equal(setup.parameters, setup.values)
    assert setup.stream.events == ["copy", "copy", "join"]


def test_wait_raises_errors_of_callbacks() -> None:
    setup = TransferSetup()

    def fail() -> None:
        raise ZeroDivisionError

    setup.transfer.to_host(setup.shared[:4], 0, fail)
    setup.send(4, 8)
    setup.stream.go.set()
    with pytest.raises(ZeroDivisionError):
        setup.transfer.wait(LIMIT_S)
    assert setup.sent == [[4, 5, 6, 7]]
    setup.transfer.wait(LIMIT_S)


def test_wait_times_out_if_a_copy_hangs() -> None:
    setup = TransferSetup()
    setup.send(0, 4)
    with pytest.raises(DeadlineExceeded, match="this worker's device"):
        setup.transfer.wait(0.01)
    setup.stream.go.set()


def test_cpu_transfer_is_immediate() -> None:
    sent = []
    direct = DirectTransfer()
    direct.to_host(torch.zeros(1), 0, lambda: sent.append(1))
    assert sent == [1]
    direct.wait(0.0)
    direct.to_device(torch.zeros(1), 0)
    direct.join()
    direct.close()
