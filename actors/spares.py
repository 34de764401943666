"""
A process on each node that takes a lost worker's place: it has imported torch and the task.

    worker-1   train ─────✗
    spare-0    import ──▶ waits ──▶ is worker-1: builds model and data, takes the others' state
    spare-1                         import ──▶ waits

A spare asks Ray for no resources. Those of the lost worker are reserved by its placement group
(`actors/spawn.py`), and the spare may use them where they are: on the lost worker's node.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from distplat.actors.messages import WorkOrder
from distplat.actors.stopping import end_each
from distplat.actors.transport import AnswerPending, Transport, TransportError, Unanswered
from distplat.platform.errors import DistplatError

logger = logging.getLogger(__name__)

_ANSWER_S = 10.0
"""
How long a spare may take to say that it is there.

One that still imports torch answers once a shared library is loaded: the loader holds the GIL.
A new process would only begin with that.
"""


@dataclass(frozen=True)
class _Spare:
    actor: Any
    reply: Any
    """Reply of the call that has it import torch and the task."""


class Spares:
    """
    The spares of one run, one on each node that has workers.

    Args:
        transport: by which they are called.
        make: asks for one, given its node and its number in this run.
        order: gives what it is to import.
        answer_s: seconds after which one that does not answer is taken to be frozen.
    """

    def __init__(
        self,
        transport: Transport,
        make: Callable[[str, int], Any],
        order: Callable[[], WorkOrder],
        answer_s: float = _ANSWER_S,
    ) -> None:
        self._transport, self._make, self._order = transport, make, order
        self._answer_s = answer_s
        self._by_node: dict[str, _Spare] = {}  #: by node
        self._failed_nodes: set[str] = set()  #: nodes on which the imports have failed
        self._made = 0

    def keep(self, nodes: Iterable[str]) -> None:
        """Keep one on each of these nodes, except where its imports have failed."""
        self._look()
        for node in sorted({*nodes} - self._by_node.keys() - self._failed_nodes):
            actor = self._make(node, self._made)
            self._made += 1
            reply = self._transport.call(actor, "import_task", self._order())
            self._by_node[node] = _Spare(actor, reply)

    def take(self, node: str) -> Any:
        """Give the spare of a node, which is no spare any more; None: there is none that lives."""
        spare = self._by_node.pop(node, None)
        if spare is None:
            return None
        try:
            self._transport.get(self._transport.call(spare.actor, "is_there"), self._answer_s)
        except (TransportError, DistplatError) as error:
            logger.warning("the spare worker on node %s is not used: %s", node[:8], error)
            self._transport.kill(spare.actor)
            return None
        return spare.actor

    def end(self) -> None:
        """End all of them."""
        spares, self._by_node = self._by_node, {}
        end_each([partial(self._transport.kill, spare.actor) for spare in spares.values()])

    def _look(self) -> None:
        """Let those go whose imports have failed: a worker that has to do the same says why."""
        replies = {spare.reply: node for node, spare in self._by_node.items()}
        answered = self._transport.wait([*replies], 0.0, everything=True) if replies else []
        for reply in answered:
            node = replies[reply]
            try:
                self._transport.get(reply, self._answer_s)
            except (Unanswered, AnswerPending):
                pass  # nobody is sure; `take` asks
            except (TransportError, DistplatError) as error:
                logger.warning("no spare worker on node %s: %s", node[:8], error)
                self._failed_nodes.add(node)
                self._transport.kill(self._by_node.pop(node).actor)
