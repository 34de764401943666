"""
Spare workers: a process on each node that has imported the task and replaces a lost worker.

    worker-1   train ─────✗
    spare-0    import ──▶ waits ──▶ is worker-1: builds model and data, receives the peers' state
    spare-1                         import ──▶ waits

A spare requests no resources from Ray. The resources of the lost worker stay reserved by its
placement group (`actors/spawn.py`), and the spare uses them on the lost worker's node.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from distplat.actors.messages import WorkOrder
from distplat.actors.stopping import call_all
from distplat.actors.transport import AnswerPending, Transport, TransportError, Unanswered
from distplat.platform.errors import DistplatError

logger = logging.getLogger(__name__)

_ANSWER_S = 10.0
"""
Seconds for a spare to answer `ping`.

A spare that is still importing torch answers late, because loading a shared library holds the GIL.
A new process would only start that import.
"""


@dataclass(frozen=True)
class _Spare:
    actor: Any
    reply: Any
    """Reply of the call `import_task`."""


class Spares:
    """
    The spares of one run, one on each node with workers.

    Args:
        transport: transport of the calls.
        create: starts a spare, given its node and its number in the run.
        order: returns the order with the task to import.
        answer_s: seconds after which a spare without an answer counts as frozen.
    """

    def __init__(
        self,
        transport: Transport,
        create: Callable[[str, int], Any],
        order: Callable[[], WorkOrder],
        answer_s: float = _ANSWER_S,
    ) -> None:
        self._transport, self._create, self._order = transport, create, order
        self._answer_s = answer_s
        self._by_node: dict[str, _Spare] = {}
        self._failed_nodes: set[str] = set()  #: nodes where the imports failed
        self._count = 0

    def keep(self, nodes: Iterable[str]) -> None:
        """Start a spare on each of these nodes that has none, except where the imports failed."""
        self._drop_failed()
        for node in sorted({*nodes} - self._by_node.keys() - self._failed_nodes):
            actor = self._create(node, self._count)
            self._count += 1
            reply = self._transport.call(actor, "import_task", self._order())
            self._by_node[node] = _Spare(actor, reply)

    def take(self, node: str) -> Any:
        """Remove and return the spare of a node; None: the node has no live spare."""
        spare = self._by_node.pop(node, None)
        if spare is None:
            return None
        try:
            self._transport.get(self._transport.call(spare.actor, "ping"), self._answer_s)
        except (TransportError, DistplatError) as error:
            logger.warning("the spare worker on node %s is not used: %s", node[:8], error)
            self._transport.kill(spare.actor)
            return None
        return spare.actor

    def end(self) -> None:
        """Kill all spares."""
        spares, self._by_node = self._by_node, {}
        call_all([partial(self._transport.kill, spare.actor) for spare in spares.values()])

    def _drop_failed(self) -> None:
        """Kill the spares whose imports failed; a worker on that node will report the error."""
        replies = {spare.reply: node for node, spare in self._by_node.items()}
        answered = self._transport.wait([*replies], 0.0, everything=True) if replies else []
        for reply in answered:
            node = replies[reply]
            try:
                self._transport.get(reply, self._answer_s)
            except (Unanswered, AnswerPending):
                pass  # the state is unknown; `take` pings the spare
            except (TransportError, DistplatError) as error:
                logger.warning("no spare worker on node %s: %s", node[:8], error)
                self._failed_nodes.add(node)
                self._transport.kill(self._by_node.pop(node).actor)
