"""
Between a device and the memory that servers read: which copy begins when, and who waits for it.

    computing stream   backward: part 2 ─┬─ part 1 ─┬─ ...       ┌─ forward of the next step
    side stream                          └─ copy 2 ─┼─ copy 1 ─┐ │
    thread                                          └ send 2   └ send 1 ... answers, copies back

A part is sent when its copy has ended, never before: a server reads it at once. Copies need pinned
memory on this side to go on beside the computing. Where the worker computes on the CPU its vectors
are that memory, and there is nothing to copy (`DirectTransfer`).
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from distplat.platform.errors import DeadlineExceeded

logger = logging.getLogger(__name__)


class DeviceEvent(Protocol):
    """A moment of a stream."""

    def synchronize(self) -> None:
        """Wait until the stream has come there."""


class SideStream(Protocol):
    """A stream beside the one that computes, as far as it is needed here."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copy when all is done that the computing stream was given so far; returns at once."""

    def mark(self) -> DeviceEvent:
        """Give the moment when all copies so far have ended."""

    def join(self) -> None:
        """Have the computing stream go on when all copies so far have ended."""


class CudaSideStream(SideStream):
    """
    A stream of a CUDA device.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @override
    def copy(self, to: Tensor, source: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)

    @override
    def mark(self) -> DeviceEvent:
        event: DeviceEvent = self._stream.record_event()
        return event

    @override
    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class DirectTransfer:
    """The worker computes where the servers read."""

    def to_host(self, shared: Tensor, start: int, then: Callable[[], object]) -> None:
        """
        Have a part of the gradient in shared memory, then call `then`.

        Args:
            shared: the part's memory, shape [m].
            start: its first element in the whole vector.
            then: hands it over.
        """
        then()

    def wait(self, limit_s: float) -> None:
        """
        Return when every `then` was called; raise what it raised.

        Raises:
            DeadlineExceeded: a copy does not end.
        """

    def to_device(self, shared: Tensor, start: int) -> None:
        """Have a part of new parameters where the worker computes, after `join`; see `to_host`."""

    def join(self) -> None:
        """Have what the worker computes next see what was copied to the device."""

    def close(self) -> None:
        """Let go of the memory."""


class DeviceTransfer(DirectTransfer):
    """
    Copies between the vectors on a device and those in shared memory.

    Args:
        gradients: on the device, shape [n].
        parameters: the same.
        side: the stream for the copies.
        pinned: memory that was pinned for them.
    """

    def __init__(
        self, gradients: Tensor, parameters: Tensor, side: SideStream, pinned: Sequence[Tensor] = ()
    ) -> None:
        self._gradients, self._parameters = gradients, parameters
        self._side, self._pinned = side, pinned
        self._pending: queue.SimpleQueue[tuple[DeviceEvent, Callable[[], object]] | None]
        self._pending = queue.SimpleQueue()
        self._open = 0  #: parts of which `then` was not called yet
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._send, daemon=True, name="device-copy").start()

    @override
    def to_host(self, shared: Tensor, start: int, then: Callable[[], object]) -> None:
        """Returns at once, `then` is called on a thread of this object's."""
        with self._changed:
            self._open += 1
        self._side.copy(shared, self._gradients[start : start + len(shared)])
        self._pending.put((self._side.mark(), then))

    @override
    def wait(self, limit_s: float) -> None:
        with self._changed:
            over = self._changed.wait_for(lambda: not self._open, limit_s)
            error, self._error = self._error, None
        if error is not None:
            raise error
        if not over:
            late = ("this worker's device",)
            raise DeadlineExceeded("copied gradients", late, limit_s, "failure.step_timeout_s")

    @override
    def to_device(self, shared: Tensor, start: int) -> None:
        self._side.copy(self._parameters[start : start + len(shared)], shared)

    @override
    def join(self) -> None:
        self._side.join()

    @override
    def close(self) -> None:
        """End it; parts that were not sent yet are dropped."""
        self._pending.put(None)
        self._side.mark().synchronize()
        for memory in self._pinned:
            unpin(memory)
        self._pinned = ()

    def _send(self) -> None:
        while (part := self._pending.get()) is not None:
            event, then = part
            error = None
            try:
                event.synchronize()
                then()
            except BaseException as raised:
                error = raised
            with self._changed:
                self._open -= 1
                self._error = self._error or error
                self._changed.notify_all()


def cuda_transfer(
    gradients: Tensor, parameters: Tensor, shared: Sequence[Tensor]
) -> DeviceTransfer:
    """Make the transfer of a CUDA device's vectors, and pin the memory on the other side."""
    pinned = [memory for memory in shared if pin(memory)]
    return DeviceTransfer(gradients, parameters, CudaSideStream(gradients.device), pinned)


def pin(memory: Tensor) -> bool:
    """Tell CUDA that this memory stays where it is; say whether it took that."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(cudart.cudaHostRegister(memory.data_ptr(), memory.numel() * memory.itemsize, 0))
    if code:
        logger.warning("shared memory is not pinned, copies will be slower (CUDA says %d)", code)
    return not code


def unpin(memory: Tensor) -> None:
    """Take `pin` back."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cudart.cudaHostUnregister(memory.data_ptr())
