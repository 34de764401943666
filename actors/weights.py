"""
Weights out: the parameters of a run that goes on, for an evaluator or a rollout process.

    weights = distplat.weights("digits")        # in any process that is connected to the same Ray
    snapshot = weights.latest()                 # all parameters after one and the same step
    model.load_state_dict(snapshot.state)

Rank 0 copies its parameters between two steps, when somebody has asked; nobody waits for anybody.
Where the model is cut, each rank of a replica copies its part, after a step on which all of them
are asked to agree beforehand (`platform/checkpoints.py`); they are put together here.
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

_AGAIN_S = 0.02
"""Pause before rank 0 is asked again: most steps are longer."""


@dataclass(frozen=True)
class WeightsSnapshot:
    """Parameters and buffers of a model, all of one version."""

    run: str
    version: int
    """Steps after which the model had these values."""
    state: dict[str, Tensor]
    """For `load_state_dict`, on the CPU."""


@dataclass(frozen=True)
class Reply:
    """A rank's answer to the question for weights."""

    steps: int
    """Steps that the rank has finished."""
    version: int = 0
    model: list[Any] | None = None
    """List with the reference of bytes in the safetensors format; None: ask again."""
    ranks: tuple[int, ...] = ()
    """Ranks that hold a shard of the model; empty where each rank holds all of it."""
    total: int = 0
    """Steps of the run; set for sharded models."""
    part: Bundle | None = None
    """This rank's shard; None: ask again."""


class Weights:
    """
    The weights of one run.

    Args:
        name: which.
    """

    def __init__(self, name: RunName) -> None:
        self.run, self._name = name.run, name
        self._workers: dict[int, Any] = {}

    def latest(self, *, newer_than: int = 0, timeout_s: float = 60.0) -> WeightsSnapshot:
        """
        Give the parameters as they are after the step under way.

        Args:
            newer_than: wait for a version above this one.
            timeout_s: deadline.

        Raises:
            DeadlineExceeded: no such version came in time.
            ActorLost: the run is over, or has lost rank 0 and does not replace it.
        """
        until = time.monotonic() + timeout_s
        at_least, began = newer_than + 1, False
        while time.monotonic() < until:
            reply = self._ask(0, at_least, until)
            if reply is not None and reply.ranks:
                return self._latest_of_parts(reply, at_least, until, timeout_s)
            if reply is not None and not began:
                # What was copied for somebody before may be old by now.
                at_least, began = max(at_least, reply.steps), True
            elif reply is not None and reply.model is not None:
                if reply.version < at_least:
                    raise self._over()
                if (snapshot := self._snapshot(reply, until)) is not None:
                    return snapshot
            else:
                time.sleep(_AGAIN_S)
        raise self._too_late(newer_than, (0,), timeout_s)

    def _latest_of_parts(
        self, first: Reply, at_least: int, until: float, timeout_s: float
    ) -> WeightsSnapshot:
        """Give the newest weights of a model that is cut."""
        ranks, common = first.ranks, CommonVersion(at_least, first.total)
        passed: dict[int, int] = {}
        parts: dict[int, Bundle] = {}
        while time.monotonic() < until:
            target = common.target
            for rank in ranks:
                reply = None if rank in parts else self._ask(rank, target, until)
                if reply is not None:
                    passed[rank] = reply.steps
                    parts |= {rank: reply.part} if reply.part is not None else {}
            if len(passed) == len(ranks) and common.observe(passed, parts.keys()):
                return self._together(target, [parts[rank] for rank in ranks])
            if common.target != target:
                parts.clear()
            elif common.is_unreachable and min(passed.values(), default=0) == first.total:
                raise self._over()
            time.sleep(_AGAIN_S)
        raise self._too_late(at_least - 1, tuple(set(ranks) - parts.keys()), timeout_s)

    def _too_late(
        self, newer_than: int, ranks: tuple[int, ...], timeout_s: float
    ) -> DeadlineExceeded:
        what = f"weights of run {self.run} above version {newer_than}"
        late = tuple(f"worker-{rank}" for rank in sorted(ranks))
        return DeadlineExceeded(what, late, timeout_s, "timeout_s")

    def _ask(self, rank: int, version: int, until: float) -> Reply | None:
        """
        Ask a rank; None: it does not answer, and may be in the middle of being replaced.

        Raises:
            ActorLost: the run is over.
        """
        try:
            left = max(0.0, until - time.monotonic())
            if rank not in self._workers:
                self._workers[rank] = self._worker(rank, left)
            reply: Reply = RayTransport().get(self._workers[rank].weights.remote(version), left)
            return reply
        except (AnswerPending, Unanswered, NotReadyError):
            return None
        except (ActorDied, ValueError):  # ValueError: no actor of that name
            self._workers.pop(rank, None)
            if not named_actors().get(self.run):
                raise self._over() from None
            return None

    def _worker(self, rank: int, timeout_s: float) -> Any:
        """Ask the controller for a worker: one that was a spare has a spare's name with Ray."""
        transport, controller = RayTransport(), self._name.actor("controller")
        worker = transport.get(transport.call(controller, "worker", rank), timeout_s)
        if worker is None:
            raise ActorDied(f"worker-{rank} has left")
        return worker

    def _over(self) -> ActorLost:
        remedy = "if it ended well, its directory has the trained model"
        return ActorLost("worker-0", None, f"run {self.run} is over", remedy)

    def _snapshot(self, reply: Reply, until: float) -> WeightsSnapshot | None:
        """Fetch a model; None: it was lost with rank 0, or did not come in time."""
        from safetensors.torch import load  # torch: only who looks at weights

        assert reply.model is not None, "asked for only where there is one"
        try:
            model: bytes = RayTransport().get(reply.model[0], max(0.0, until - time.monotonic()))
        except TransportError:
            return None
        state = {k: v for k, v in load(model).items() if not k.startswith(EMA_PREFIX)}
        return WeightsSnapshot(self.run, reply.version, state)

    def _together(self, version: int, parts: list[Bundle]) -> WeightsSnapshot:
        from distplat.strategies.checkpoint.checkpoint_reader import (
            tensor_of,  # torch: see `_snapshot`
        )

        model = group_by_file(assemble_tensors(parts))["model"]
        state = {
            name: tensor_of(whole, TensorSlice(whole.shape)).view(whole.shape)
            for name, whole in model.items()
        }
        return WeightsSnapshot(self.run, version, state)


def weights(name: str) -> Weights:
    """
    Find a run on the Ray that this process is connected to.

    Args:
        name: of a job, or of a run; of several runs of a job, the newest is meant.

    Raises:
        SpecError: nothing of that name is running.
        DistplatError: this process is not connected to Ray.
    """
    return Weights(find_runs(name)[-1])
