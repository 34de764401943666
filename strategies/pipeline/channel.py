"""
Messages between the stages of one replica: tensors whose shapes both ends know.

What enters a virtual stage has the same form for all micro-batches of one size (`values.py`). So
forms are agreed once per size, by a pass through the model that computes nothing else; from then on
bare tensors travel, into buffers that are used again.

    stage 0   first micro-batch of 4 ──▶ chunk 0 ──▶ "float32 [4, 64]", values ─┐
    stage 1                                                         chunk 1 ◀──┘ ──▶ ...

Where whole batches enter the model, micro-batches of one size may differ: they are padded to their
own longest sample, and those without padding may need no mask. There the number of its form goes
before each value, in a message of its own, and a form that is new to the other end in front of it.
Neither message waits for the other to be taken, so for the schedule they are one.
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

_ROOM = 2
"""Sends under way to one stage; who sends one more waits for the oldest."""

Kind = tuple[int, int]
"""(Virtual stage that a value enters, samples of its micro-batch)."""


class Channel:
    """
    One rank's messages to and from the other stages of its replica.

    Args:
        group: the ranks of the replica.
        peers: by stage, its rank in `group`.
        names: by rank in `group`, its rank in the run.
        device: where tensors are.
    """

    def __init__(
        self, group: Collective, peers: Sequence[int], names: Sequence[int], device: torch.device
    ) -> None:
        self._group, self._peers, self._names, self._device = group, peers, names, device
        self._layouts: dict[Kind, ValueLayout] = {}
        self._free: defaultdict[Form, list[Tensor]] = defaultdict(list)
        self._under_way: defaultdict[int, deque[tuple[Handle, Tensor]]] = defaultdict(deque)
        self.varies = False  #: what enters a virtual stage may have another form each time
        self._sent: defaultdict[int, dict[Any, int]] = defaultdict(dict)  #: forms, by virtual stage
        self._received: defaultdict[int, list[ValueLayout]] = defaultdict(list)  #: by virtual stage

    def learn(self, kind: Kind, value: Any) -> ValueLayout:
        """
        Note the layout of a virtual stage's input.

        Raises:
            SpecError: it cannot be sent; see `ValueLayout.of`.
        """
        layout = self._layouts[kind] = ValueLayout.of(kind[0], value)
        return layout

    def layout(self, kind: Kind) -> ValueLayout:
        """Give the layout of a virtual stage's input, which was learnt or received."""
        return self._layouts[kind]

    def send_layout(self, kind: Kind, to: int) -> None:
        """Send a stage the layout of its input."""
        text = torch.frombuffer(bytearray(self._layouts[kind].to_bytes()), dtype=torch.uint8)
        self._send(torch.tensor([len(text), self.varies], device=self._device), to)
        self._send(text.to(self._device), to)

    def receive_layout(self, kind: Kind, source: int) -> ValueLayout:
        """Receive from a stage the layout of an input of this one."""
        head = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._receive(head, source)
        length, varies = head.tolist()
        self.varies = self.varies or bool(varies)
        text = torch.zeros(length, dtype=torch.uint8, device=self._device)
        self._receive(text, source)
        layout = self._layouts[kind] = ValueLayout.from_bytes(kind[0], bytes(text.cpu().numpy()))
        return layout

    def send(self, packing: Packing, tensors: Sequence[Tensor], to: int) -> None:
        """
        Send tensors to a stage as one message; waits for room, not for its receipt.

        Raises:
            CollectiveError: the stage is gone, or took nothing for too long.
        """
        if packing.form is not None:
            self._send(packing.pack(tensors), to)

    def send_with_layout(
        self, virtual_stage: int, layout: ValueLayout, tensors: Sequence[Tensor], to: int
    ) -> None:
        """
        Send a stage its input, with the layout; see `send`.

        Raises:
            SpecError: the layout cannot be serialized.
        """
        known, key = self._sent[virtual_stage], layout.key
        packing, encoded = layout.values, b""
        if key not in known:
            layout.check_serializable()
            encoded = layout.to_bytes()
            text = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(self._device)
            packing, tensors = packing.behind(len(encoded)), [text, *tensors]
        message = packing.pack(tensors)
        number = known.setdefault(key, len(known))
        head = [number, len(encoded), message.nbytes]
        self._send(torch.tensor(head, device=self._device), to)
        self._send(message, to)

    def receive_with_layout(
        self, virtual_stage: int, source: int
    ) -> tuple[ValueLayout, list[Tensor]]:
        """Receive an input of this stage, with its layout; see `receive`."""
        head = torch.zeros(3, dtype=torch.int64, device=self._device)
        self._receive(head, source)
        number, length, size = head.tolist()
        known = self._received[virtual_stage]
        if not length:
            layout = known[number]
            buffer = self.receive(layout.values, source)
            assert buffer is not None, "a value has tensors"
            return layout, layout.values.unpack(buffer)
        message = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._receive(message, source)
        layout = ValueLayout.from_bytes(virtual_stage, bytes(message[:length].cpu().numpy()))
        known.append(layout)
        return layout, layout.values.behind(length).unpack(message)[1:]

    def receive(self, packing: Packing, source: int) -> Tensor | None:
        """
        Receive a stage's next message, in a buffer to be given back; None: it has no tensors.

        Raises:
            CollectiveError: the stage is gone, or sent nothing for too long.
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

    def give_back(self, buffer: Tensor) -> None:
        """Let a buffer be used again for messages of its shape."""
        if not self.varies:
            self._free[buffer.dtype, tuple(buffer.shape)].append(buffer)

    def finish(self) -> None:
        """Wait for the sends under way."""
        for to, pending in self._under_way.items():
            while pending:
                self._wait_for_oldest(to)

    def _send(self, message: Tensor, to: int) -> None:
        pending = self._under_way[to]
        if len(pending) >= _ROOM:
            self._wait_for_oldest(to)
        with self._naming_ranks(to):
            pending.append((self._group.start_send(message, self._peers[to]), message))

    def _wait_for_oldest(self, to: int) -> None:
        handle, _ = self._under_way[to].popleft()
        with self._naming_ranks(to):
            handle.wait()

    def _receive(self, tensor: Tensor, source: int) -> None:
        with self._naming_ranks(source):
            self._group.recv(tensor, self._peers[source])

    @contextmanager
    def _naming_ranks(self, stage: int) -> Iterator[None]:
        """Have errors name ranks by their numbers in the run, and the stage that did not come."""
        try:
            yield
        except CollectiveError as error:
            missing = tuple(self._names[rank] for rank in error.missing)
            cause = f"{error.cause}; waiting for stage {stage}"
            raise type(error)(error.group, error.operation, error.number, missing, cause) from None
