"""The driver's client of the controller: each event arrives once, despite lost messages."""

import logging
import random
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from call_faults import Call, Fault, add_rule, inject
from jobs import job_of

from distplat.actors import controller_actor, controller_client, model_pieces, retrying_calls
from distplat.actors.controller_actor import ControllerActor, FileToKeep, ModelReady
from distplat.actors.controller_client import ControllerClient, RunHandlers
from distplat.actors.local_transport import Actor, LocalCluster
from distplat.actors.model_pieces import ModelPiece, fetch_pieces, piece_of
from distplat.actors.ray_errors import UNREACHABLE
from distplat.actors.retrying_calls import Outbox
from distplat.platform.disk import run_in_thread
from distplat.platform.errors import (
    ActorLost,
    ClusterUnreachable,
    DeadlineExceeded,
    DistplatError,
    Interrupted,
    Problem,
    SpecError,
    StorageError,
)
from distplat.platform.progress import Saved, StepSummary
from distplat.platform.stop_order import StopOrder

STEPS = 30
GROUP: Any = SimpleNamespace(
    launch=SimpleNamespace(job=job_of(failure={"start_timeout_s": 20}), saves_at_stop=False),
)
SAVES: Any = SimpleNamespace(
    launch=SimpleNamespace(**{**vars(GROUP.launch), "saves_at_stop": True})
)


class Run(ControllerActor):
    """A controller whose run reports invented events, and waits for `resume` after step 5."""

    starts = 0
    resume: threading.Event | None = None  #: None: it does not wait

    def _run(self, actor_group: object, checkpoint_step: int) -> None:
        self.starts += 1
        for step in range(checkpoint_step + 1, STEPS + 1):
            self._outbox.put(StepSummary(step, 0, 0.5, 8, {}, STEPS))
            time.sleep(0.002)
            if step == 5 and self.resume is not None:
                assert self.resume.wait(60)
        self._model = b"the model"
        self._outbox.put(ModelReady())
        for number in range(3):
            self._outbox.put(FileToKeep(f"table-{number}", bytes([number])))


class Failing(Run):
    """Fails after the model is ready."""

    def _run(self, actor_group: object, checkpoint_step: int) -> None:
        super()._run(actor_group, checkpoint_step)
        raise StorageError("a table cannot be read")


class Broken(Run):
    """Raises an internal error."""

    def _run(self, actor_group: object, checkpoint_step: int) -> None:
        raise KeyError("a defect")


class RunsUntilStopped(Run):
    """Makes steps until `stop`, and then one more."""

    last = 0
    stop_orders: tuple[StopOrder, ...] = ()

    def stop(self, timeout_s: float, saves: bool = False) -> str:
        self.stop_orders += (StopOrder.SAVE if saves else StopOrder.ABANDON,)
        return super().stop(timeout_s, saves)

    def end_early(self) -> None:
        super().stop(0.0)

    def _run(self, actor_group: object, checkpoint_step: int) -> None:
        while not self._stop_order:
            self.last += 1
            self._outbox.put(StepSummary(self.last, 0, 0.5, 8, {}, 10**9))
            time.sleep(0.002)
        self.last += 1
        self._outbox.put(StepSummary(self.last, 0, 0.5, 8, {}, 10**9))
        raise Interrupted(15)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying_calls, "RETRY_PAUSE_S", 0.001)
    monkeypatch.setattr(controller_actor, "_send_records", lambda outbox: None)
    logging.getLogger(retrying_calls.__name__).setLevel(logging.ERROR)


class Driver:
    """Follows a controller, and records the events in order."""

    def __init__(self, controller: type[Run] = Run, *, saves: bool = False) -> None:
        self.cluster = LocalCluster()
        self.actor: Actor = self.cluster.spawn(
            "controller", "here", lambda _: controller("controller")
        )
        group = SAVES if saves else GROUP
        self.client = ControllerClient(self.cluster.transport(), self.actor, group, 0)
        self.events: list[object] = []

    @property
    def sorted_events(self) -> list[object]:
        """The events, steps before files: another thread writes files."""
        return sorted(self.events, key=lambda event: not isinstance(event, int))

    def follow(self, check: Any = lambda: None, look: Any = lambda: None) -> None:
        handlers = RunHandlers(
            lambda summary: self.events.append(cast(StepSummary, summary).step),
            lambda model: self.events.append(model),
            lambda name, content: self.events.append(name),
        )
        self.client.follow(check, handlers, look)


