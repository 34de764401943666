"""
How ranks take turns with the slots: a vector goes through them in blocks.

One round per block; a round's *post* says "my block lies in my slot", and who has waited for all
ranks' posts may read theirs. Ranks work ahead by one block, so a wait seldom sleeps:

    exchange       put 0  post 0 │ put 1  post 1 │ wait 0  take 0 │ put 2  post 2 │ wait 1  take 1

An all-reduce of more than two ranks needs a second exchange, of the results. Each rank reduces one
chunk of every block, and leaves it in its own slot, in the chunk that nobody reads there:

    exchange_twice   put 0                             post 0
                     put 1   wait 0  reduce 0          post 1
                     put 2   wait 1  reduce 1  take 0  post 2   (wait 1: all have reduced 0)
                             wait 2  reduce 2  take 1  post 3
                             wait 3            take 2

Why four slots: let post p be the one that publishes a block.
  - All reads of that block, of its results too, come before the reader's post p + 2: in the first
    pattern they come before post p + 2 of the same operation, or before the first post of the next;
    in the second, reduce comes before post p + 1, take before post p + 2 (or the operation's end).
  - A rank that puts the block of post q has waited for all posts q - 2.
The slot is used again by the block of post q >= p + 4 (other operations post, too), so its writer
has seen post q - 2 >= p + 2 of every rank: all have read.
"""

from collections.abc import Callable

from distplat.actors.collectives.header import Header, check_headers
from distplat.actors.collectives.shm.liveness import LivenessMonitor, RunningOp
from distplat.actors.collectives.shm.segment import SLOTS, GroupSegment
from distplat.actors.memory import futex

BlockStep = Callable[[int, int], None]
"""Is given the number of the block and its slot."""
_HALF, _ALL = 1 << 31, (1 << 32) - 1


class BlockPipeline:
    """
    This rank's posts and its waits for the others'; runs operations block by block.

    Slots are counted on from one operation to the next. Headers are compared after an operation's
    first wait, before anything of the other ranks is read.

    Args:
        group: its name, for errors.
        segment: what the ranks share.
        liveness: does the sleeping.
    """

    def __init__(self, group: str, segment: GroupSegment, liveness: LivenessMonitor) -> None:
        self._group, self._segment, self._liveness = group, segment, liveness
        self._posts = self._slot = 0
        self._header = b""  #: of this rank's operation, until it has been compared
        self._others = [r for r in range(segment.world) if r != segment.rank]
        self._cells = [segment.cell_of[r] for r in self._others]
        self._word = segment.words[segment.rank]
        self._op = RunningOp("rendezvous", 0)

    def begin(self, header: Header, op: RunningOp) -> None:
        """Lay down the header of an operation before its first post."""
        self._header, self._op = header.pack(op.number), op
        self._segment.write_header(op.number, self._header)

    def post(self) -> int:
        """Say that this rank is through with its part; give the number of the post."""
        self._word.post()
        self._posts = (self._posts + 1) & _ALL
        return self._posts

    def wait(self, number: int) -> None:
        """
        Return when all ranks have made post `number`.

        Raises:
            MismatchError: they are not all in the operation of this rank.
            CollectiveError: see `LivenessMonitor`.
        """
        cells = self._segment.cells
        for cell in self._cells:
            # A look without a call: the difference is below 2^31 once the post is made.
            if not futex.LOADS_IN_ORDER or (cells[cell] - number) & _ALL >= _HALF:
                self._liveness.wait_for_all(number, self._op)
                break
        if self._header:
            self._compare()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.wait(self.post())

    def exchange(self, blocks: int, put: BlockStep, take: BlockStep) -> None:
        """Put each block into this rank's slot, and take what is needed from all slots."""
        first = self._slot
        self._slot = (first + blocks) % SLOTS
        posted = 0
        for block in range(blocks + 1):
            before = posted
            if block < blocks:
                put(block, (first + block) % SLOTS)
                posted = self.post()
            if block:
                self.wait(before)
                take(block - 1, (first + block - 1) % SLOTS)

    def exchange_twice(
        self, blocks: int, put: BlockStep, reduce: BlockStep, take: BlockStep
    ) -> None:
        """Put each block, reduce a part of what all have put, and take what all have reduced."""
        first = self._slot
        self._slot = (first + blocks) % SLOTS
        posted = 0
        for turn in range(blocks + 2):
            if turn < blocks:
                put(turn, (first + turn) % SLOTS)
            if turn:
                self.wait(posted)
            if 1 <= turn <= blocks:
                reduce(turn - 1, (first + turn - 1) % SLOTS)
            if turn >= 2:
                take(turn - 2, (first + turn - 2) % SLOTS)
            if turn <= blocks:
                posted = self.post()

    def in_place(self, work: Callable[[], object]) -> None:
        """Work on the ranks' vectors themselves, between two meetings of all ranks."""
        self.barrier()
        work()
        self.barrier()

    def _compare(self) -> None:
        own_header, self._header = self._header, b""
        read, number = self._segment.read_header, self._op.number
        for rank in self._others:
            if read(rank, number) != own_header:
                ranks = range(self._segment.world)
                headers = [Header.unpack(read(rank, number)) for rank in ranks]
                check_headers(self._group, self._segment.rank, headers)
