"""
Synchronization of the ranks' slots: vectors pass through the slots block by block.

A *post* of a rank means that its block is in its slot. After a wait for the posts of all ranks, a
rank may read the other ranks' blocks. Ranks work one block ahead, so that waits seldom sleep:

    exchange       put 0  post 0 │ put 1  post 1 │ wait 0  take 0 │ put 2  post 2 │ wait 1  take 1

An all-reduce of more than two ranks needs a second exchange, of the results. Each rank reduces one
chunk of every block, and writes it to its own slot, over a chunk that no other rank reads:

    exchange_twice   put 0                             post 0
                     put 1   wait 0  reduce 0          post 1
                     put 2   wait 1  reduce 1  take 0  post 2   (wait 1: all have reduced 0)
                             wait 2  reduce 2  take 1  post 3
                             wait 3            take 2

Why four slots are enough: let post p publish a block.
  - All reads of the block and of its results come before the reader's post p + 2: in the first
    pattern before post p + 2 of the same operation, or before the first post of the next operation;
    in the second, reduce comes before post p + 1, take before post p + 2 (or the operation's end).
  - A rank that puts the block of post q has waited for all posts q - 2.
The slot is reused by the block of a post q >= p + 4 (other operations post, too), so its writer has
waited for post q - 2 >= p + 2 of every rank: all ranks have read the block.
"""

from collections.abc import Callable

from distplat.actors.collectives.header import Header, check_headers
from distplat.actors.collectives.shm.liveness import LivenessMonitor, RunningOp
from distplat.actors.collectives.shm.segment import SLOTS, GroupSegment
from distplat.actors.memory import futex

BlockStep = Callable[[int, int], None]
"""Called with the index of a block and its slot."""
_HALF, _ALL = 1 << 31, (1 << 32) - 1


class BlockPipeline:
    """
    Runs this rank's operations block by block, with posts and waits for the posts of other ranks.

    Slots are used round-robin across operations. Headers are compared after an operation's first
    wait, before any data of other ranks is read.

    Args:
        group: name of the group, for errors.
        segment: the ranks' shared memory.
        liveness: for waits.
    """

    def __init__(self, group: str, segment: GroupSegment, liveness: LivenessMonitor) -> None:
        self._group, self._segment, self._liveness = group, segment, liveness
        self._posts = self._slot = 0
        self._header = b""  #: of the current operation, until it is compared
        self._others = [r for r in range(segment.world) if r != segment.rank]
        self._cells = [segment.cell_of[r] for r in self._others]
        self._word = segment.words[segment.rank]
        self._op = RunningOp("rendezvous", 0)

    def begin(self, header: Header, op: RunningOp) -> None:
        """Write the header of an operation before its first post."""
        self._header, self._op = header.pack(op.number), op
        self._segment.write_header(op.number, self._header)

    def post(self) -> int:
        """Post, and return the number of the post."""
        self._word.post()
        self._posts = (self._posts + 1) & _ALL
        return self._posts

    def wait(self, number: int) -> None:
        """
        Wait until all ranks have made post `number`.

        Raises:
            MismatchError: the ranks have called different operations.
            CollectiveError: see `LivenessMonitor`.
        """
        cells = self._segment.cells
        for cell in self._cells:
            # A check without a system call: the difference is below 2^31 once the post is made.
            if not futex.LOADS_IN_ORDER or (cells[cell] - number) & _ALL >= _HALF:
                self._liveness.wait_for_all(number, self._op)
                break
        if self._header:
            self._compare()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.wait(self.post())

    def exchange(self, blocks: int, put: BlockStep, take: BlockStep) -> None:
        """Call `put` for each block, and `take` once all ranks have put theirs."""
        first = self._slot
        self._slot = (first + blocks) % SLOTS
        post = 0
        for block in range(blocks + 1):
            previous_post = post
            if block < blocks:
                put(block, (first + block) % SLOTS)
                post = self.post()
            if block:
                self.wait(previous_post)
                take(block - 1, (first + block - 1) % SLOTS)

    def exchange_twice(
        self, blocks: int, put: BlockStep, reduce: BlockStep, take: BlockStep
    ) -> None:
        """Call `put`, `reduce` once all ranks have put, and `take` once all have reduced."""
        first = self._slot
        self._slot = (first + blocks) % SLOTS
        post = 0
        for turn in range(blocks + 2):
            if turn < blocks:
                put(turn, (first + turn) % SLOTS)
            if turn:
                self.wait(post)
            if 1 <= turn <= blocks:
                reduce(turn - 1, (first + turn - 1) % SLOTS)
            if turn >= 2:
                take(turn - 2, (first + turn - 2) % SLOTS)
            if turn <= blocks:
                post = self.post()

    def between_barriers(self, operation: Callable[[], object]) -> None:
        """Run an operation on shared vectors between two barriers."""
        self.barrier()
        operation()
        self.barrier()

    def _compare(self) -> None:
        own_header, self._header = self._header, b""
        read, number = self._segment.read_header, self._op.number
        for rank in self._others:
            if read(rank, number) != own_header:
                ranks = range(self._segment.world)
                headers = [Header.unpack(read(rank, number)) for rank in ranks]
                check_headers(self._group, self._segment.rank, headers)