ALL = [*range(1, STEPS + 1), b"the model", "table-0", "table-1", "table-2"]


def lossy(seed: int) -> Any:
    """Return a rule that loses a quarter of the messages each way, repeats and delays some."""
    rng = random.Random(seed)

    def rule(call: Call) -> Fault:
        lose: Any = rng.choices(("", "request", "reply"), (50, 25, 25))[0]
        delay = rng.choice((0.0, 0.0, 0.01))
        return Fault(delay, rng.choice((0.0, 0.01)), lose, rng.random() < 0.2)

    return rule


@pytest.mark.parametrize("seed", range(8))
def test_each_event_arrives_once_and_in_order(seed: int) -> None:
    driver = Driver()
    add_rule(driver.cluster, lossy(seed))
    driver.follow()
    assert driver.sorted_events == ALL
    assert driver.actor.body.starts == 1


@pytest.mark.parametrize("method", ["begin", "poll", "result", "stop"])
@pytest.mark.parametrize("lost", ["request", "reply"])
def test_repeats_lost_calls(method: str, lost: Any) -> None:
    driver = Driver()
    inject(driver.cluster, method, Fault(lose=lost), times=3)
    driver.follow()
    driver.client.end()
    assert driver.sorted_events == ALL


@pytest.mark.parametrize("method", ["begin", "poll", "result"])
def test_logs_repeated_calls_in_the_thread_of_callbacks(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logging may block on a terminal, and must not block the thread that polls."""
    driver, records = Driver(), list[tuple[str, int]]()

    class Terminal(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append((record.getMessage(), threading.get_ident()))

    for module in (retrying_calls, controller_client):
        monkeypatch.setattr(module.logger, "handlers", [Terminal(logging.WARNING)])
    monkeypatch.setattr(retrying_calls.logger, "level", logging.WARNING)
    inject(driver.cluster, method, Fault(lose="reply"))
    driver.follow()
    assert driver.sorted_events == ALL
    operation = "start" if method == "begin" else "an answer"
    message = f"{operation}: no answer from controller, asking again"
    assert records == [(message, threading.get_ident())]


@pytest.mark.parametrize("size", [1, 4, 8, 9, 10])
def test_fetches_a_large_model_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is a separate call with its own deadline, repeated if lost."""
    monkeypatch.setattr(model_pieces, "PIECE_BYTES", size)
    driver, offsets = Driver(), list[int]()
    add_rule(driver.cluster, lossy(size))
    monkeypatch.setattr(driver.actor.body, "result", recording(offsets, driver.actor.body.result))
    driver.follow()
    assert driver.sorted_events == ALL
    assert sorted(set(offsets)) == list(range(0, len(b"the model"), size))


def test_stops_fetching_the_model_if_follow_has_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_pieces, "PIECE_BYTES", 1)
    driver, offsets = Driver(), list[int]()
    driver.actor.body._model = b"the model"
    real = recording(offsets, driver.actor.body.result)

    def result(first: int) -> ModelPiece:
        if first == 3:
            driver.client._left.set()
        return real(first)

    monkeypatch.setattr(driver.actor.body, "result", result)
    handlers = RunHandlers(driver.events.append, driver.events.append, lambda name, content: None)
    with pytest.raises(DistplatError, match="has returned"):
        driver.client._take(ModelReady(), handlers)
    assert offsets == [0, 1, 2, 3] and driver.events == []


def recording(
    offsets: list[int], fetch: Callable[[int], ModelPiece]
) -> Callable[[int], ModelPiece]:
    """Return `fetch`, which also appends the offset of each call."""

    def result(first: int) -> ModelPiece:
        offsets.append(first)
        return fetch(first)

    return result


def test_empty_model_is_one_piece() -> None:
    assert fetch_pieces(lambda first: piece_of(b"", first)) == b""


def test_hanging_callback_does_not_delay_saving_the_model() -> None:
    """After Ctrl-C the model and the tables are on disk."""
    driver, all_saved = Driver(), threading.Event()

    def hang(summary: object) -> None:
        assert all_saved.wait(60)
        raise KeyboardInterrupt

    def keep(name: str, content: bytes) -> None:
        driver.events.append(name)
        if name == "table-2":
            all_saved.set()

    handlers = RunHandlers(hang, driver.events.append, keep)
    with pytest.raises(KeyboardInterrupt):
        driver.client.follow(lambda: None, handlers)
    assert driver.events == ALL[STEPS:]


