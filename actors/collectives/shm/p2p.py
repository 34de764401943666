"""
Messages from one rank to another through two slots that the sender makes when it first needs them.

    sender                                          receiver
    wait until message n-2 was taken
    copy piece 0 into slot n%2, post `pieces`  ──▶  wait for `pieces`, compare what is announced
    copy piece 1, post                         ──▶  copy piece 0 out ...
    return: does not wait for the receiver          copy the last piece out, post `taken`

A slot is a segment of its own, so it can grow between two of its messages: it has room for any. A
stage of a pipeline may therefore send before it receives, as its peer does.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from distplat.actors.collectives.header import SIZE, Header, check_message, header
from distplat.actors.collectives.shm.kernels import in_pieces
from distplat.actors.collectives.shm.liveness import LivenessMonitor, RunningOp
from distplat.actors.collectives.shm.segment import GroupSegment
from distplat.actors.memory.futex import Word
from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import MemoryAddress
from distplat.platform.errors import CollectiveError

PIECE_BYTES = 256 * 1024
_SHORTEST_SLOT = 64 * 1024
_DOUBLED_TO = 32 * 2**20
"""Bytes. Slots double up to here, so that they seldom grow; beyond they are as long as need be."""
_WHERE = struct.Struct("<qqQ")  # descriptor, bytes and inode of the slot's segment
_TAKEN, _SLOTS, _SLOT = 128, 192, _WHERE.size + SIZE
"""In a channel's control words: offset of `taken`, of the announcements, and their size."""
_ALL = (1 << 32) - 1


class _P2PChannel:
    """What both ends keep of one direction between two ranks."""

    def __init__(self, segment: GroupSegment, source: int, to: int) -> None:
        start = segment.channel(source, to)
        self.pieces = Word(segment.bytes, start)
        self.taken = Word(segment.bytes, start + _TAKEN)
        self._control = segment.bytes[start + _SLOTS : start + _SLOTS + 2 * _SLOT]
        self.messages = 0  #: begun by this end
        self.posted = 0  #: pieces sent or received by this end
        self.segments: list[MemorySegment | None] = [None, None]

    def announce(self, head: Header, segment: MemorySegment) -> None:
        """Write, as the sender, what lies in the slot of message `head.number`."""
        start = head.number % 2 * _SLOT
        address = segment.address
        _WHERE.pack_into(self._control, start, address.fd, address.elements, address.inode)
        self._control[start + _WHERE.size : start + _SLOT] = head.pack(head.number)

    def announced(self, number: int) -> tuple[tuple[int, int, int], Header]:
        """Read, as the receiver, ((descriptor, bytes, inode), header) of message `number`."""
        start = number % 2 * _SLOT
        fd, size, inode = _WHERE.unpack_from(self._control, start)
        packed = bytes(self._control[start + _WHERE.size : start + _SLOT])
        return (fd, size, inode), Header.unpack(packed)


class PointToPoint:
    """
    One rank's messages; each pair of ranks is independent of all others.

    Args:
        group: its name, for errors.
        segment: what the ranks share.
        liveness: does the sleeping.
    """

    def __init__(self, group: str, segment: GroupSegment, liveness: LivenessMonitor) -> None:
        self._group, self._segment, self._liveness = group, segment, liveness
        self._outgoing: dict[int, _P2PChannel] = {}
        self._incoming: dict[int, _P2PChannel] = {}

    def send(self, flat: Tensor, to: int) -> RunningOp:
        """Copy `flat`, shape [n], for rank `to`; waits only if two messages are untaken."""
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
        Fill `flat`, shape [n], with the next message of rank `source`.

        Raises:
            MismatchError: the message is of another size or dtype.
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
        Wait until all messages are taken: their slots are this process's.

        Whoever died or left takes none; the deadline is that of an operation.
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

    def _channel(self, end: dict[int, _P2PChannel], peer: int, source: int, to: int) -> _P2PChannel:
        return end.setdefault(peer, _P2PChannel(self._segment, source, to))

    def _slot(self, channel: _P2PChannel, number: int, size: int) -> MemorySegment:
        """Give the free slot of message `number`, grown if need be."""
        segment = channel.segments[number % 2]
        if segment is None or segment.address.elements < size:
            if segment is not None:
                segment.seal()
            if size <= _DOUBLED_TO:
                size = max(_SHORTEST_SLOT, 1 << (size - 1).bit_length())
            segment = MemorySegment.create(self._segment.segment.address.node, size, "uint8")
            channel.segments[number % 2] = segment
        return segment

    def _find_slot(self, channel: _P2PChannel, flat: Tensor, source: int, op: RunningOp) -> Tensor:
        """Compare the message with what is wanted, and give its slot."""
        number = channel.messages
        (fd, size, inode), sent = channel.announced(number)
        expected = header("send", [flat], number=number)
        check_message(self._group, source, self._segment.rank, sent, expected)
        segment = channel.segments[number % 2]
        # A slot only grows, so another size tells that it is another segment.
        if segment is None or segment.address.elements != size:
            address = MemoryAddress("", self._segment.pid(source), fd, size, "uint8", inode)
            try:
                segment = channel.segments[number % 2] = MemorySegment.open(address)
            except OSError as error:
                cause = f"its message is gone: {error}"
                raise CollectiveError(self._group, op.name, number, (source,), cause) from error
        return segment.tensor


def _pieces(message: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Give (first byte, piece): the receiver copies one while the sender copies the next."""
    for index, piece in enumerate(in_pieces(message, PIECE_BYTES)):
        yield index * PIECE_BYTES, piece
