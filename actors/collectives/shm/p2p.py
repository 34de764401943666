"""
Point-to-point messages through two slots per direction, which the sender creates on first use.

    sender                                          receiver
    wait until message n-2 was taken
    copy piece 0 into slot n%2, post `pieces`  ──▶  wait for `pieces`, compare the headers
    copy piece 1, post                         ──▶  copy piece 0 out ...
    return: does not wait for the receiver          copy the last piece out, post `taken`

Each slot is a separate segment, which the sender can replace by a larger one between two messages:
a message of any size fits. So two pipeline stages may both send before they receive.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from distplat.actors.collectives.header import SIZE, Header, check_message, header
from distplat.actors.collectives.shm.kernels import split_by_length
from distplat.actors.collectives.shm.liveness import LivenessMonitor, RunningOp
from distplat.actors.collectives.shm.segment import GroupSegment
from distplat.actors.memory.futex import Word
from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import MemoryAddress
from distplat.platform.errors import CollectiveError

PIECE_BYTES = 256 * 1024
_MIN_SLOT = 64 * 1024
_MAX_DOUBLED_SLOT = 32 * 2**20
"""Bytes. Slot sizes double up to here, so that slots seldom grow; larger slots fit exactly."""
_ADDRESS = struct.Struct("<qqQ")  # descriptor, bytes and inode of the slot's segment
_TAKEN, _ANNOUNCEMENTS, _ANNOUNCEMENT = 128, 192, _ADDRESS.size + SIZE
"""In a channel's control words: offsets of `taken` and of the two announcements; size of one."""
_ALL = (1 << 32) - 1


class _P2PChannel:
    """One end's state of the messages from one rank to another."""

    def __init__(self, segment: GroupSegment, source: int, to: int) -> None:
        start = segment.channel(source, to)
        self.pieces = Word(segment.bytes, start)
        self.taken = Word(segment.bytes, start + _TAKEN)
        start += _ANNOUNCEMENTS
        self._control = segment.bytes[start : start + 2 * _ANNOUNCEMENT]
        self.messages = 0  #: sent or received by this end
        self.posted = 0  #: pieces sent or received by this end
        self.segments: list[MemorySegment | None] = [None, None]

    def announce(self, head: Header, segment: MemorySegment) -> None:
        """Write the slot's address and the header of message `head.number`; by the sender."""
        start = head.number % 2 * _ANNOUNCEMENT
        address = segment.address
        _ADDRESS.pack_into(self._control, start, address.fd, address.elements, address.inode)
        self._control[start + _ADDRESS.size : start + _ANNOUNCEMENT] = head.pack(head.number)

    def read_announcement(self, number: int) -> tuple[tuple[int, int, int], Header]:
        """Return ((descriptor, bytes, inode), header) of message `number`; by the receiver."""
        start = number % 2 * _ANNOUNCEMENT
        fd, size, inode = _ADDRESS.unpack_from(self._control, start)
        packed = bytes(self._control[start + _ADDRESS.size : start + _ANNOUNCEMENT])
        return (fd, size, inode), Header.unpack(packed)


class PointToPoint:
    """
    One rank's messages; each pair of ranks is independent of all others.

    Args:
        group: name of the group, for errors.
        segment: the ranks' shared memory.
        liveness: for waits.
    """

    def __init__(self, group: str, segment: GroupSegment, liveness: LivenessMonitor) -> None:
        self._group, self._segment, self._liveness = group, segment, liveness
        self._outgoing: dict[int, _P2PChannel] = {}
        self._incoming: dict[int, _P2PChannel] = {}

    def send(self, flat: Tensor, to: int) -> RunningOp:
        """Send `flat`, shape [n], to rank `to`; waits only if it has not taken two messages."""
        channel = self._outgoing.get(to)
        channel = channel or self._channel(self._outgoing, to, self._segment.rank, to)
        op = RunningOp("send", channel.messages)
        self._liveness.check(op)
        number, message = channel.messages, flat.view(torch.uint8)
        self._liveness.wait_for(channel.taken, (number - 1) & _ALL, to, op)
        segment = self._slot(channel, number, message.numel())
        channel.announce(header("send", [flat], number=number), segment)
        slot = segment.tensor
        for start, piece in _pieces(message):
            slot[start : start + piece.numel()].copy_(piece)
            channel.posted += 1
            channel.pieces.post()
        channel.messages += 1
        return op

    def receive(self, flat: Tensor, source: int) -> RunningOp:
        """
        Receive the next message of rank `source` into `flat`, shape [n].

        Raises:
            MismatchError: the message has another size or dtype.
            CollectiveError: see `LivenessMonitor`.
        """
        channel = self._incoming.get(source)
        channel = channel or self._channel(self._incoming, source, source, self._segment.rank)
        op = RunningOp("recv", channel.messages)
        self._liveness.check(op)
        slot: Tensor | None = None
        for start, piece in _pieces(flat.view(torch.uint8)):
            channel.posted += 1
            self._liveness.wait_for(channel.pieces, channel.posted & _ALL, source, op)
            if slot is None:
                slot = self._find_slot(channel, flat, source, op)
            piece.copy_(slot[start : start + piece.numel()])
        channel.messages += 1
        channel.taken.post()
        return op

    def drain(self) -> None:
        """
        Wait until all sent messages are taken: their slots are freed with this process.

        Skips ranks that died or left; the deadline is that of an operation.
        """
        for to, channel in self._outgoing.items():
            op = RunningOp("close", channel.messages)
            with suppress(CollectiveError):
                self._liveness.wait_for(channel.taken, channel.messages & _ALL, to, op)

    def close(self) -> None:
        """Free the slots; messages that were not received are lost."""
        for channel in self._outgoing.values():
            for segment in channel.segments:
                if segment is not None:
                    segment.seal()
        self._outgoing.clear()
        self._incoming.clear()

    def _channel(
        self, channels: dict[int, _P2PChannel], peer: int, source: int, to: int
    ) -> _P2PChannel:
        return channels.setdefault(peer, _P2PChannel(self._segment, source, to))

    def _slot(self, channel: _P2PChannel, number: int, size: int) -> MemorySegment:
        """Return the free slot of message `number`; replace it if it is too small."""
        segment = channel.segments[number % 2]
        if segment is None or segment.address.elements < size:
            if segment is not None:
                segment.seal()
            if size <= _MAX_DOUBLED_SLOT:
                size = max(_MIN_SLOT, 1 << (size - 1).bit_length())
            segment = MemorySegment.create(self._segment.segment.address.node, size, "uint8")
            channel.segments[number % 2] = segment
        return segment

    def _find_slot(self, channel: _P2PChannel, flat: Tensor, source: int, op: RunningOp) -> Tensor:
        """Compare the message's header with the expected one, and return its slot."""
        number = channel.messages
        (fd, size, inode), sent = channel.read_announcement(number)
        expected = header("send", [flat], number=number)
        check_message(self._group, source, self._segment.rank, sent, expected)
        segment = channel.segments[number % 2]
        # Slots only grow, so another size means another segment.
        if segment is None or segment.address.elements != size:
            address = MemoryAddress("", self._segment.pid(source), fd, size, "uint8", inode)
            try:
                segment = channel.segments[number % 2] = MemorySegment.open(address)
            except OSError as error:
                cause = f"its message is gone: {error}"
                raise CollectiveError(self._group, op.name, number, (source,), cause) from error
        return segment.tensor


def _pieces(message: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first byte, piece): the receiver copies a piece while the sender copies the next."""
    for index, piece in enumerate(split_by_length(message, PIECE_BYTES)):
        yield index * PIECE_BYTES, piece