def test_signal_waits_for_the_current_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_client, "_LEAVE_S", 0.0)
    driver, writing = Driver(), threading.Event()

    def check() -> None:
        if writing.is_set():
            raise Interrupted(15)

    def write(model: bytes) -> None:
        writing.set()
        assert driver.client._left.wait(60)
        driver.events.append(model)

    handlers = RunHandlers(lambda summary: None, write, lambda name, content: None)
    with pytest.raises(Interrupted):
        driver.client.follow(check, handlers)
    assert driver.events == [b"the model"], "the write was not completed"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted(2)])
def test_reports_failed_save_of_the_model_if_a_signal_ends_the_run(
    error: BaseException, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback hangs until Ctrl-C; the KeyboardInterrupt has a note on the lost model."""
    monkeypatch.setattr(controller_client, "_LEAVE_S", 60.0)
    driver, failed = Driver(), threading.Event()

    def hang(summary: object) -> None:
        assert failed.wait(60)
        raise error

    def fail(model: bytes) -> None:
        failed.set()
        raise StorageError("the disk is full")

    with pytest.raises(type(error)) as caught:
        driver.client.follow(lambda: None, RunHandlers(hang, fail, lambda name, content: None))
    assert caught.value.__notes__ == ["before that: the disk is full"]
    assert "before that: the disk is full" in caplog.text


def test_second_signal_does_not_wait_for_the_current_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller_client, "_LEAVE_S", 0.0)
    driver, writing, done = Driver(), threading.Event(), threading.Event()

    def check() -> None:
        if writing.is_set():
            raise KeyboardInterrupt

    def write(model: bytes) -> None:
        writing.set()
        if not done.wait(60):
            driver.events.append("waited")

    handlers = RunHandlers(lambda summary: None, write, lambda name, content: None)
    with pytest.raises(KeyboardInterrupt):
        driver.client.follow(check, handlers)
    done.set()
    assert driver.events == []


def test_callback_error_ends_the_run_after_the_thread_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller_client, "_LEAVE_S", 60.0)
    driver, threads = Driver(), list[Any]()

    def start(name: str, work: Callable[[], Any]) -> Any:
        threads.append(run_in_thread(name, work))
        return threads[-1]

    monkeypatch.setattr(controller_client, "run_in_thread", start)

    def fail(summary: object) -> None:
        raise SpecError(Problem(("early_stop", "metric"), "there is no such figure"))

    handlers = RunHandlers(fail, driver.events.append, lambda name, content: None)
    with pytest.raises(SpecError, match="no such figure"):
        driver.client.follow(lambda: None, handlers)
    assert [thread.done() for thread in threads] == [True]
    with pytest.raises(DistplatError, match="has returned"):
        driver.client._write(lambda: driver.events.append("late"))
    assert "late" not in driver.events


def test_saves_the_model_despite_later_failures() -> None:
    driver = Driver(Failing)
    with pytest.raises(StorageError, match="a table cannot be read"):
        driver.follow()
    assert driver.sorted_events == ALL


def test_reports_internal_errors_of_the_controller() -> None:
    with pytest.raises(Exception, match="in the controller: KeyError: 'a defect'") as caught:
        Driver(Broken).follow()
    assert getattr(caught.value, "exit_code", None) == 70


class SavesCheckpoint(Run):
    """Reports a checkpoint before its first step."""

    def _run(self, actor_group: object, checkpoint_step: int) -> None:
        self._outbox.put(Saved(0, "step-000000", 1, 0.1))
        super()._run(actor_group, checkpoint_step)


@pytest.mark.parametrize(
    ("controller", "remedy"),
    [
        (SavesCheckpoint, "last checkpoint: submit --resume"),
        (Run, "there is no checkpoint to resume from"),
    ],
)
def test_error_names_lost_controller_and_last_step(controller: type[Run], remedy: str) -> None:
    driver = Driver(controller)
    resume = driver.actor.body.resume = threading.Event()

    def check() -> None:
        if 5 in driver.events:
            driver.actor.die("killed by the test")
            resume.set()

    with pytest.raises(ActorLost, match=rf"controller was lost after step \d+: .*{remedy}"):
        driver.follow(check)
    driver.client.end()


def test_loss_before_the_first_step_suggests_no_resume() -> None:
    driver = Driver()
    inject(driver.cluster, "begin", Fault(kill="before"))
    with pytest.raises(ActorLost, match="controller was lost") as caught:
        driver.follow()
    assert "--resume" not in str(caught.value)


def test_unreachable_controller_at_start_is_a_cluster_error() -> None:
    """For example only one of driver and cluster has a token: the run itself has no fault."""
    driver = Driver()
    driver.actor.die(UNREACHABLE)
    with pytest.raises(ClusterUnreachable, match="RAY_AUTH_MODE") as caught:
        driver.follow()
    assert caught.value.exit_code == 3
    later = Driver()
    inject(later.cluster, "poll", Fault(then=lambda: later.actor.die(UNREACHABLE)))
    with pytest.raises(ActorLost, match="controller was lost"):
        later.follow()


def test_errors_of_the_driver_propagate_unchanged() -> None:
    driver = Driver()
    resume = driver.actor.body.resume = threading.Event()

    def check() -> None:
        if 5 in driver.events:
            resume.set()
            raise ActorLost("the head of the Ray cluster", None, "silent")

    with pytest.raises(ActorLost, match="the head of the Ray cluster was lost: silent"):
        driver.follow(check)


@pytest.mark.parametrize(
    ("method", "setting"), [("poll", "heartbeat_timeout_s"), ("result", "start_timeout_s")]
)
def test_unresponsive_controller_exceeds_the_deadline(method: str, setting: str) -> None:
    driver = Driver()
    driver.client._limits = driver.client._limits.model_copy(update={setting: 0.3})
    inject(driver.cluster, method, Fault(delay_s=1e6), times=100)
    with pytest.raises(DeadlineExceeded, match=rf"missing: controller; `failure.{setting}`"):
        driver.follow()


def test_signal_is_handled_while_a_reply_is_missing() -> None:
    driver, polled = Driver(), threading.Event()

    def rule(call: Call) -> Fault | None:
        if call.method != "poll":
            return None
        polled.set()
        return Fault(delay_s=1e6)

    add_rule(driver.cluster, rule)

    def check() -> None:
        if polled.is_set():
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        driver.follow(check)


@pytest.mark.parametrize("ends", ["signal", "early"])
def test_checks_for_the_end_between_two_events_of_one_reply(ends: str) -> None:
    """A slow callback for thousands of events must not delay the end of the run."""
    driver, all_queued = Driver(RunsUntilStopped, saves=True), threading.Event()
    steps, checked_after = list[int](), list[int]()

    def on_step(summary: Any) -> None:
        assert all_queued.wait(60)
        steps.append(summary.step)

    def check() -> None:
        if ends == "signal" and len(steps) >= 10:
            checked_after.append(len(steps))
            raise Interrupted(2)

    def early() -> bool:
        if ends == "early" and len(steps) >= 10:
            checked_after.append(len(steps))
            return True
        return False

    def rule(call: Call) -> Fault | None:
        if driver.actor.body.last > 100:
            all_queued.set()
        return None

    add_rule(driver.cluster, rule)
    handlers = RunHandlers(on_step, lambda model: None, lambda name, content: None, early)
    with pytest.raises(Interrupted):
        driver.client.follow(check, handlers)
    driver.client.end()
    assert checked_after[0] == 10
    assert steps == [*range(1, driver.actor.body.last + 1)], "later events are reported as well"


def interrupt_after_step_5(driver: Driver, look: Any = lambda: None) -> BaseException:
    """Interrupt a driver after its fifth step; return the error that it raises."""

    def check() -> None:
        if 5 in driver.events:
            raise Interrupted(2)

    with pytest.raises((Interrupted, KeyboardInterrupt)) as caught:
        driver.follow(check, look)
    driver.client.end()
    return caught.value


@pytest.mark.parametrize("seed", range(3))
def test_reports_events_after_a_signal_until_the_run_stops(seed: int) -> None:
    driver = Driver(RunsUntilStopped, saves=True)
    add_rule(driver.cluster, lossy(seed))
    error = interrupt_after_step_5(driver)
    assert getattr(error, "exit_code", None) == 130, "not the driver's own signal"
    assert driver.events == [*range(1, driver.actor.body.last + 1)]
    assert driver.actor.body.stop_orders[0] is StopOrder.SAVE


def test_signal_ends_a_run_without_checkpoint_at_once() -> None:
    driver = Driver(RunsUntilStopped)
    assert isinstance(interrupt_after_step_5(driver), Interrupted)
    assert {*driver.actor.body.stop_orders} == {StopOrder.ABANDON}


def test_second_signal_does_not_wait_for_the_run() -> None:
    class IgnoresSave(RunsUntilStopped):
        def _run(self, actor_group: object, checkpoint_step: int) -> None:
            while self._stop_order is not StopOrder.ABANDON:
                self.last += 1
                self._outbox.put(StepSummary(self.last, 0, 0.5, 8, {}, 10**9))
                time.sleep(0.002)
            raise Interrupted(15)

    driver = Driver(IgnoresSave, saves=True)

    def second_signal() -> None:
        if driver.actor.body.stop_orders:
            raise KeyboardInterrupt

    assert isinstance(interrupt_after_step_5(driver, second_signal), KeyboardInterrupt)
    assert {*driver.actor.body.stop_orders} == {StopOrder.SAVE}, "`end` sends no order"
    assert driver.actor.body.stop(60.0) == "STOPPED"


@pytest.mark.parametrize("signals", [1, 2])
def test_interrupted_after_keyboard_interrupt_is_a_second_signal(signals: int) -> None:
    """One `KeyboardInterrupt`, raised by a callback, stops the run in order, like one Ctrl-C."""
    driver, interrupted = Driver(RunsUntilStopped, saves=True), False

    def check() -> None:
        nonlocal interrupted
        if interrupted and signals == 2:
            raise Interrupted(15)
        if len(driver.events) >= 5:
            interrupted = True
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver.follow(check)
    driver.client.end()
    orders = {*driver.actor.body.stop_orders}
    assert (orders == set()) is (signals == 2), orders


def test_lost_controller_does_not_hide_the_signal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = Driver(RunsUntilStopped, saves=True)
    inject(driver.cluster, "stop", Fault(kill="before"))
    assert isinstance(interrupt_after_step_5(driver), Interrupted)
    assert "while the run was stopped: controller was lost after step" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "SUCCEEDED"),
        (Interrupted(15), "STOPPED"),
        (StorageError("full"), "FAILED"),
        (KeyError("a defect"), "FAILED"),
    ],
)
def test_stop_returns_the_status_of_the_run(error: Exception | None, status: str) -> None:
    ending = threading.Event()

    class Ends(Run):
        def _run(self, actor_group: object, checkpoint_step: int) -> None:
            assert ending.wait(60)
            if error is not None:
                raise error

    driver = Driver(Ends)
    transport = driver.cluster.transport()

    def stop(timeout_s: float) -> object:
        return transport.get(transport.call(driver.actor, "stop", timeout_s), 60.0)

    assert stop(0.0) == "RUNNING", "before `begin`"
    transport.get(transport.call(driver.actor, "begin", GROUP, 0), 60.0)
    assert stop(0.0) == "RUNNING"
    ending.set()
    assert stop(60.0) == stop(0.0) == status, "repeated calls return the same status"


def test_outbox_repeats_the_reply_for_the_same_number() -> None:
    box: Outbox[int] = Outbox()
    assert box.take(1) == []
    box.put(1)
    assert box.take(1) == [], "repeats its first reply"
    assert box.take(2) == [1]
    box.put(2)
    assert box.take(2) == [1]
    assert box.take(3) == [2]
    assert box.take(2) == [], "a late request removes nothing"
    assert box.take(3) == [2]
    box.close()
    assert box.take(4, 60.0) == [], "a closed outbox does not wait"


def test_full_outbox_drops_only_droppable_items() -> None:
    box: Outbox[int] = Outbox(max_items=3, droppable=lambda item: item > 0)
    for item in (1, 2, 3, 4, -1, 5, -2):
        box.put(item)
    assert box.take(1) == [1, 2, 3, -1, -2], "keeps all items that are not droppable"
    assert (box.pop_dropped(), box.pop_dropped()) == (2, 0)
    box.put(6)
    assert box.take(2) == [6]


def test_reports_number_of_dropped_events(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(controller_actor, "_MAX_EVENTS", 2)
    actor = ControllerActor("run/controller")
    for step in range(1, 6):
        actor._outbox.put(StepSummary(step, 0, 0.5, 8, {}, 5))
    actor._outbox.put(ModelReady())
    reply = actor.poll(1, 0.0)
    assert [type(event) for event in reply.events] == [StepSummary, StepSummary, ModelReady]
    assert "3 steps and log lines were dropped: the driver did not poll" in caplog.text
