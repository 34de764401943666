"""What is copied to and from a device, and when it is handed over; the device is made up."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distplat.actors.memory.device_copy import DeviceTransfer, DirectTransfer
from distplat.platform.errors import DeadlineExceeded

LIMIT_S = 60.0


class Stream:
    """A stream that does nothing before it is let go, or somebody waits for it to be."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.go = threading.Event()
        self._todo: list[Callable[[], object]] = []

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.events.append("copy")
        self._todo.append(lambda: to.copy_(source))

    def record_event(self) -> "Moment":
        return Moment(self, len(self._todo))

    def join(self) -> None:
        self.events.append("join")
        self.run(len(self._todo))

    def run(self, count: int) -> None:
        for number in range(count):
            self._todo[number]()
            self._todo[number] = lambda: None


class Moment:
    """After so many copies of a stream."""

    def __init__(self, stream: Stream, count: int) -> None:
        self._stream, self._count = stream, count

    def synchronize(self) -> None:
        assert self._stream.go.wait(LIMIT_S)
        self._stream.run(self._count)


class Rig:
    """Vectors of eight elements, in two parts."""

    def __init__(self) -> None:
        self.stream = Stream()
        self.gradients, self.parameters = torch.arange(8.0), torch.zeros(8)
        self.shared, self.values = torch.zeros(8), torch.arange(8.0) + 10
        self.transfer = DeviceTransfer(self.gradients, self.parameters, self.stream)
        self.sent: list[list[float]] = []

    def out(self, start: int, stop: int) -> None:
        """Send a part; note what is in shared memory when it is handed over."""
        part = self.shared[start:stop]
        self.transfer.to_host(part, start, lambda: self.sent.append(part.tolist()))


def test_a_part_is_handed_over_when_its_copy_has_ended() -> None:
    rig = Rig()
    rig.out(4, 8)
    rig.out(0, 4)
    assert rig.sent == [] and rig.shared.sum() == 0
    rig.stream.go.set()
    rig.transfer.wait(LIMIT_S)
    assert rig.sent == [[4, 5, 6, 7], [0, 1, 2, 3]]
    rig.transfer.close()


def test_who_computes_does_not_wait_for_copies() -> None:
    """It would stand still until the device has come to the end of backward."""
    rig = Rig()
    rig.out(4, 8)
    assert rig.stream.events == ["copy"] and rig.sent == []
    rig.stream.go.set()
    rig.transfer.wait(LIMIT_S)


def test_new_parameters_are_there_after_the_join() -> None:
    rig = Rig()
    rig.transfer.to_device(rig.values[4:], 4)
    rig.transfer.to_device(rig.values[:4], 0)
    assert rig.parameters.sum() == 0
    rig.transfer.join()
    assert torch.equal(rig.parameters, rig.values)
    assert rig.stream.events == ["copy", "copy", "join"]


def test_what_sending_raises_comes_up_in_the_wait() -> None:
    rig = Rig()

    def fail() -> None:
        raise ZeroDivisionError

    rig.transfer.to_host(rig.shared[:4], 0, fail)
    rig.out(4, 8)
    rig.stream.go.set()
    with pytest.raises(ZeroDivisionError):
        rig.transfer.wait(LIMIT_S)
    assert rig.sent == [[4, 5, 6, 7]]
    rig.transfer.wait(LIMIT_S)


def test_a_copy_that_does_not_end_is_named() -> None:
    rig = Rig()
    rig.out(0, 4)
    with pytest.raises(DeadlineExceeded, match="this worker's device"):
        rig.transfer.wait(0.01)
    rig.stream.go.set()


def test_on_the_cpu_all_is_there_already() -> None:
    sent = []
    direct = DirectTransfer()
    direct.to_host(torch.zeros(1), 0, lambda: sent.append(1))
    assert sent == [1]
    direct.wait(0.0)
    direct.to_device(torch.zeros(1), 0)
    direct.join()
    direct.close()
