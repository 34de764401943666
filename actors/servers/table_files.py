"""The embedding servers as sources of files: asked for one part at a time, none held longer."""

from functools import partial
from typing import Any

from distplat.actors.actor_group import ActorGroup
from distplat.actors.messages import TableMap
from distplat.actors.ray_transport import RayTransport
from distplat.actors.retrying_calls import ask
from distplat.platform.shard_map import TableSpec
from distplat.platform.spec import Job
from distplat.strategies.sparse.files import PartSource


class _Server:
    """One server (see `PartSource`)."""

    def __init__(self, handle: Any, name: str, limit_s: float) -> None:
        self._handle, self._name, self._limit_s = handle, name, limit_s

    def sizes(self) -> list[tuple[TableSpec, int]]:
        found: list[tuple[TableSpec, int]] = self._ask("sizes")
        return found

    def part(self, table: int, first: int, count: int) -> bytes:
        found: bytes = self._ask("part", table, first, count)
        return found

    def _ask(self, method: str, *args: Any) -> Any:
        transport, setting = RayTransport(), "step_timeout_s"
        call = partial(transport.call, self._handle, method, *args)
        return ask(transport, "saving tables", [call], [self._name], self._limit_s, setting)[0]


def sources_of(actor_group: ActorGroup, job: Job) -> list[PartSource]:
    """Give the servers of a run that has ended well, in order."""
    assert job.embeddings is not None, "only such jobs have servers of tables"
    limit, setting = job.failure.step_timeout_s, "step_timeout_s"
    if job.embeddings.replication == 1:
        names = [f"embedding-server-{index}" for index in range(job.embeddings.servers)]
        return [_Server(actor_group.roles[name], name, limit) for name in names]
    transport, manager = RayTransport(), actor_group.roles["server-manager"]
    call, who = partial(transport.call, manager, "table_servers", 0, 0.0), ["server-manager"]
    found: TableMap = ask(transport, "saving tables", [call], who, limit, setting)[0]
    pairs = zip(found.servers, found.names, strict=True)
    return [_Server(handle, name, limit) for handle, name in pairs]
