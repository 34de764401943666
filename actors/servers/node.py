"""
The actor class of a server node, of parameters or of embedding tables.

The class is plain; `spawn.py` makes an actor of it. The module does not import torch, so that the
driver can import the class; the constructor imports torch in the actor's process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from distplat.actors.messages import TablePart
from distplat.actors.process_setup import quick_imports
from distplat.actors.ray_transport import alone
from distplat.actors.transport import Transport

if TYPE_CHECKING:
    from distplat.actors.servers.serving import Serving

_COMMON = ("poll", "where", "kept", "pull", "push", "log", "close")
_REPLICATION = ("held", "replicate_to", "take_over", "update", "promote", "alone")
_SHARDS = (
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
_TABLES = ("open", "begin", "sizes", "part")


class ServerNode:
    """
    Store one shard of the parameters, or a part of every embedding table.

    Methods forward to those of `ShardServing` or `TableServing`, which document them.

    Args:
        name: of the actor.
        transport: for calls to other actors; None: Ray's, for an actor with its own process.
        tables: the part of the tables to store; None: a shard.
    """

    def __init__(
        self, name: str, transport: Transport | None = None, tables: TablePart | None = None
    ) -> None:
        self._name, transport = name, transport or alone()
        with quick_imports():  # torch is imported in this process, not in the driver
            if tables is None:
                from distplat.actors.servers.shard_serving import ShardServing

                self.serving: Serving[Any] = ShardServing(name, transport)
            else:
                from distplat.actors.servers.table_serving import TableServing

                self.serving = TableServing(tables, transport)

    @override
    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name


def _forward(method: str) -> Callable[..., Any]:
    def call(self: ServerNode, *args: Any) -> Any:
        return getattr(self.serving, method)(*args)

    call.__name__, call.__doc__ = method, f"See `{method}` of `ShardServing` or `TableServing`."
    return call


for _method in _COMMON + _REPLICATION + _SHARDS + _TABLES:
    setattr(ServerNode, _method, _forward(_method))  # Ray finds only methods of the class
