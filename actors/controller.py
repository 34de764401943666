"""
Controller loop: polls all actors, drives the job's state machine, and forwards reports.

Decisions are made in `platform/job.py`. The controller runs in an actor on the driver's node, which
ends with the driver (I8). Polls never block the loop: a frozen actor leaves one call pending while
the other actors are still polled. `scale`, `scale_status`, `worker` and `make_server` are
thread-safe.
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
from distplat.actors.model_pieces import ModelPiece, fetch_pieces
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
"""Seconds for a run that receives a stop request to finish its step and write a checkpoint."""
_AGAIN = "a second signal does not wait for it"
_TICK_S = 0.1
_SETTLING_TICK_S = 0.02
"""Tick while workers stop and restart: no training competes for the processor."""
_HOLD_S = 0.5
"""Seconds for which an actor holds a poll open during training: ten polls a second would take
processor time from the workers. A death or the end of an attempt is still reported at once."""


class Controller:
    """
    Watches one run from start to end.

    Args:
        actor_group: actors of the run; their orders have been sent.
        limits: deadlines of the job.
        policy: failure policy.
        stop_requested: called once per tick; returns whether to stop the run at once (`ABANDON`)
            or with a checkpoint (`SAVE`).
        checkpoints: collects the ranks' parts, and provides the checkpoint to restart from when
            state is lost.
    """

    def __init__(
        self,
        actor_group: ActorGroup,
        limits: Failure,
        policy: Policy,
        stop_requested: Callable[[], StopOrder],
        checkpoints: Checkpoints,
    ) -> None:
        self._actor_group, self._limits = actor_group, limits
        self._stop_requested = stop_requested
        self._actors = actor_group.roles
        self._spawn_lock = threading.Lock()  #: held while servers are created or all restarted
        self._open: dict[Any, tuple[str, float]] = {}  #: pending poll -> (role, time of the call)
        self._unreached: dict[str, float] = {}  #: role -> time of the first of its lost calls
        self._answers: dict[str, int] = {}  #: role -> number of the last answered poll
        self._alive: set[str] = set()  #: roles that have answered; others may still be starting
        # In a train function only rank 0 reports.
        reporting_ranks = 1 if actor_group.job.own_loop else actor_group.world
        self._aggregator = ReportAggregator(
            reporting_ranks, checkpoints.step if actor_group.dynamic_tasks else None
        )
        self._requests = requests = ScaleRequests()
        self._async_scaler = (
            AsyncScaler(actor_group, requests) if actor_group.dynamic_tasks else None
        )
        self._sync_scaler = SyncScaler(actor_group, requests)  # unused if tasks are leased
        self._clock = AwakeClock()  #: clock of all deadlines
        start, step = self._clock.now(), checkpoints.step
        self._state = JobState(actor_group.world, limits, start, policy, step=step)
        self._failed_at: float | None = None  #: detection time of the current failure
        self._last_order = -1, StopOrder.NONE  #: attempt and value of the last stop order sent
        self._halted_at: float | None = None  #: time at which the current resize began
        self._resized: Resized | None = None  #: to be reported once all workers train again
        self._ending = False  #: the run is to end before its last step
        self._stop_deadline: float | None = None  #: of the step in flight, after a stop request
        self._trained = False  #: the last step was reported
        self._holders = policy.holders
        self._checkpoints = checkpoints
        self.checkpoint_step = checkpoints.step  #: loaded by the current servers
        self._report: Callable[[Summary], None] = lambda summary: None

    def run(self, report: Callable[[Summary], None]) -> bytes:
        """
        Run until the job ends; return the trained model.

        Args:
            report: called with each step and evaluation once all ranks have reported it, and with
                each failure from which the run recovers.

        Raises:
            DistplatError: the run failed.
            Interrupted: the run received a stop request. A checkpoint of its last step is on disk
                if checkpoints are enabled and `SAVE_S` sufficed.
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
            self._warn_if_unsaved()
            raise
        if self._state.error is not None:
            raise self._state.error
        return self._result()

    def _watch(self) -> None:
        """
        Poll actors and repair failures until the run is over.

        Raises:
            Interrupted: the run stopped on request before its last step.
        """
        while not self._state.over:
            self._check_stop()
            self._poll_actors()
            self._collect_answers()
            for role, error in self._actor_group.poll_orders():
                self._actors.pop(role, None)
                self._state.handle(Failed(role, error, dead=True), self._clock.now())
            self._state.handle(Tick(), self._clock.now())
            self._repair()
            if self._state.phase is Phase.RUNNING and self._ending:
                self._state.handle(End(self._stop_deadline is not None), self._clock.now())
                self._stop_workers(time.monotonic())
            elif self._state.phase is Phase.RUNNING:
                self._scale()
                self._actor_group.keep_spares()
            self._report_checkpoints()
        ended = False  # ranks agreed on the end of the run before the stop request
        if self._state.error is None:
            self._report_rest()
            ended = not self._checkpoints.started(self._state.max_step)
        if self._stop_deadline is not None and not (self._trained or ended):
            raise Interrupted(signal.SIGTERM)

    def _warn_if_unsaved(self) -> None:
        """Log a warning if a run that saves when it stops has no checkpoint of its last step."""
        last, newest = self._state.max_step, self._checkpoints.step
        if not self._actor_group.launch.saves_at_stop or newest >= last:
            return
        state = f"the newest one is of step {newest}" if newest else "there is none"
        why = "" if self._state.error is None else f" ({self._state.error})"
        text = "the run stopped after step %d without a checkpoint of it%s; %s"
        logger.warning(text, last, why, state)

    def _check_stop(self) -> None:
        """
        Check for a stop request; the run then ends after the current step, with a checkpoint.

        Raises:
            Interrupted: no checkpoint is possible, or the step takes too long.
        """
        order, now = self._stop_requested(), self._clock.now()
        if order is StopOrder.NONE:
            return
        if self._stop_deadline is None:
            running = self._state.phase is Phase.RUNNING
            unsaved = running or self._state.max_step > self._checkpoints.step
            saves = self._actor_group.launch.saves_at_stop and unsaved and order is StopOrder.SAVE
            self._stop_deadline, self._ending = now + (SAVE_S if saves else 0.0), True
            if saves:
                text = "stopping after this step, with a checkpoint, if it ends within %g s; %s"
                logger.warning(text, SAVE_S, _AGAIN)
        if now >= self._stop_deadline or order is StopOrder.ABANDON:
            raise Interrupted(signal.SIGTERM)

    def finish_checkpoints(self) -> None:
        """
        Wait for pending checkpoint writes; called after the run has succeeded.

        Raises:
            StorageError: several checkpoints could not be written.
        """
        self._checkpoints.drain()
        self._checkpoints.finish()
        self._report_checkpoints()

    def scale(self, workers: int) -> ScaleRequest:
        """
        Request another number of workers and return without waiting for them. Thread-safe.

        Raises:
            SpecError: the run cannot have that number of workers.
        """
        check_scalable(self._actor_group, workers)
        refused = (self._async_scaler or self._sync_scaler).refusal(workers)
        if refused:
            raise SpecError(Problem(("--workers",), refused))
        return self._requests.submit(workers)

    def end_early(self) -> None:
        """End the run after the next step as after its last one. Thread-safe and idempotent."""
        self._ending = True

    def worker(self, rank: int) -> Any:
        """Return the handle of a rank's current worker, or None. Thread-safe."""
        return self._actor_group.workers.get(rank)

    def make_server(self, attempt: int, server: str, beside: str) -> Any:
        """Create a server node for the server manager; see `ActorGroup.make_server`."""
        with self._spawn_lock:
            return self._actor_group.make_server(attempt, server, beside)

    def scale_status(self) -> ScaleStatus:
        """Return the status of the last scale request. Thread-safe."""
        return self._requests.status()

    def _report_rest(self) -> None:
        for summary in self._aggregator.flush():
            self._report(summary)

    def _report_checkpoints(self) -> None:
        for finished in self._checkpoints.take_finished():
            if isinstance(finished, EarlyStopReached):
                self.end_early()  # the driver requests this, too, but some steps later
            if isinstance(finished, Saved) and self._actor_group.job.own_loop:
                self._state.checkpoint_saved(finished.step)
            self._report(finished)

    def _repair(self) -> None:
        """Carry out the decisions of the state machine: stop, restart, report the recovery."""
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
        """Send the stop order: at once after a failure, else after the step all ranks agree on."""
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
        ends_run = state.stop_order in (StopOrder.END, StopOrder.SAVE)
        if ends_run and self._actor_group.dynamic_tasks:
            self._actor_group.order_scheduler("end_early", state.stop_order is StopOrder.SAVE)
        else:
            self._actor_group.stop(*order)

    def _scale(self) -> None:
        """Carry out scale requests; called only while no failure is being repaired."""
        if self._async_scaler is None:
            world = self._sync_scaler.advance(self._checkpoints.step)
            if world is not None:
                self._state.handle(Resize(world), self._clock.now())
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
        deadline = time.monotonic() + restart.wait_s
        while time.monotonic() < deadline:
            self._check_stop()
            time.sleep(_TICK_S)
        before = set(self._actors)
        with self._spawn_lock:
            self._actor_group.carry_out(restart, saved, self._checkpoints.step)
        self._actors = self._actor_group.roles
        renewed = set(self._actors) if restart.restarts_all else set(replaced)
        renewed |= before ^ set(self._actors)
        self._alive -= renewed
        for role in renewed:
            self._answers.pop(role, None)
        self._unreached.clear()
        self._open = {call: poll for call, poll in self._open.items() if poll[0] not in renewed}
        self._checkpoints.begin(restart.attempt, self._actor_group.job)
        self._renumber(restart, step)
        self._state.restarted(self._clock.now(), step)

    def _renumber(self, restart: Restart, step: int) -> None:
        """Update scalers and aggregator to the number of workers of the new attempt."""
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
        """Keep one poll open to every actor."""
        polled = {role for role, _ in self._open.values()}
        now = self._clock.now()
        training = self._state.phase is Phase.RUNNING and not self._ending
        hold_s = _HOLD_S if training else _TICK_S
        for role, actor in self._actors.items():
            if role not in polled:
                number = self._answers.get(role, 0) + 1
                self._open[actor.poll.remote(number, hold_s)] = (role, now)

    def _collect_answers(self) -> None:
        """Wait one tick, and handle the polls answered in that time."""
        start = time.monotonic()
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
            role, polled_at = self._open[call]
            if role in self._alive:
                self._state.handle(PollUnanswered(role, now - polled_at), now)
        if not silent:
            time.sleep(max(0.0, tick_s - (time.monotonic() - start)))

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
        """Return the event of a failed poll; a poll lost by the transport is repeated."""
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
            return []  # the worker has not yet started the current attempt
        if result.left:
            assert self._async_scaler is not None, "only workers that lease tasks are dismissed"
            del self._actors[role]
            self._async_scaler.left(rank)
            return [Left(rank)]
        prepared, node = result.prepared, result.host
        answer = PollAnswered(
            rank, result.beats, result.step, result.finished, prepared, node, result.loop
        )
        if result.error is None:
            return [answer]
        error, traceback = result.error, result.traceback
        return [answer, Failed(role, error, prepared=prepared, node=node, traceback=traceback)]

    def _result(self) -> bytes:
        """Fetch the trained model; parts of a partitioned model are merged by name."""
        all_ranks = tuple(range(self._actor_group.world))
        parts = [self._model_part(ranks) for ranks in self._holders or (all_ranks,)]
        if len(parts) == 1:
            return parts[0]
        return to_bytes({k: v for part in parts for k, v in decode(part).items()})

    def _model_part(self, holders: tuple[int, ...]) -> bytes:
        """Fetch a model part from its first holder; if that worker was lost, from the next."""
        lost: DistplatError | None = None
        for rank in holders:
            worker = self._actor_group.workers.get(rank)
            if worker is None:
                continue  # the worker has left the run
            try:
                return fetch_pieces(partial(self._model_piece, rank, worker))
            except DistplatError as error:
                lost = error
        assert lost is not None, "a part has at least one holder"
        raise lost

    def _model_piece(self, rank: int, worker: Any, first: int) -> ModelPiece:
        limit, setting = self._limits.start_timeout_s, "start_timeout_s"
        calls = {f"worker-{rank}": partial(worker.result.remote, first)}
        piece: ModelPiece = ask(RayTransport(), "the trained model", calls, limit, setting)[0]
        return piece
