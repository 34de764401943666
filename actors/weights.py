"""
Weights out: the parameters of a run that goes on, for an evaluator or a rollout process.

    weights = distplat.weights("digits")        # in any process that is connected to the same Ray
    snapshot = weights.latest()                 # all parameters after one and the same step
    model.load_state_dict(snapshot.state)

Rank 0 copies its parameters between two steps, when somebody has asked; nobody waits for anybody.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from distplat.actors.runs import RunName, find_runs, named_actors
from distplat.platform.errors import ActorLost, DeadlineExceeded

if TYPE_CHECKING:
    from torch import Tensor

_AGAIN_S = 0.02
"""Pause before rank 0 is asked again: most steps are longer."""


@dataclass(frozen=True)
class Snapshot:
    """Parameters and buffers of a model, all of one version."""

    run: str
    version: int
    """Steps that they have behind them."""
    state: dict[str, Tensor]
    """For `load_state_dict`, on the CPU."""


@dataclass(frozen=True)
class Reply:
    """Rank 0's answer to the question for weights."""

    steps: int
    """That it has done."""
    version: int = 0
    model: bytes | None = None
    """In the safetensors format; None: ask again."""


class Weights:
    """
    The weights of one run.

    Args:
        name: which.
    """

    def __init__(self, name: RunName) -> None:
        self.run, self._name = name.run, name
        self._rank_0: Any = None

    def latest(self, *, newer_than: int = 0, timeout_s: float = 60.0) -> Snapshot:
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
            reply = self._ask(at_least, until)
            if reply is not None and not began:
                # What was copied for somebody before may be old by now.
                at_least, began = max(at_least, reply.steps), True
            elif reply is not None and reply.model is not None:
                if reply.version < at_least:
                    raise self._over()
                return self._snapshot(reply)
            else:
                time.sleep(_AGAIN_S)
        what = f"weights of run {self.run} above version {newer_than}"
        raise DeadlineExceeded(what, ("worker-0",), timeout_s, "timeout_s")

    def _ask(self, at_least: int, until: float) -> Reply | None:
        """
        Ask rank 0; None: it does not answer, and may be in the middle of being replaced.

        Raises:
            ActorLost: the run is over.
            ProtocolError: no rank has all of the model.
        """
        try:
            if self._rank_0 is None:
                self._rank_0 = self._name.actor("worker-0")
            left = max(0.0, until - time.monotonic())
            reply: Reply = ray.get(self._rank_0.weights.remote(at_least), timeout=left)
            return reply
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayActorError, ValueError):  # ValueError: no actor of that name
            self._rank_0 = None
            if not named_actors().get(self.run):
                raise self._over() from None
            return None

    def _over(self) -> ActorLost:
        remedy = "if it ended well, its directory has the trained model"
        return ActorLost("worker-0", None, f"run {self.run} is over", remedy)

    def _snapshot(self, reply: Reply) -> Snapshot:
        from safetensors.torch import load  # torch: only who looks at weights

        assert reply.model is not None, "asked for only where there is one"
        return Snapshot(self.run, reply.version, load(reply.model))


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
