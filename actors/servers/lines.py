"""
Lines from one worker to the servers of all shards: a bell where memory is shared, else calls.

A step of a server on this node is asked for by a bell (`memory/bells.py`), everything
else by a call.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from distplat.actors.asking import Call, ask
from distplat.actors.memory.bell import Request
from distplat.actors.memory.bells import Bells
from distplat.actors.messages import Address, Membership, WorkOrder
from distplat.platform.ledger import Answer
from distplat.platform.shard_map import Shard

ANSWER_GRACE_S = 10.0
"""A server times out by itself and says who is missing; only a frozen one needs ours on top."""

Question = Callable[[Any, Shard], Any]
"""Calls a server about its shard; gives the reference to its answer."""


class Lines:
    """
    How a worker asks the servers of one shard map.

    Args:
        order: the worker's orders.
        joined: the map, and who serves.
        look: called in waits; raises where they are of no use any more.
    """

    def __init__(self, order: WorkOrder, joined: Membership, look: Callable[[], None]) -> None:
        self._order, self._look = order, look
        self._servers, self.names = joined.servers, joined.names
        self.cuts = joined.shard_map.shards
        self._bells: Bells | None = None

    def hang_bells(self, node: str, near: set[int]) -> None:
        """Use bells to the shards that share memory with this node."""
        self._bells = Bells(node, near, self.names, self._listen, self._look)

    def close(self) -> None:
        """Take the bells down."""
        if self._bells is not None:
            self._bells.close()

    def step(
        self, what: str, request: Request, question: Question, setting: str = "step_timeout_s"
    ) -> list[Answer]:
        """Ask all servers for a part of a step: by bell where there is one, else by a call."""
        assert self._bells is not None, "bells are hung when the servers have said who is near"
        self._bells.ring(request)
        far = [cut for cut in self.cuts if cut.index not in self._bells.shards]
        called = self.ask(what, question, far, setting) if far else []
        answers = self._bells.answers(what, self._limit(setting), setting)
        answers |= {cut.index: answer for cut, answer in zip(far, called, strict=True)}
        return [answers[cut.index] for cut in self.cuts]

    def ask(
        self,
        what: str,
        question: Question,
        cuts: Sequence[Shard] | None = None,
        setting: str = "step_timeout_s",
    ) -> list[Any]:
        """
        Ask the servers of some shards, by default of all; answers come in the shards' order.

        Raises:
            ActorLost, DeadlineExceeded: a server is gone, or frozen.
            DistplatError: what a server raised.
        """
        cuts = self.cuts if cuts is None else cuts
        calls: list[Call] = [partial(question, self._servers[cut.index], cut) for cut in cuts]
        names = [self.names[cut.index] for cut in cuts]
        return ask(what, calls, names, self._limit(setting), setting, self._look)

    def _limit(self, setting: str) -> float:
        seconds: float = getattr(self._order.job.failure, setting)
        return seconds + ANSWER_GRACE_S

    def _listen(self, shard: int, bells: Address, slot: int) -> Any:
        order, server = self._order, self._servers[shard]
        return server.listen.remote(order.run, order.attempt, order.rank, bells, slot)
