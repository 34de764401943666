"""
Snapshots of the parameters of a running job, for evaluators and rollout processes.

    weights = distplat.weights("digits")        # in any process connected to the same Ray
    snapshot = weights.latest()                 # all parameters have the values of one step
    model.load_state_dict(snapshot.state)

On request, rank 0 copies its parameters between two steps; training does not wait for the transfer.
If the model is sharded, each rank of a replica copies its shard after an agreed step
(`platform/common_version.py`), and this module assembles the shards.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distplat.actors.overview import RunName, find_runs, named_actors
from distplat.actors.ray_transport import RayTransport
from distplat.actors.transport import ActorDied, AnswerPending, TransportError, Unanswered
from distplat.platform.common_version import CommonVersion
from distplat.platform.errors import ActorLost, DeadlineExceeded, NotReadyError
from distplat.platform.tensor_file import EMA_PREFIX
from distplat.platform.tensor_slices import Bundle, TensorSlice, assemble_tensors, group_by_file

if TYPE_CHECKING:
    from torch import Tensor

_RETRY_PAUSE_S = 0.02
"""Pause between requests to rank 0; most steps take longer."""


@dataclass(frozen=True)
class WeightsSnapshot:
    """Parameters and buffers of a model, all of one version."""

    run: str
    version: int
    """Steps after which the model had these values."""
    state: dict[str, Tensor]
    """State dict with tensors on the CPU."""


@dataclass(frozen=True)
class Reply:
    """A rank's answer to a request for weights."""

    steps: int
    """Number of steps that the rank has finished."""
    version: int = 0
    model: list[Any] | None = None
    """List with the reference of bytes in the safetensors format; None: ask again."""
    ranks: tuple[int, ...] = ()
    """Ranks that hold a shard of the model; empty where each rank holds all of it."""
    total: int = 0
    """Number of steps of the run; set for sharded models."""
    part: Bundle | None = None
    """This rank's shard; None: ask again."""


class Weights:
    """
    Access to the weights of one run.

    Args:
        name: name of the run.
    """

    def __init__(self, name: RunName) -> None:
        self.run, self._name = name.run, name
        self._workers: dict[int, Any] = {}

    def latest(self, *, newer_than: int = 0, timeout_s: float = 60.0) -> WeightsSnapshot:
        """
        Return the parameters after the current step.

        Args:
            newer_than: wait for a version above this one.
            timeout_s: deadline in seconds.

        Raises:
            DeadlineExceeded: no such version arrived in time.
            ActorLost: the run has ended, or rank 0 is lost and is not replaced.
        """
        deadline = time.monotonic() + timeout_s
        at_least, began = newer_than + 1, False
        while time.monotonic() < deadline:
            reply = self._ask(0, at_least, deadline)
            if reply is not None and reply.ranks:
                return self._latest_of_shards(reply, at_least, deadline, timeout_s)
            if reply is not None and not began:
                # A copy that was made for an earlier request may be stale.
                at_least, began = max(at_least, reply.steps), True
            elif reply is not None and reply.model is not None:
                if reply.version < at_least:
                    raise self._run_ended()
                if (snapshot := self._snapshot(reply, deadline)) is not None:
                    return snapshot
            else:
                time.sleep(_RETRY_PAUSE_S)
        raise self._deadline_exceeded(newer_than, (0,), timeout_s)

    def _latest_of_shards(
        self, first: Reply, at_least: int, deadline: float, timeout_s: float
    ) -> WeightsSnapshot:
        """Return the newest weights of a sharded model."""
        ranks, common = first.ranks, CommonVersion(at_least, first.total)
        steps_done: dict[int, int] = {}
        shards: dict[int, Bundle] = {}
        while time.monotonic() < deadline:
            target = common.target
            for rank in ranks:
                reply = None if rank in shards else self._ask(rank, target, deadline)
                if reply is not None:
                    steps_done[rank] = reply.steps
                    shards |= {rank: reply.part} if reply.part is not None else {}
            if len(steps_done) == len(ranks) and common.observe(steps_done, shards.keys()):
                return self._assemble(target, [shards[rank] for rank in ranks])
            if common.target != target:
                shards.clear()
            elif common.is_unreachable and min(steps_done.values(), default=0) == first.total:
                raise self._run_ended()
            time.sleep(_RETRY_PAUSE_S)
        raise self._deadline_exceeded(at_least - 1, tuple(set(ranks) - shards.keys()), timeout_s)

    def _deadline_exceeded(
        self, newer_than: int, ranks: tuple[int, ...], timeout_s: float
    ) -> DeadlineExceeded:
        what = f"weights of run {self.run} above version {newer_than}"
        late = tuple(f"worker-{rank}" for rank in sorted(ranks))
        return DeadlineExceeded(what, late, timeout_s, "timeout_s")

    def _ask(self, rank: int, version: int, deadline: float) -> Reply | None:
        """
        Request the weights of a rank; None: no answer, for example while the rank is replaced.

        Raises:
            ActorLost: the run has ended.
        """
        try:
            left = max(0.0, deadline - time.monotonic())
            if rank not in self._workers:
                self._workers[rank] = self._worker(rank, left)
            reply: Reply = RayTransport().get(self._workers[rank].weights.remote(version), left)
            return reply
        except (AnswerPending, Unanswered, NotReadyError):
            return None
        except (ActorDied, ValueError):  # ValueError: no actor of that name
            self._workers.pop(rank, None)
            if not named_actors().get(self.run):
                raise self._run_ended() from None
            return None

    def _worker(self, rank: int, timeout_s: float) -> Any:
        """Return a worker from the controller: a former spare is not named after its rank."""
        transport, controller = RayTransport(), self._name.actor("controller")
        worker = transport.get(transport.call(controller, "worker", rank), timeout_s)
        if worker is None:
            raise ActorDied(f"worker-{rank} has left")
        return worker

    def _run_ended(self) -> ActorLost:
        remedy = "if it ended well, its directory has the trained model"
        return ActorLost("worker-0", None, f"run {self.run} is over", remedy)

    def _snapshot(self, reply: Reply, deadline: float) -> WeightsSnapshot | None:
        """Fetch a model; None: it was lost with rank 0, or did not arrive in time."""
        from safetensors.torch import load  # imports torch, which only callers of this need

        assert reply.model is not None, "asked for only where there is one"
        try:
            model: bytes = RayTransport().get(reply.model[0], max(0.0, deadline - time.monotonic()))
        except TransportError:
            return None
        state = {k: v for k, v in load(model).items() if not k.startswith(EMA_PREFIX)}
        return WeightsSnapshot(self.run, reply.version, state)

    def _assemble(self, version: int, shards: list[Bundle]) -> WeightsSnapshot:
        # The import loads torch; see `_snapshot`.
        from distplat.strategies.checkpoint.checkpoint_reader import tensor_of

        model = group_by_file(assemble_tensors(shards))["model"]
        state = {
            name: tensor_of(tensor, TensorSlice(tensor.shape)).view(tensor.shape)
            for name, tensor in model.items()
        }
        return WeightsSnapshot(self.run, version, state)


def weights(name: str) -> Weights:
    """
    Find a run on the Ray cluster that this process is connected to.

    Args:
        name: name of a run, or of a job (its newest run).

    Raises:
        SpecError: no run of that name is active.
        DistplatError: this process is not connected to Ray.
    """
    return Weights(find_runs(name)[-1])
