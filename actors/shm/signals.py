"""One rank's posts in the arena, its waits for the others', and the comparison of operations."""

from distplat.actors.memory import futex
from distplat.actors.shm.arena import Arena
from distplat.actors.shm.header import Header, mismatch
from distplat.actors.shm.watch import Activity, Watch

_HALF, _ALL = 1 << 31, (1 << 32) - 1


class Signals:
    """
    This rank's posts, and its waits for the others'; compares headers after the first wait.

    Args:
        group: its name, for errors.
        arena: what the ranks share.
        watch: does the sleeping.
    """

    def __init__(self, group: str, arena: Arena, watch: Watch) -> None:
        self._group, self._arena, self._watch = group, arena, watch
        self._posts = 0
        self._packed = b""
        self._others = [r for r in range(arena.layout.world) if r != arena.rank]
        self._cells = [arena.cell_of[r] for r in self._others]
        self._word = arena.words[arena.rank]
        self.activity = Activity("rendezvous", 0)

    def begin(self, header: Header, activity: Activity) -> None:
        """Lay down the header of an operation before its first post."""
        self._header, self._packed, self.activity = header, header.pack(), activity
        self._arena.write_header(header.number, self._packed)

    def post(self) -> int:
        """See `Signals` of rounds.py."""
        self._word.post()
        self._posts = (self._posts + 1) & _ALL
        return self._posts

    def wait(self, number: int) -> None:
        """
        Return when all ranks have made post `number`.

        Raises:
            MismatchError: they are not all in the operation of this rank.
            CollectiveError: see `Watch`.
        """
        cells = self._arena.cells
        for cell in self._cells:
            # A look without a call: the difference is below 2^31 once the post is made.
            if not futex.LOADS_IN_ORDER or (cells[cell] - number) & _ALL >= _HALF:
                self._watch.until_all(number, self.activity)
                break
        if self._packed:
            self._compare()

    def _compare(self) -> None:
        packed, self._packed = self._packed, b""
        number = self._header.number
        others = {rank: self._arena.read_header(rank, number) for rank in self._others}
        if any(data != packed for data in others.values()):
            headers = {rank: Header.unpack(data) for rank, data in others.items()}
            headers[self._arena.rank] = self._header
            raise mismatch(self._group, self._arena.rank, headers)
