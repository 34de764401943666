"""
What Ray sees of a server node, of parameters or of embedding tables.

The class is plain; `spawn.py` makes an actor of it. It does not import torch here, so that the
driver may name it; a server node imports it while it is constructed, in its own process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distplat.actors.messages import TablePart
from distplat.actors.process_setup import quick_imports
from distplat.actors.ray_transport import alone
from distplat.actors.transport import Transport

if TYPE_CHECKING:
    from distplat.actors.servers.serving import Serving

_OF_ALL = ("poll", "where", "kept", "pull", "push", "log", "close")
_KEPT_TWICE = ("held", "replicate_to", "take_over", "update", "promote", "alone")
_OF_SHARDS = (
    "speed",
    "assign",
    "attach",
    "restore",
    "earlier",
    "commit",
    "seen",
    "settings",
    "left_out",
    "average",
    "listen",
    "leave",
    "optimizer_state",
)
_OF_TABLES = ("open", "begin", "sizes", "part")


class ServerNode:
    """
    Keeps one shard of the parameters, or a part of every embedding table.

    Its methods are those of `ShardServing` or of `TableServing`; see there for what each call does.

    Args:
        name: of the actor.
        transport: its way to other actors; None: Ray's, in a process of its own.
        tables: which part of the tables it keeps; None: it keeps a shard.
    """

    def __init__(
        self, name: str, transport: Transport | None = None, tables: TablePart | None = None
    ) -> None:
        self._name, transport = name, transport or alone()
        with quick_imports():  # torch: here, not in the driver
            if tables is None:
                from distplat.actors.servers.shard_serving import ShardServing

                self.serving: Serving[Any] = ShardServing(name, transport)
            else:
                from distplat.actors.servers.table_serving import TableServing

                self.serving = TableServing(tables, transport)

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name


def _passed_on(method: str) -> Callable[..., Any]:
    def call(self: ServerNode, *args: Any) -> Any:
        return getattr(self.serving, method)(*args)

    call.__name__, call.__doc__ = method, f"See `{method}` of what serves here."
    return call


for _method in _OF_ALL + _KEPT_TWICE + _OF_SHARDS + _OF_TABLES:
    setattr(ServerNode, _method, _passed_on(_method))  # as methods, for Ray looks for these
