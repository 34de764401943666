"""A worker's connections in one attempt: group, servers, tables, scheduler; created lazily."""

import logging
import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import override

from distplat.actors import ray_compat
from distplat.actors.messages import WorkOrder, rendezvous_key
from distplat.actors.transport import Transport
from distplat.platform.progress import StepReport
from distplat.platform.stop_order import StopOrder
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.loop.session import Ports
from distplat.strategies.ports import RunStore
from distplat.strategies.strategy_spec import GroupSpec

if TYPE_CHECKING:
    from distplat.actors.collectives.default_group import DefaultGroup
    from distplat.actors.collectives.group import CollectiveGroup
    from distplat.actors.collectives.rendezvous import GroupMember
    from distplat.actors.servers.leases import RemoteLeases
    from distplat.actors.servers.shards import RemoteShards
    from distplat.actors.servers.tables import RemoteTables

logger = logging.getLogger(__name__)


class RayRunStore(RunStore):
    """
    A `RunStore` in Ray's key-value store.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str) -> None:
        self._run = run

    @override
    def first(self, name: str, value: bytes) -> bytes:
        key = rendezvous_key(f"{self._run}#{name}")
        ray_compat.put_first(key, value)
        stored = ray_compat.get(key)
        return value if stored is None else stored


class Connection:
    """
    A worker's clients of one attempt; `stop` of another thread ends their waits.

    Args:
        transport: transport of the worker.
        attempt: the attempt.
    """

    def __init__(self, transport: Transport, attempt: int) -> None:
        self._transport, self.attempt = transport, attempt
        self._stop_order = StopOrder.NONE
        self._abandoned = threading.Event()
        self._group: CollectiveGroup | None = None
        self._servers: RemoteShards | None = None
        self._tables: RemoteTables | None = None
        self._leases: RemoteLeases | None = None
        self._default_group: DefaultGroup | None = None

    def ports(self, order: WorkOrder, prepared: Prepared) -> Ports:
        """
        Create the clients of the worker; joins the group, but does not call servers yet.

        Raises:
            DistplatError: a rank did not join, or the attempt was abandoned.
        """
        order = replace(order, job=prepared.job)  # may have learning rates of the task
        every = prepared.job.checkpoint.period(prepared.sampler.steps_per_epoch)
        return Ports(
            None if order.collective is None else self._form(order, order.collective),
            self._connect_shards(order, prepared.total_steps, every)
            if prepared.roles.servers
            else None,
            self._connect_tables(order, every),
            self._connect_scheduler(order, prepared),
            partial(self._connect_peers, order),
            RayRunStore(order.run),
        )

    def group(self, order: WorkOrder) -> "CollectiveGroup":
        """
        Join the group of all ranks, for a train function.

        Raises:
            DistplatError: a rank did not join, or the attempt was abandoned.
        """
        assert order.collective is not None, "only strategies with a group run train functions"
        if not order.job.scaling.use_gpu:
            return self._form(order, order.collective)
        from distplat.actors.collectives import rendezvous
        from distplat.actors.visible_gpus import ask_without_cuda, show_gpus

        ask_without_cuda()
        member = self._member(order, order.collective, "/gpus")
        show_gpus(rendezvous.exchange_locations(member), order.rank)  # before a group uses CUDA
        group = self._form(order, order.collective)
        if order.rank == 0:
            rendezvous.delete_locations(member.name)
        return group

    def default_group(self, order: WorkOrder) -> "DefaultGroup":
        """Return the object that creates torch's default process group on demand."""
        from distplat.actors.collectives.default_group import DefaultGroup

        assert order.collective is not None, "see `group`"
        member = self._member(order, order.collective, "/torch.distributed")
        self._default_group = DefaultGroup(member)
        return self._default_group

    def shards(self, order: WorkOrder) -> "RemoteShards | None":
        """Create a train function's client of the servers; None: the strategy has no servers."""
        if order.manager is None:
            return None
        return self._connect_shards(order, 1, 0)

    def _connect_shards(self, order: WorkOrder, steps: int, every: int) -> "RemoteShards":
        from distplat.actors.servers.shards import RemoteShards

        self._servers = RemoteShards(self._transport, order, steps, every, self._abandoned)
        return self._servers

    def _connect_peers(self, order: WorkOrder) -> "CollectiveGroup":
        """
        Create a group for models that need one under a strategy without a group.

        Its timeout is that of servers, which wait for the slowest rank of a step.
        """
        limit_s, setting = order.job.failure.step_timeout_s, "failure.step_timeout_s"
        return self._form(order, GroupSpec(timeout_s=limit_s, setting=setting))

    def _form(self, order: WorkOrder, spec: GroupSpec) -> "CollectiveGroup":
        from distplat.actors.collectives.ray_groups import create_group  # imported on demand

        member = self._member(order, spec)
        self._group = create_group(
            member.name, spec.backend, member.rank, member.world, member.settings
        )
        return self._group

    def _member(self, order: WorkOrder, spec: GroupSpec, suffix: str = "") -> "GroupMember":
        """Return this rank's membership in a group; `suffix` is appended to the group's name."""
        from distplat.actors.collectives.rendezvous import GroupMember, GroupSettings

        name, start_s = f"{order.run}/{order.attempt}{suffix}", order.job.failure.start_timeout_s
        settings = GroupSettings(spec.timeout_s, start_s, spec.debug, self._abandoned, spec.setting)
        return GroupMember(name, order.rank, order.job.scaling.world, settings)

    def _connect_tables(self, order: WorkOrder, every: int) -> "RemoteTables | None":
        """Create the client of the embedding tables; None: the job has no tables."""
        if not order.embedding_servers:
            return None
        from distplat.actors.servers.tables import RemoteTables

        self._tables = RemoteTables(self._transport, order, every, self._abandoned)
        return self._tables

    def _connect_scheduler(self, order: WorkOrder, prepared: Prepared) -> "RemoteLeases | None":
        """Create the client of the task scheduler; None: the strategy has no scheduler."""
        if order.scheduler is None:
            return None
        from distplat.actors.servers.leases import RemoteLeases

        bounded = prepared.roles.consistency.bound is not None
        self._leases = RemoteLeases(self._transport, order, bounded, self._abandoned)
        return self._leases

    def count(self, report: StepReport) -> None:
        """Report a step to the task scheduler, which tracks the speed of workers."""
        if self._leases is not None:
            self._leases.count(report)

    @property
    def stop_order(self) -> StopOrder:
        """Stop order of the attempt, which the worker checks between two steps."""
        return StopOrder.ABANDON if self._abandoned.is_set() else self._stop_order

    def stop(self, how: StopOrder) -> None:
        """Record a stop order; `ABANDON` also ends all waits for other processes."""
        if how is not StopOrder.ABANDON:
            self._stop_order = max(self._stop_order, how)
            return
        self._abandoned.set()
        group = self._group
        if group is not None:
            group.abort()

    def close(self) -> None:
        """
        Close all clients that were created.

        Raises nothing, because an exception may already be propagating.
        """
        ports = self._group, self._servers, self._tables, self._leases, self._default_group
        for port in ports:
            if port is None:
                continue
            try:
                port.close()
            except Exception:
                logger.warning("%s could not be closed", type(port).__name__, exc_info=True)
