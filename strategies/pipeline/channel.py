"""
Messages between the stages of one replica: tensors whose layouts both ends know.

The inputs of a virtual stage have the same layout for all micro-batches of one size (`values.py`).
So layouts are exchanged once per size, by a forward pass for that purpose; afterwards stages send
bare tensors into reused buffers.

    stage 0   first micro-batch of 4 ──▶ chunk 0 ──▶ "float32 [4, 64]", values ─┐
    stage 1                                                         chunk 1 ◀──┘ ──▶ ...

If whole batches enter the model or collate() may pad, micro-batches of one size may differ: each is
padded to its longest sample, and one without padding may have no mask. Then a header message with
the number of the layout precedes each value, and a layout that is new to the receiver is sent with
the value. The sender does not wait between the two messages, so for the schedule they are one.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distplat.platform.errors import CollectiveError
from distplat.strategies.collective import Collective, Handle
from distplat.strategies.pipeline.values import Form, Packing, ValueLayout

_MAX_PENDING = 2
"""Sends in flight to one stage; a further send waits for the oldest."""

LayoutKey = tuple[int, int]
"""(Virtual stage whose input it is, samples of the micro-batch)."""


class Channel:
    """
    One rank's messages to and from the other stages of its replica.

    Args:
        group: the ranks of the replica.
        peers: by stage, its rank in `group`.
        names: by rank in `group`, its rank in the run.
        device: of the tensors.
    """

    def __init__(
        self, group: Collective, peers: Sequence[int], names: Sequence[int], device: torch.device
    ) -> None:
        self._group, self._peers, self._names, self._device = group, peers, names, device
        self._layouts: dict[LayoutKey, ValueLayout] = {}
        self._free: defaultdict[Form, list[Tensor]] = defaultdict(list)
        self._pending: defaultdict[int, deque[tuple[Handle, Tensor]]] = defaultdict(deque)
        self.varies = False  #: inputs of a virtual stage may differ in layout
        self._sent: defaultdict[int, dict[Any, int]] = defaultdict(dict)  #: numbers of layouts
        self._received: defaultdict[int, list[ValueLayout]] = defaultdict(list)  #: by virtual stage

    def add_layout(self, key: LayoutKey, value: Any) -> ValueLayout:
        """
        Add the layout of a virtual stage's input.

        Raises:
            SpecError: the value cannot be sent; see `ValueLayout.of`.
        """
        layout = self._layouts[key] = ValueLayout.of(key[0], value)
        return layout

    def layout(self, key: LayoutKey) -> ValueLayout:
        """Return the layout of a virtual stage's input, which was added or received."""
        return self._layouts[key]

    def send_layout(self, key: LayoutKey, to: int) -> None:
        """Send a stage the layout of its input."""
        text = torch.frombuffer(bytearray(self._layouts[key].to_bytes()), dtype=torch.uint8)
        self._send(torch.tensor([len(text), self.varies], device=self._device), to)
        self._send(text.to(self._device), to)

    def receive_layout(self, key: LayoutKey, source: int) -> ValueLayout:
        """Receive the layout of an input of this stage."""
        head = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._receive(head, source)
        length, varies = head.tolist()
        self.varies = self.varies or bool(varies)
        text = torch.zeros(length, dtype=torch.uint8, device=self._device)
        self._receive(text, source)
        layout = self._layouts[key] = ValueLayout.from_bytes(key[0], bytes(text.cpu().numpy()))
        return layout

    def send(self, packing: Packing, tensors: Sequence[Tensor], to: int) -> None:
        """
        Send tensors to a stage as one message; waits while too many sends are in flight.

        Raises:
            CollectiveError: the stage is lost, or received nothing before the deadline.
        """
        if packing.form is not None:
            self._send(packing.pack(tensors), to)

    def send_with_layout(
        self, virtual_stage: int, layout: ValueLayout, tensors: Sequence[Tensor], to: int
    ) -> None:
        """
        Send a stage its input together with the layout; see `send`.

        Raises:
            SpecError: the layout cannot be serialized.
        """
        numbers, key = self._sent[virtual_stage], layout.key
        packing, encoded = layout.values, b""
        if key not in numbers:
            layout.check_serializable()
            encoded = layout.to_bytes()
            text = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(self._device)
            packing, tensors = packing.with_header(len(encoded)), [text, *tensors]
        message = packing.pack(tensors)
        number = numbers.setdefault(key, len(numbers))
        head = [number, len(encoded), message.nbytes]
        self._send(torch.tensor(head, device=self._device), to)
        self._send(message, to)

    def receive_with_layout(
        self, virtual_stage: int, source: int
    ) -> tuple[ValueLayout, list[Tensor]]:
        """Receive an input of this stage together with its layout; see `receive`."""
        head = torch.zeros(3, dtype=torch.int64, device=self._device)
        self._receive(head, source)
        number, length, size = head.tolist()
        layouts = self._received[virtual_stage]
        if not length:
            layout = layouts[number]
            buffer = self.receive(layout.values, source)
            assert buffer is not None, "a value has tensors"
            return layout, layout.values.unpack(buffer)
        message = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._receive(message, source)
        layout = ValueLayout.from_bytes(virtual_stage, bytes(message[:length].cpu().numpy()))
        layouts.append(layout)
        return layout, layout.values.with_header(length).unpack(message)[1:]

    def receive(self, packing: Packing, source: int) -> Tensor | None:
        """
        Receive a stage's next message in a buffer for `recycle`; None: it has no tensors.

        Raises:
            CollectiveError: the stage is lost, or sent nothing before the deadline.
        """
        if packing.form is None:
            return None
        free = self._free[packing.form]
        if free:
            buffer = free.pop()
        else:
            dtype, shape = packing.form
            buffer = torch.empty(shape, dtype=dtype, device=self._device)
        self._receive(buffer, source)
        return buffer

    def recycle(self, buffer: Tensor) -> None:
        """Reuse a buffer for messages of the same dtype and shape."""
        if not self.varies:
            self._free[buffer.dtype, tuple(buffer.shape)].append(buffer)

    def finish(self) -> None:
        """Wait for the sends in flight."""
        for to, pending in self._pending.items():
            while pending:
                self._wait_for_oldest(to)

    def _send(self, message: Tensor, to: int) -> None:
        pending = self._pending[to]
        if len(pending) >= _MAX_PENDING:
            self._wait_for_oldest(to)
        with self._rename_missing(to):
            pending.append((self._group.start_send(message, self._peers[to]), message))

    def _wait_for_oldest(self, to: int) -> None:
        handle, _ = self._pending[to].popleft()
        with self._rename_missing(to):
            handle.wait()

    def _receive(self, tensor: Tensor, source: int) -> None:
        with self._rename_missing(source):
            self._group.recv(tensor, self._peers[source])

    @contextmanager
    def _rename_missing(self, stage: int) -> Iterator[None]:
        """Convert ranks in errors to ranks of the run, and name the missing stage."""
        try:
            yield
        except CollectiveError as error:
            missing = tuple(self._names[rank] for rank in error.missing)
            cause = f"{error.cause}; waiting for stage {stage}"
            raise type(error)(error.group, error.operation, error.number, missing, cause) from None
