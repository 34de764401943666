"""
What Ray sees of a server node.

The class is plain; `spawn.py` makes an actor of it. It does not import torch here, so that the
driver may name it; a server node imports it while it is constructed, in its own process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distplat.actors.importing import quick_imports
from distplat.actors.messages import Address, Attached
from distplat.actors.ray_transport import alone
from distplat.actors.transport import Transport
from distplat.platform.ledger import Answer, PushId
from distplat.platform.server_group import Held, Role
from distplat.platform.shard_map import Shard, ShardPlan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from distplat.platform.spec import Job
    from distplat.platform.tensor_slices import RawTensor
    from distplat.strategies.ports import ShardCopy
    from distplat.strategies.training.mirror import Twin, Update


class ServerNode:
    """
    Keeps one shard of the parameters. See `Serving` for what each call does.

    Args:
        name: of the actor.
        transport: its way to other actors; None: Ray's, in a process of its own.
    """

    def __init__(self, name: str, transport: Transport | None = None) -> None:
        with quick_imports():
            from distplat.actors.servers.serving import Serving  # torch: here, not in the driver

        self._name, self._transport = name, transport or alone()
        self.serving = Serving(name, self._transport)

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def where(self) -> str:
        """Give the name of this server's node; also the answer that says: alive."""
        return self._transport.node

    def held(self) -> Held:
        """Say what this server keeps, and as what, to a manager that was not there before."""
        return self.serving.held()

    def speed(self, job: Job, world: int, dtype: str) -> float:
        """Measure how many elements this server updates in a second."""
        from distplat.strategies.training.throughput_probe import elements_per_s  # torch

        return elements_per_s(job, world, dtype)

    def assign(
        self,
        plan: ShardPlan,
        shard: Shard,
        total: int,
        dtype: str,
        parameters: Address | None,
        role: Role,
    ) -> Address:
        """Take over a shard."""
        return self.serving.assign(plan, shard, total, dtype, parameters, role)

    def attach(
        self,
        rank: int,
        number: tuple[int, int],
        world: int,
        gradients: Address | None,
        parameters: Address | None,
        held: tuple[int, NDArray[np.uint8]] | None,
    ) -> Attached:
        """Map a worker's segments."""
        return self.serving.attach(rank, number, world, gradients, parameters, held)

    def restore(
        self, version: int, values: NDArray[np.uint8] | None, state: Mapping[str, RawTensor]
    ) -> None:
        """Open for service."""
        self.serving.restore(version, values, state)

    def kept(self, version: int, limit_s: float) -> ShardCopy:
        """Give what was kept of a version for a checkpoint."""
        return self.serving.kept(version, limit_s)

    def earlier(self, version: int) -> NDArray[np.uint8]:
        """Give the parameters of the version before."""
        return self.serving.earlier(version)

    def pull(self, rank: int, number: tuple[int, int]) -> Answer:
        """Give the newest parameters."""
        return self.serving.pull(rank, number)

    def push(
        self, push: PushId, values: NDArray[np.uint8] | None, control: NDArray[np.float64]
    ) -> Answer:
        """Take a gradient, wait for the other ranks where the strategy says so."""
        return self.serving.push(push, values, control)

    def commit(self, rank: int, seq: int, norm: float | None) -> Answer:
        """Apply a staged step."""
        return self.serving.commit(rank, seq, norm)

    def seen(self) -> NDArray[np.bool_]:
        """Say which parameters have had a gradient yet, on any rank."""
        return self.serving.seen()

    def listen(
        self, run: str, attempt: int, rank: int, mailboxes: Address, slot: int, control: int
    ) -> None:
        """Answer a worker's mailbox; stays open."""
        self.serving.listen(run, attempt, rank, mailboxes, slot, control)

    def mirror_to(self, term: int, name: str, handle: Any) -> None:
        """Fill a backup and keep it up to date."""
        self.serving.mirror_to(term, name, handle)

    def take_over(self, term: int, twin: Twin, inbox: Address) -> bool:
        """Become a primary's backup."""
        return self.serving.take_over(term, twin, inbox)

    def update(self, term: int, update: Update, values: NDArray[np.uint8] | None) -> None:
        """Make the primary's update."""
        self.serving.update(term, update, values)

    def promote(self, term: int) -> Address:
        """Serve from now on."""
        return self.serving.promote(term)

    def alone(self, term: int) -> None:
        """Go on without the backup."""
        self.serving.alone(term)

    def log(self) -> NDArray[np.int64] | None:
        """Give the order of updates, if it is kept."""
        return self.serving.log()

    def close(self) -> None:
        """Let go of what a process's end would free."""
        self.serving.close()
