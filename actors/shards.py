"""The port `Shards` over Ray: control by actor calls, bytes by the fastest road (`roads.py`)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from torch import Tensor

from distplat.actors.asking import Call, ask
from distplat.actors.messages import Membership, ModelFacts, WorkOrder
from distplat.actors.roads import PrivateRoad, SharedRoad
from distplat.platform.ledger import Answer, PushId
from distplat.platform.pieces import Whole
from distplat.platform.shard_map import Shard
from distplat.strategies.base import Pushed
from distplat.strategies.ports import ShardCopy
from distplat.strategies.training.client import fetch_copies, pushed, wait_for_all
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.parts import whole_of
from distplat.strategies.training.restoring import SavedState

logger = logging.getLogger(__name__)

_ANSWER_GRACE_S = 10.0
"""A server times out by itself and says who is missing; only a frozen one needs ours on top."""


class RayShards:
    """
    The server group, seen by one worker.

    Args:
        order: the worker's orders, with the manager's handle.
        total_steps: updates in the run; servers need it for the learning rate.
        checkpoint_every: steps between two checkpoints; 0: there are none.
    """

    def __init__(self, order: WorkOrder, total_steps: int, checkpoint_every: int = 0) -> None:
        self._order, self._total_steps = order, total_steps
        self._checkpoint_every = checkpoint_every
        self._limits = order.job.failure
        self._pulls = 0

    def connect(self, flat: FlatModel, saved: SavedState | None = None) -> None:
        """See `Shards`."""
        self._flat = flat
        self._on_device = flat.params.device.type != "cpu"
        facts = ModelFacts(
            flat.size,
            str(flat.params.dtype)[6:],
            flat.digest(),
            self._total_steps,
            self._checkpoint_every,
        )
        join = partial(self._order.manager.join.remote, self._order.rank, facts)
        limit = self._limits.start_timeout_s + _ANSWER_GRACE_S
        name = "the server manager"
        joined: Membership = ask("join", [join], [name], limit, "start_timeout_s")[0]
        self._servers, self._cuts = joined.servers, joined.shard_map.shards
        self._open_road(facts, joined)
        self._take_over(saved)

    def _open_road(self, facts: ModelFacts, joined: Membership) -> None:
        kind = PrivateRoad if joined.private else SharedRoad
        self._road = road = kind(ray.get_runtime_context().get_node_id(), facts, joined)
        addresses = (road.gradient_address, road.parameter_address)
        asked = road.candidates()
        cuts = [self._cuts[index] for index in asked]
        mapped = self._ask(
            "attach", lambda server, cut: server.attach.remote(self._order.rank, *addresses), cuts
        )
        road.open({index for index, is_near in zip(asked, mapped, strict=True) if is_near})
        near = sorted(road.near)
        far = [cut.index for cut in self._cuts if cut.index not in road.near]
        logger.info("servers reached by shared memory: %s, by Ray objects: %s", near, far)

    def _take_over(self, saved: SavedState | None) -> None:
        """Rank 0 fills the servers with its parameters; everybody goes on with the servers'."""
        road = self._road
        if self._order.rank == 0:
            initial = self._flat.params.cpu()
            for cut in self._cuts:
                if cut.index in road.near:
                    road.put(cut, initial)
            state = saved.optimizer(self._flat) if saved is not None else {}
            self._ask(
                "restore",
                lambda server, cut: server.restore.remote(
                    self._flat.version, road.payload(cut, initial), _run_of(state, cut)
                ),
            )
        self._pull("start_timeout_s")
        if not self._on_device:
            self._flat.move(road.parameters, road.gradients)

    def push(self, step: int) -> Pushed:
        """See `Shards`."""
        road = self._road
        if self._on_device:
            road.gradients.copy_(self._flat.grads)
        push = PushId(self._order.run, self._order.attempt, self._order.rank, step)
        answers: list[Answer] = self._ask(
            f"push {step}",
            lambda server, cut: server.push.remote(push, road.payload(cut, road.gradients)),
        )
        result = pushed(answers)
        if result.norm is None:
            self._take(answers)
        return result

    def commit(self, step: int, norm: float) -> None:
        """See `Shards`."""
        rank = self._order.rank
        self._take(
            self._ask(f"commit {step}", lambda server, cut: server.commit.remote(rank, step, norm))
        )

    def refresh(self) -> None:
        """See `Shards`."""
        self._pull("step_timeout_s")

    def copies(self, version: int) -> list[ShardCopy] | None:
        """See `Shards`."""

        def ask_one(cut: Shard, limit_s: float) -> ShardCopy:
            what = f"what {version} steps have come to"
            question = lambda server, cut: server.kept.remote(version, limit_s)  # noqa: E731
            answer: ShardCopy = self._ask(what, question, [cut])[0]
            return answer

        asks = [partial(ask_one, cut) for cut in self._cuts]
        return fetch_copies(asks, version, self._limits.step_timeout_s)

    def finish(self, alive: Callable[[], None]) -> None:
        """See `Shards`."""

        def look(limit_s: float) -> list[list[int]]:
            what = "the last step"
            return self._ask(what, lambda server, cut: server.wait_for_all.remote(limit_s))

        wait_for_all(look, self._total_steps, self._limits.step_timeout_s, alive)
        self.refresh()

    def _pull(self, setting: str) -> None:
        rank, number = self._order.rank, self._pulls
        answers = self._ask(
            f"pull {number}", lambda server, cut: server.pull.remote(rank, number), setting=setting
        )
        self._pulls += 1
        self._take(answers)

    def _take(self, answers: list[Answer]) -> None:
        """Bring the parameters here, as far as they are not here already."""
        for cut, answer in zip(self._cuts, answers, strict=True):
            self._road.take(cut, answer, self._limits.step_timeout_s)
        if self._on_device:
            self._flat.params.copy_(self._road.parameters)

    def _ask(
        self,
        what: str,
        question: Callable[[Any, Shard], Any],
        cuts: Sequence[Shard] | None = None,
        setting: str = "step_timeout_s",
    ) -> list[Any]:
        """
        Ask the servers of some shards, by default of all; answers come in the shards' order.

        Raises:
            ActorLost, DeadlineExceeded: a server is gone, or frozen.
            DistplatError: what a server raised.
        """
        cuts = self._cuts if cuts is None else cuts
        calls: list[Call] = [partial(question, self._servers[cut.index], cut) for cut in cuts]
        names = [f"server-{cut.index}" for cut in cuts]
        limit: float = getattr(self._limits, setting) + _ANSWER_GRACE_S
        return ask(what, calls, names, limit, setting)


def _run_of(state: Mapping[str, Tensor], cut: Shard) -> dict[str, Whole]:
    """Give a shard's part of what an optimizer remembers of the flat vector."""
    return {
        name: whole_of(value[cut.start : cut.stop] if value.ndim else value)
        for name, value in state.items()
    }
