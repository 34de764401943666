"""
Copies between a device and the shared memory of the servers, and their synchronization.

    compute stream     backward: part 2 ─┬─ part 1 ─┬─ ...       ┌─ forward of the next step
    side stream                          └─ copy 2 ─┼─ copy 1 ─┐ │
    thread                                          └ send 2   └ send 1 ... replies, copies back

A part is sent only after its copy has ended, because a server reads it immediately. Copies overlap
with computation only if the host memory is pinned. If the worker computes on the CPU, its vectors
are in the shared memory already and nothing is copied (`DirectTransfer`).
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
    """An event recorded on a stream."""

    def synchronize(self) -> None:
        """Wait until the stream has reached the event."""


class SideStream(Protocol):
    """A stream for copies, next to the compute stream."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Enqueue a copy that runs after the compute stream's work so far; returns immediately."""

    def record_event(self) -> DeviceEvent:
        """Record an event after all copies so far."""

    def join(self) -> None:
        """Make the compute stream wait for all copies so far."""


class CudaSideStream(SideStream):
    """A stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @override
    def copy(self, to: Tensor, source: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)

    @override
    def record_event(self) -> DeviceEvent:
        event: DeviceEvent = self._stream.record_event()
        return event

    @override
    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class DirectTransfer:
    """The worker computes in the servers' memory, so nothing is copied."""

    def to_host(self, shared: Tensor, start: int, then: Callable[[], object]) -> None:
        """
        Copy a part of the gradient to shared memory, then call `then`.

        Args:
            shared: the part's memory, shape [m].
            start: index of the part's first element in the whole vector.
            then: called after the copy; sends the part.
        """
        then()

    def wait(self, limit_s: float) -> None:
        """
        Wait until every `then` has returned, and raise their first exception.

        Raises:
            DeadlineExceeded: A copy does not end.
        """

    def to_device(self, shared: Tensor, start: int) -> None:
        """
        Copy a part of the new parameters to the worker's device, complete after `join`; see
        `to_host`.
        """

    def join(self) -> None:
        """Make later computation see the parameters copied to the device."""

    def close(self) -> None:
        """Unpin the memory."""


class DeviceTransfer(DirectTransfer):
    """
    Copies between vectors on a device and vectors in shared memory.

    Args:
        gradients: on the device, shape [n].
        parameters: on the device, shape [n].
        side: the stream for copies.
        pinned: memory that was pinned for the copies.
    """

    def __init__(
        self, gradients: Tensor, parameters: Tensor, side: SideStream, pinned: Sequence[Tensor] = ()
    ) -> None:
        self._gradients, self._parameters = gradients, parameters
        self._side, self._pinned = side, pinned
        self._pending: queue.SimpleQueue[tuple[DeviceEvent, Callable[[], object]] | None]
        self._pending = queue.SimpleQueue()
        self._unsent = 0  #: parts whose `then` has not returned yet
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._send, daemon=True, name="device-copy").start()

    @override
    def to_host(self, shared: Tensor, start: int, then: Callable[[], object]) -> None:
        """Returns immediately; `then` is called on this object's thread."""
        with self._changed:
            self._unsent += 1
        self._side.copy(shared, self._gradients[start : start + len(shared)])
        self._pending.put((self._side.record_event(), then))

    @override
    def wait(self, limit_s: float) -> None:
        with self._changed:
            completed = self._changed.wait_for(lambda: not self._unsent, limit_s)
            error, self._error = self._error, None
        if error is not None:
            raise error
        if not completed:
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
        """End the thread; parts that were not sent are dropped."""
        self._pending.put(None)
        self._side.record_event().synchronize()
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
                self._unsent -= 1
                self._error = self._error or error
                self._changed.notify_all()


def cuda_transfer(
    gradients: Tensor, parameters: Tensor, shared: Sequence[Tensor]
) -> DeviceTransfer:
    """Create the transfer for vectors on a CUDA device, and pin the shared memory."""
    pinned = [memory for memory in shared if pin(memory)]
    return DeviceTransfer(gradients, parameters, CudaSideStream(gradients.device), pinned)


def pin(memory: Tensor) -> bool:
    """Register memory with CUDA as pinned; return whether CUDA accepted it."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(cudart.cudaHostRegister(memory.data_ptr(), memory.numel() * memory.itemsize, 0))
    if code:
        logger.warning("shared memory is not pinned, copies will be slower (CUDA says %d)", code)
    return not code


def unpin(memory: Tensor) -> None:
    """Undo `pin`."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cudart.cudaHostUnregister(memory.data_ptr())
