"""
The controller: asks every actor how it is, tells the job's state, hands on what was finished.

It decides nothing; `platform/job.py` does. It runs in an actor on the driver's node, which ends
with the driver (I8). No question waits longer than a tick: a frozen actor leaves one call open
while the others go on being asked. `scale`, `scale_status`, `worker` and `make_server` may be
called from any thread.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from distplat.actors.actor_group import ActorGroup
from distplat.actors.checkpointing import Checkpoints
from distplat.actors.messages import PollResult
from distplat.actors.model_pieces import ModelPiece, in_pieces
from distplat.actors.ray_errors import Meaning, advice_for, as_ours, cause_of, meaning, taken_away
from distplat.actors.ray_transport import RayTransport
from distplat.actors.resizing import AsyncScaler, SyncScaler, check_scalable
from distplat.actors.retrying_calls import ask
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import ActorLost, DistplatError, Interrupted, Problem, SpecError
from distplat.platform.job import (
    End,
    Event,
    Failed,
    JobState,
    Joined,
    Left,
    Phase,
    PollAnswered,
    PollUnanswered,
    Resize,
    Tick,
)
from distplat.platform.progress import (
    EarlyStopReached,
    FailureEvent,
    Recovery,
    ReportAggregator,
    Resized,
    Saved,
    StepSummary,
    Summary,
)
from distplat.platform.recovery import Policy, Restart
from distplat.platform.scaling import ScaleRequest, ScaleRequests, ScaleStatus
from distplat.platform.spec import Failure
from distplat.platform.stop_order import StopOrder
from distplat.platform.tensor_file import decode, to_bytes

logger = logging.getLogger(__name__)

SAVE_S = 30.0
"""How long a run that is asked to stop may take to end a step, with a checkpoint of it."""
_AGAIN = "a second signal does not wait for it"
_TICK_S = 0.1
_SETTLING_TICK_S = 0.02
"""While workers stop and begin again nothing is computed."""
_HOLD_S = 0.5
"""Seconds for which an actor holds a poll open while training goes on: its death or its end is told
at once all the same, and ten polls a second would take processor time from the workers."""


class Controller:
    """
    Watches one run from start to end.

    Args:
        actor_group: its actors, which have their orders.
        limits: the job's deadlines.
        policy: what is done about failures.
        told: asked once per tick: whether somebody wants the run to stop, at once (`ABANDON`) or
            with a checkpoint (`SAVE`).
        checkpoints: takes the ranks' parts, and has what all go back to when state is lost.
    """

    def __init__(
        self,
        actor_group: ActorGroup,
        limits: Failure,
        policy: Policy,
        told: Callable[[], StopOrder],
        checkpoints: Checkpoints,
    ) -> None:
        self._actor_group, self._limits, self._told = actor_group, limits, told
        self._actors = actor_group.roles
        self._making = threading.Lock()  #: held by who makes servers, or ends and makes all
        self._open: dict[Any, tuple[str, float]] = {}  #: call -> (role, when it was asked)
        self._unreached: dict[str, float] = {}  #: role -> when its first call was lost, of late
        self._answers: dict[str, int] = {}  #: role -> number of its last answer
        self._alive: set[str] = set()  #: roles that have answered: the others may still be starting
        # Of a train function rank 0 alone reports.
        reporting = 1 if actor_group.job.own_loop else actor_group.world
        self._aggregator = ReportAggregator(
            reporting, checkpoints.step if actor_group.dynamic_tasks else None
        )
        self._requests = requests = ScaleRequests()
        self._async_scaler = (
            AsyncScaler(actor_group, requests) if actor_group.dynamic_tasks else None
        )
        self._sync_scaler = SyncScaler(actor_group, requests)  # where tasks are not leased
        self._clock = AwakeClock()  #: of all deadlines
        began, step = self._clock.now(), checkpoints.step
        self._state = JobState(actor_group.world, limits, began, policy, step=step)
        self._failed_at: float | None = None  #: when the present trouble was noticed
        self._last_order = -1, StopOrder.NONE  #: what workers were told last, and of which attempt
        self._halted_at: float | None = None  #: when the first worker stopped for a resize
        self._resized: Resized | None = None  #: to be told when all are at work
        self._ending = False  #: somebody wants the run to end before its last step
        self._stop_until: float | None = None  #: it was asked to stop: until when it takes a step
        self._trained = False  #: the last step was told
        self._holders = policy.holders
        self._checkpoints = checkpoints
        self.checkpoint_step = checkpoints.step  #: from which the present servers began
        self._report: Callable[[Summary], None] = lambda summary: None

    def run(self, report: Callable[[Summary], None]) -> bytes:
        """
        Wait for the end of the run; give the trained model.

        Args:
            report: takes each step and evaluation when its last rank has reported it, and failures
                after which the run goes on.

        Raises:
            DistplatError: why it failed.
            Interrupted: it was asked to stop; a checkpoint of its last step is on the disk, where
                the job may have one and `SAVE_S` were enough.
        """

        def observe(summary: Summary) -> None:
            if isinstance(summary, StepSummary):
                self._trained = summary.step == summary.of
            self._checkpoints.observe(summary)
            report(summary)

        self._report = observe
        try:
            self._watch()
        except Interrupted:
            self._checkpoints.drain()
            self._report_checkpoints()
            self._warn_of_loss()
            raise
        if self._state.error is not None:
            raise self._state.error
        return self._result()

    def _watch(self) -> None:
        """
        Ask and repair until the run is over.

        Raises:
            Interrupted: it was asked to stop, and did so before its last step.
        """
        while not self._state.over:
            self._check()
            self._poll_actors()
            self._collect_answers()
            for role, error in self._actor_group.look():
                self._actors.pop(role, None)
                self._state.handle(Failed(role, error, dead=True), self._clock.now())
            self._state.handle(Tick(), self._clock.now())
            self._repair()
            if self._state.phase is Phase.RUNNING and self._ending:
                self._state.handle(End(self._stop_until is not None), self._clock.now())
                self._stop_workers(time.monotonic())
            elif self._state.phase is Phase.RUNNING:
                self._scale()
                self._actor_group.keep_spares()
            self._report_checkpoints()
        ended = False  #: all had agreed on the run's end before they were asked to stop
        if self._state.error is None:
            self._report_rest()
            ended = not self._checkpoints.began(self._state.max_step)
        if self._stop_until is not None and not (self._trained or ended):
            raise Interrupted(signal.SIGTERM)

    def _warn_of_loss(self) -> None:
        """Say so where a run that takes a checkpoint as it stops has none of its last step."""
        last, newest = self._state.max_step, self._checkpoints.step
        if not self._actor_group.launch.saves_at_stop or newest >= last:
            return
        there = f"the newest one is of step {newest}" if newest else "there is none"
        why = "" if self._state.error is None else f" ({self._state.error})"
        text = "the run stopped after step %d without a checkpoint of it%s; %s"
        logger.warning(text, last, why, there)

    def _check(self) -> None:
        """
        See whether the run is asked to stop: then it ends after a step, with a checkpoint.

        Raises:
            Interrupted: none can be taken, or the step takes too long.
        """
        order, now = self._told(), self._clock.now()
        if order is StopOrder.NONE:
            return
        if self._stop_until is None:
            begun = self._state.phase is Phase.RUNNING
            unsaved = begun or self._state.max_step > self._checkpoints.step
            saves = self._actor_group.launch.saves_at_stop and unsaved and order is StopOrder.SAVE
            self._stop_until, self._ending = now + (SAVE_S if saves else 0.0), True
            if saves:
                text = "stopping after this step, with a checkpoint, if it ends within %g s; %s"
                logger.warning(text, SAVE_S, _AGAIN)
        if now >= self._stop_until or order is StopOrder.ABANDON:
            raise Interrupted(signal.SIGTERM)

    def settle(self) -> None:
        """
        After the end of a run that ended well, wait for checkpoints that are being written.

        Raises:
            StorageError: several could not be.
        """
        self._checkpoints.drain()
        self._checkpoints.settle()
        self._report_checkpoints()

    def scale(self, workers: int) -> ScaleRequest:
        """
        Ask for another number of workers; any thread may, and does not wait for them.

        Raises:
            SpecError: it cannot be had; says why.
        """
        check_scalable(self._actor_group, workers)
        refused = (self._async_scaler or self._sync_scaler).refusal(workers)
        if refused:
            raise SpecError(Problem(("--workers",), refused))
        return self._requests.submit(workers)

    def end_early(self) -> None:
        """End the run soon, as after its last step; any thread may call this, more than once."""
        self._ending = True

    def worker(self, rank: int) -> Any:
        """Give the handle of a rank's present worker; None: there is none. Any thread may ask."""
        return self._actor_group.workers.get(rank)

    def make_server(self, attempt: int, server: str, beside: str) -> Any:
        """Make a server node for the server manager; see `ActorGroup.make_server`."""
        with self._making:
            return self._actor_group.make_server(attempt, server, beside)

    def scale_status(self) -> ScaleStatus:
        """Tell what became of the last request; any thread may ask."""
        return self._requests.status()

    def _report_rest(self) -> None:
        for summary in self._aggregator.flush():
            self._report(summary)

    def _report_checkpoints(self) -> None:
        for finished in self._checkpoints.take_finished():
            if isinstance(finished, EarlyStopReached):
                self.end_early()  # the driver asks for it, too, some steps later
            if isinstance(finished, Saved) and self._actor_group.job.own_loop:
                self._state.checkpoint_saved(finished.step)
            self._report(finished)

    def _repair(self) -> None:
        """Carry out what the state has decided about a failure."""
        state, now = self._state, time.monotonic()
        if state.phase is Phase.SETTLING:
            self._stop_workers(now)
        if state.restart is not None:
            self._carry_out_restart(state.restart)
        if state.phase is Phase.RUNNING and self._failed_at is not None:
            self._report(Recovery(state.attempt, now - self._failed_at))
            self._failed_at = None
        if state.phase is Phase.RUNNING and self._resized is not None:
            self._report(replace(self._resized, seconds=now - (self._halted_at or now)))
            self._resized = self._halted_at = None

    def _stop_workers(self, now: float) -> None:
        """Tell all to stop: after the same step if nothing failed, at once if something did."""
        state = self._state
        self._halted_at = self._halted_at or (now if state.resize_in_progress else None)
        order = state.attempt, state.stop_order
        if order <= self._last_order:
            return
        self._last_order = order
        if state.stop_order is StopOrder.ABANDON:
            self._failed_at = self._failed_at or now
            if not state.can_recover:
                return
        ends = state.stop_order in (StopOrder.END, StopOrder.SAVE)
        if ends and self._actor_group.dynamic_tasks:
            self._actor_group.tell_scheduler("end_early", state.stop_order is StopOrder.SAVE)
        else:
            self._actor_group.stop(*order)

    def _scale(self) -> None:
        """Carry out requests to scale; a failure is repaired first."""
        if self._async_scaler is None:
            wanted = self._sync_scaler.advance(self._checkpoints.step)
            if wanted is not None:
                self._state.handle(Resize(wanted), self._clock.now())
            return
        for rank in self._async_scaler.carry_out(self._checkpoints.step):
            self._actors[f"worker-{rank}"] = self._actor_group.workers[rank]
            self._state.handle(Joined(rank), self._clock.now())

    def _carry_out_restart(self, restart: Restart) -> None:
        replaced = *(f"worker-{rank}" for rank in restart.replace), *restart.coordinators
        saved = self._checkpoints.newest() if restart.restarts_all else None
        if restart.restarts_all:
            self.checkpoint_step = saved.step if saved is not None else 0
        step = self.checkpoint_step if restart.restarts_all else self._state.max_step
        if self._state.error is not None:
            cause = str(self._state.error)
            self._report(FailureEvent(restart.attempt, step, cause, replaced, restart.wait_s))
            self._aggregator.rank_lost()
        until = time.monotonic() + restart.wait_s
        while time.monotonic() < until:
            self._check()
            time.sleep(_TICK_S)
        before = set(self._actors)
        with self._making:
            self._actor_group.carry_out(restart, saved, self._checkpoints.step)
        self._actors = self._actor_group.roles
        renewed = set(self._actors) if restart.restarts_all else set(replaced)
        renewed |= before ^ set(self._actors)
        self._alive -= renewed
        for role in renewed:
            self._answers.pop(role, None)
        self._unreached.clear()
        self._open = {call: asked for call, asked in self._open.items() if asked[0] not in renewed}
        self._checkpoints.begin(restart.attempt, self._actor_group.job)
        self._renumber(restart, step)
        self._state.restarted(self._clock.now(), step)

    def _renumber(self, restart: Restart, step: int) -> None:
        """Go on with as many workers as there are now."""
        if restart.restarts_all:
            (self._async_scaler or self._sync_scaler).all_restarted()
        elif "task-scheduler" in restart.coordinators and self._async_scaler is not None:
            self._async_scaler.resend()
        if self._async_scaler is not None:
            return
        world, before = self._actor_group.world, self._sync_scaler.world
        if restart.world is not None:
            self._sync_scaler.resized()
            self._holders = ()
            self._resized = Resized(restart.attempt, step + 1, before, world, 0.0)
        if self._actor_group.job.own_loop:
            return
        if restart.world is not None or restart.restarts_all:
            self._aggregator.resize(world, step)

    def _poll_actors(self) -> None:
        """Keep one question open to every actor."""
        asked = {role for role, _ in self._open.values()}
        now = self._clock.now()
        at_work = self._state.phase is Phase.RUNNING and not self._ending
        hold_s = _HOLD_S if at_work else _TICK_S
        for role, actor in self._actors.items():
            if role not in asked:
                number = self._answers.get(role, 0) + 1
                self._open[actor.poll.remote(number, hold_s)] = (role, now)

    def _collect_answers(self) -> None:
        """Take the answers of one tick."""
        began = time.monotonic()
        answered, silent = [], []
        tick_s = _TICK_S if self._state.phase is Phase.RUNNING else _SETTLING_TICK_S
        if self._open:
            calls = list(self._open)
            answered, silent = ray.wait(calls, num_returns=len(calls), timeout=tick_s)
        for call in answered:
            role, _ = self._open.pop(call)
            for event in self._events(role, call):
                self._state.handle(event, self._clock.now())
        now = self._clock.now()
        for call in silent:
            role, asked_at = self._open[call]
            if role in self._alive:
                self._state.handle(PollUnanswered(role, now - asked_at), now)
        if not silent:
            time.sleep(max(0.0, tick_s - (time.monotonic() - began)))

    def _events(self, role: str, call: Any) -> list[Event]:
        try:
            answer = ray.get(call, timeout=self._limits.heartbeat_timeout_s)
        except ray.exceptions.RayError as error:
            return [self._unanswered(role, error)]
        self._alive.add(role)
        self._answers[role] = self._answers.get(role, 0) + 1
        self._unreached.pop(role, None)
        if isinstance(answer, DistplatError):
            del self._actors[role]
            return [Failed(role, answer)]
        return self._on_poll_result(role, answer) if isinstance(answer, PollResult) else []

    def _unanswered(self, role: str, error: ray.exceptions.RayError) -> Event:
        """Tell why a question has no answer: one that was lost on its way is asked again."""
        error_meaning = meaning(error)
        if error_meaning in (Meaning.UNANSWERED, Meaning.LATE):
            now = self._clock.now()
            return PollUnanswered(role, now - self._unreached.setdefault(role, now))
        del self._actors[role]
        lost: DistplatError = as_ours(error)
        if error_meaning is Meaning.LOST:
            cause = cause_of(error)
            advice = advice_for(role, cause)
            lost = ActorLost(role, self._state.steps_done or None, cause, advice)
        return Failed(role, lost, dead=True, preempted=taken_away(error))

    def _on_poll_result(self, role: str, result: PollResult) -> list[Event]:
        rank = int(role.removeprefix("worker-"))
        self._actor_group.note_node(rank, result.node)
        for report in result.reports:
            for summary in self._aggregator.add(report):
                self._report(summary)
        for delivery in result.deliveries:
            self._checkpoints.take(delivery)
        if result.attempt != self._state.attempt:
            return []  # it has not yet taken the present order up
        if result.left:
            assert self._async_scaler is not None, "only who leases tasks is told to leave"
            del self._actors[role]
            self._async_scaler.left(rank)
            return [Left(rank)]
        prepared, node = result.prepared, result.host
        heard = PollAnswered(
            rank, result.beats, result.step, result.finished, prepared, node, result.loop
        )
        if result.error is None:
            return [heard]
        error, shown = result.error, result.traceback
        return [heard, Failed(role, error, prepared=prepared, node=node, traceback=shown)]

    def _result(self) -> bytes:
        """Fetch the model; where it is cut, each part, and put them together by name."""
        everybody = tuple(range(self._actor_group.world))
        parts = [self._model_part(ranks) for ranks in self._holders or (everybody,)]
        if len(parts) == 1:
            return parts[0]
        return to_bytes({k: v for part in parts for k, v in decode(part).items()})

    def _model_part(self, holders: tuple[int, ...]) -> bytes:
        """Ask the first rank that has a part; where it was lost at the last moment, the next."""
        lost: DistplatError | None = None
        for rank in holders:
            worker = self._actor_group.workers.get(rank)
            if worker is None:
                continue  # it has left
            try:
                return in_pieces(partial(self._model_piece, rank, worker))
            except DistplatError as error:
                lost = error
        assert lost is not None, "a part has at least one holder"
        raise lost

    def _model_piece(self, rank: int, worker: Any, first: int) -> ModelPiece:
        limit, setting = self._limits.start_timeout_s, "start_timeout_s"
        calls = {f"worker-{rank}": partial(worker.result.remote, first)}
        piece: ModelPiece = ask(RayTransport(), "the trained model", calls, limit, setting)[0]
        return piece
