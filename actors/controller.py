"""
The controller: asks every actor how it is, tells the job's state, hands on what was finished.

It decides nothing; `platform/job.py` does. It runs in the driver, so that it ends with it and all
actors with both (I8). No question waits longer than a tick: a frozen actor leaves one call open
while the others go on being asked.
"""

import time
from collections.abc import Callable
from typing import Any

import ray

from distplat.actors.messages import News
from distplat.actors.spawn import Cast
from distplat.platform.errors import ActorLost, DeadlineExceeded, DistplatError
from distplat.platform.job import Event, Failed, Heard, JobState, Tick, Unanswered
from distplat.platform.progress import EvalSummary, Gathering, StepSummary
from distplat.platform.spec import Failure

_TICK_S = 0.1
_RESULT_TIMEOUT_S = 120.0

Summary = StepSummary | EvalSummary


class Controller:
    """
    Watches one run from start to end.

    Args:
        cast: its actors, which have their orders.
        limits: the job's deadlines.
        tell: takes each step and evaluation when its last rank has reported it.
        check: called once per tick; raises to end the run, for example on Ctrl-C.
    """

    def __init__(
        self,
        cast: Cast,
        limits: Failure,
        tell: Callable[[Summary], None],
        check: Callable[[], None],
    ) -> None:
        self._cast, self._limits, self._tell, self._check = cast, limits, tell, check
        self._actors: dict[str, Any] = {f"worker-{r}": w for r, w in enumerate(cast.workers)}
        if cast.manager is not None:
            self._actors["server-manager"] = cast.manager
        self._open: dict[Any, tuple[str, float]] = {}  #: call -> (role, when it was asked)
        self._up: set[str] = set()  #: roles that have answered: the others may still be starting
        self._gathering = Gathering(len(cast.workers))
        self._state = JobState(len(cast.workers), limits, time.monotonic())

    def run(self) -> bytes:
        """
        Wait for the end of the run; give rank 0's trained model.

        Raises:
            DistplatError: why it failed.
        """
        while not self._state.over:
            self._check()
            self._ask_everybody()
            self._listen()
            self._state.handle(Tick(), time.monotonic())
        if self._state.error is not None:
            raise self._state.error
        return self._result()

    def _ask_everybody(self) -> None:
        """Keep one question open to every actor."""
        asked = {role for role, _ in self._open.values()}
        now = time.monotonic()
        for role, actor in self._actors.items():
            if role not in asked:
                self._open[actor.poll.remote()] = (role, now)

    def _listen(self) -> None:
        """Take the answers of one tick."""
        began = time.monotonic()
        answered, silent = [], []
        if self._open:
            calls = list(self._open)
            answered, silent = ray.wait(calls, num_returns=len(calls), timeout=_TICK_S)
        for call in answered:
            role, _ = self._open.pop(call)
            self._hear(role, call)
        now = time.monotonic()
        for call in silent:
            role, asked_at = self._open[call]
            if role in self._up:
                self._state.handle(Unanswered(role, now - asked_at), now)
        if not silent:
            time.sleep(max(0.0, _TICK_S - (now - began)))

    def _hear(self, role: str, call: Any) -> None:
        for event in self._events(role, call):
            self._state.handle(event, time.monotonic())

    def _events(self, role: str, call: Any) -> list[Event]:
        try:
            answer = ray.get(call, timeout=self._limits.heartbeat_timeout_s)
        except ray.exceptions.RayActorError as error:
            del self._actors[role]
            cause = str(error).strip().splitlines()[0]
            return [Failed(role, ActorLost(role, self._state.steps_done or None, cause))]
        self._up.add(role)
        if isinstance(answer, DistplatError):
            del self._actors[role]
            return [Failed(role, answer)]
        if not isinstance(answer, News):
            return []
        for report in answer.reports:
            summary = self._gathering.add(report)
            if summary is not None:
                self._tell(summary)
        rank = int(role.removeprefix("worker-"))
        events: list[Event] = [Heard(rank, answer.beats, answer.step, answer.finished)]
        if answer.error is not None:
            del self._actors[role]
            events.append(Failed(role, answer.error))
        return events

    def _result(self) -> bytes:
        try:
            state: bytes = ray.get(self._cast.workers[0].result.remote(), timeout=_RESULT_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError:
            what = "the trained model"
            raise DeadlineExceeded(what, ("worker-0",), _RESULT_TIMEOUT_S, "none") from None
        except ray.exceptions.RayActorError as error:
            raise ActorLost("worker-0", self._state.steps_done, str(error)) from None
        return state
