"""The driver hears each thing of its run once, though a quarter of all messages is lost."""

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
    """A controller whose run makes up what it tells; it waits for `acted` after step 5."""

    begun = 0
    acted: threading.Event | None = None  #: None: it waits for nobody

    def _run(self, actor_group: object, checkpoint_step: int) -> None:
        self.begun += 1
        for step in range(checkpoint_step + 1, STEPS + 1):
            self._outbox.put(StepSummary(step, 0, 0.5, 8, {}, STEPS))
            time.sleep(0.002)
            if step == 5 and self.acted is not None:
                assert self.acted.wait(60)
        self._model = b"the model"
        self._outbox.put(ModelReady())
        for number in range(3):
            self._outbox.put(FileToKeep(f"table-{number}", bytes([number])))


class Failing(Run):
    """Fails once the model is there."""

    def _run(self, actor_group: object, checkpoint_step: int) -> None:
        super()._run(actor_group, checkpoint_step)
        raise StorageError("a table cannot be read")


class Broken(Run):
    """Has a fault of its own."""

    def _run(self, actor_group: object, checkpoint_step: int) -> None:
        raise KeyError("a fault")


class Stops(Run):
    """Makes steps until it is told to stop, and then one more."""

    last = 0
    asked: tuple[StopOrder, ...] = ()

    def stop(self, timeout_s: float, saves: bool = False) -> str:
        self.asked += (StopOrder.SAVE if saves else StopOrder.ABANDON,)
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
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying_calls, "RETRY_PAUSE_S", 0.001)
    monkeypatch.setattr(controller_actor, "_send_records", lambda outbox: None)
    logging.getLogger(retrying_calls.__name__).setLevel(logging.ERROR)


class Driver:
    """Follows a controller, and notes what it hears in order."""

    def __init__(self, kind: type[Run] = Run, *, saves: bool = False) -> None:
        self.cluster = LocalCluster()
        self.actor: Actor = self.cluster.spawn("controller", "here", lambda _: kind("controller"))
        group = SAVES if saves else GROUP
        self.client = ControllerClient(self.cluster.transport(), self.actor, group, 0)
        self.heard: list[object] = []

    @property
    def in_turn(self) -> list[object]:
        """What was heard, steps before what is written: that is a thread of its own."""
        return sorted(self.heard, key=lambda one: not isinstance(one, int))

    def follow(self, check: Any = lambda: None, look: Any = lambda: None) -> None:
        handlers = RunHandlers(
            lambda summary: self.heard.append(cast(StepSummary, summary).step),
            lambda model: self.heard.append(model),
            lambda name, content: self.heard.append(name),
        )
        self.client.follow(check, handlers, look)


ALL = [*range(1, STEPS + 1), b"the model", "table-0", "table-1", "table-2"]


def lossy(seed: int) -> Any:
    """Lose a quarter of the messages each way; double and delay some."""
    draw = random.Random(seed)

    def rule(call: Call) -> Fault:
        lose: Any = draw.choices(("", "request", "reply"), (50, 25, 25))[0]
        delay = draw.choice((0.0, 0.0, 0.01))
        return Fault(delay, draw.choice((0.0, 0.01)), lose, draw.random() < 0.2)

    return rule


@pytest.mark.parametrize("seed", range(8))
def test_each_event_is_told_once_and_in_order(seed: int) -> None:
    driver = Driver()
    add_rule(driver.cluster, lossy(seed))
    driver.follow()
    assert driver.in_turn == ALL
    assert driver.actor.body.begun == 1


@pytest.mark.parametrize("method", ["begin", "poll", "result", "stop"])
@pytest.mark.parametrize("lost", ["request", "reply"])
def test_a_question_of_each_kind_that_is_lost(method: str, lost: Any) -> None:
    driver = Driver()
    inject(driver.cluster, method, Fault(lose=lost), times=3)
    driver.follow()
    driver.client.end()
    assert driver.in_turn == ALL


@pytest.mark.parametrize("method", ["begin", "poll", "result"])
def test_a_call_that_is_made_again_is_logged_by_who_tells_callbacks(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log may wait for a terminal that takes no more: that must not hold up who listens."""
    driver, told = Driver(), list[tuple[str, int]]()

    class Terminal(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append((record.getMessage(), threading.get_ident()))

    for module in (retrying_calls, controller_client):
        monkeypatch.setattr(module.logger, "handlers", [Terminal(logging.WARNING)])
    monkeypatch.setattr(retrying_calls.logger, "level", logging.WARNING)
    inject(driver.cluster, method, Fault(lose="reply"))
    driver.follow()
    assert driver.in_turn == ALL
    what = "start" if method == "begin" else "an answer"
    said = f"{what}: no answer from controller, asking again"
    assert told == [(said, threading.get_ident())]


@pytest.mark.parametrize("size", [1, 4, 8, 9, 10])
def test_a_large_model_comes_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked for by itself, again where it is lost, and has a deadline of its own."""
    monkeypatch.setattr(model_pieces, "PIECE_BYTES", size)
    driver, asked = Driver(), list[int]()
    add_rule(driver.cluster, lossy(size))
    monkeypatch.setattr(driver.actor.body, "result", noting(asked, driver.actor.body.result))
    driver.follow()
    assert driver.in_turn == ALL
    assert sorted(set(asked)) == list(range(0, len(b"the model"), size))


def test_a_model_is_fetched_no_further_when_nobody_follows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its pieces come at once, and there are many."""
    monkeypatch.setattr(model_pieces, "PIECE_BYTES", 1)
    driver, asked = Driver(), list[int]()
    driver.actor.body._model = b"the model"
    real = noting(asked, driver.actor.body.result)

    def result(first: int) -> ModelPiece:
        if first == 3:
            driver.client._left.set()
        return real(first)

    monkeypatch.setattr(driver.actor.body, "result", result)
    handlers = RunHandlers(driver.heard.append, driver.heard.append, lambda name, content: None)
    with pytest.raises(DistplatError, match="has returned"):
        driver.client._take(ModelReady(), handlers)
    assert asked == [0, 1, 2, 3] and driver.heard == []


def noting(asked: list[int], real: Callable[[int], ModelPiece]) -> Callable[[int], ModelPiece]:
    def result(first: int) -> ModelPiece:
        asked.append(first)
        return real(first)

    return result


def test_an_empty_model_is_one_piece() -> None:
    assert fetch_pieces(lambda first: piece_of(b"", first)) == b""


def test_a_callback_that_hangs_keeps_no_model_from_the_disk() -> None:
    """Who cannot wait for it any longer has the model, and the tables."""
    driver, all_kept = Driver(), threading.Event()

    def hang(summary: object) -> None:
        assert all_kept.wait(60)
        raise KeyboardInterrupt

    def keep(name: str, content: bytes) -> None:
        driver.heard.append(name)
        if name == "table-2":
            all_kept.set()

    handlers = RunHandlers(hang, driver.heard.append, keep)
    with pytest.raises(KeyboardInterrupt):
        driver.client.follow(lambda: None, handlers)
    assert driver.heard == ALL[STEPS:]


def test_a_signal_waits_for_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_client, "_LEAVE_S", 0.0)
    driver, writing = Driver(), threading.Event()

    def check() -> None:
        if writing.is_set():
            raise Interrupted(15)

    def write(model: bytes) -> None:
        writing.set()
        assert driver.client._left.wait(60)
        driver.heard.append(model)

    handlers = RunHandlers(lambda summary: None, write, lambda name, content: None)
    with pytest.raises(Interrupted):
        driver.client.follow(check, handlers)
    assert driver.heard == [b"the model"], "it was waited for"


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), Interrupted(2)])
def test_a_disk_that_refuses_the_model_is_told_whatever_ends_the_run(
    raised: BaseException, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback hangs until Ctrl-C, which is what `fit` raises; that the model is lost is news."""
    monkeypatch.setattr(controller_client, "_LEAVE_S", 60.0)
    driver, refused = Driver(), threading.Event()

    def hang(summary: object) -> None:
        assert refused.wait(60)
        raise raised

    def refuse(model: bytes) -> None:
        refused.set()
        raise StorageError("the disk is full")

    with pytest.raises(type(raised)) as caught:
        driver.client.follow(lambda: None, RunHandlers(hang, refuse, lambda name, content: None))
    assert caught.value.__notes__ == ["before that: the disk is full"]
    assert "before that: the disk is full" in caplog.text


def test_a_second_signal_does_not_wait_for_what_is_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller_client, "_LEAVE_S", 0.0)
    driver, writing, over = Driver(), threading.Event(), threading.Event()

    def check() -> None:
        if writing.is_set():
            raise KeyboardInterrupt

    def write(model: bytes) -> None:
        writing.set()
        if not over.wait(60):
            driver.heard.append("it was waited for")

    handlers = RunHandlers(lambda summary: None, write, lambda name, content: None)
    with pytest.raises(KeyboardInterrupt):
        driver.client.follow(check, handlers)
    over.set()
    assert driver.heard == []


def test_what_a_callback_raises_ends_the_run_once_the_thread_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller_client, "_LEAVE_S", 60.0)
    driver, threads = Driver(), list[Any]()

    def start(name: str, work: Callable[[], Any]) -> Any:
        threads.append(run_in_thread(name, work))
        return threads[-1]

    monkeypatch.setattr(controller_client, "run_in_thread", start)

    def refuse(summary: object) -> None:
        raise SpecError(Problem(("early_stop", "metric"), "there is no such figure"))

    handlers = RunHandlers(refuse, driver.heard.append, lambda name, content: None)
    with pytest.raises(SpecError, match="no such figure"):
        driver.client.follow(lambda: None, handlers)
    assert [thread.done() for thread in threads] == [True]
    with pytest.raises(DistplatError, match="has returned"):
        driver.client._write(lambda: driver.heard.append("late"))
    assert "late" not in driver.heard


def test_the_model_is_kept_whatever_fails_after_it() -> None:
    driver = Driver(Failing)
    with pytest.raises(StorageError, match="a table cannot be read"):
        driver.follow()
    assert driver.in_turn == ALL


def test_a_fault_of_the_controller_itself_is_told() -> None:
    with pytest.raises(Exception, match="in the controller: KeyError: 'a fault'") as caught:
        Driver(Broken).follow()
    assert getattr(caught.value, "exit_code", None) == 70


class Saving(Run):
    """Has made a checkpoint before its first step."""

    def _run(self, actor_group: object, checkpoint_step: int) -> None:
        self._outbox.put(Saved(0, "step-000000", 1, 0.1))
        super()._run(actor_group, checkpoint_step)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [(Saving, "last checkpoint: submit --resume"), (Run, "there is no checkpoint to resume from")],
)
def test_a_controller_that_dies_is_named_with_the_last_step(kind: type[Run], remedy: str) -> None:
    driver = Driver(kind)
    acted = driver.actor.body.acted = threading.Event()

    def check() -> None:
        if 5 in driver.heard:
            driver.actor.die("killed by the test")
            acted.set()

    with pytest.raises(ActorLost, match=rf"controller was lost after step \d+: .*{remedy}"):
        driver.follow(check)
    driver.client.end()


def test_before_the_first_step_there_is_nothing_to_go_on_from() -> None:
    driver = Driver()
    inject(driver.cluster, "begin", Fault(kill="before"))
    with pytest.raises(ActorLost, match="controller was lost") as caught:
        driver.follow()
    assert "--resume" not in str(caught.value)


def test_a_cluster_that_cannot_call_this_process_cannot_be_used() -> None:
    """A token that only one of the two has: nothing is wrong with the run."""
    driver = Driver()
    driver.actor.die(UNREACHABLE)
    with pytest.raises(ClusterUnreachable, match="RAY_AUTH_MODE") as caught:
        driver.follow()
    assert caught.value.exit_code == 3
    later = Driver()
    inject(later.cluster, "poll", Fault(then=lambda: later.actor.die(UNREACHABLE)))
    with pytest.raises(ActorLost, match="controller was lost"):
        later.follow()


def test_what_the_driver_finds_out_by_itself_is_told_as_it_is() -> None:
    driver = Driver()
    acted = driver.actor.body.acted = threading.Event()

    def check() -> None:
        if 5 in driver.heard:
            acted.set()
            raise ActorLost("the head of the Ray cluster", None, "silent")

    with pytest.raises(ActorLost, match="the head of the Ray cluster was lost: silent"):
        driver.follow(check)


@pytest.mark.parametrize(
    ("method", "setting"), [("poll", "heartbeat_timeout_s"), ("result", "start_timeout_s")]
)
def test_a_controller_that_does_not_answer_is_late(method: str, setting: str) -> None:
    driver = Driver()
    driver.client._limits = driver.client._limits.model_copy(update={setting: 0.3})
    inject(driver.cluster, method, Fault(delay_s=1e6), times=100)
    with pytest.raises(DeadlineExceeded, match=rf"missing: controller; `failure.{setting}`"):
        driver.follow()


def test_a_signal_is_seen_while_an_answer_is_missing() -> None:
    driver, asked = Driver(), threading.Event()

    def rule(call: Call) -> Fault | None:
        if call.method != "poll":
            return None
        asked.set()
        return Fault(delay_s=1e6)

    add_rule(driver.cluster, rule)

    def check() -> None:
        if asked.is_set():
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        driver.follow(check)


@pytest.mark.parametrize("ends", ["signal", "early"])
def test_what_ends_a_run_is_seen_between_two_events_of_one_answer(ends: str) -> None:
    """A callback that takes long for each of thousands: nobody waits until it has had them all."""
    driver, all_there = Driver(Stops, saves=True), threading.Event()
    told, seen_after = list[int](), list[int]()

    def tell(summary: Any) -> None:
        assert all_there.wait(60)
        told.append(summary.step)

    def check() -> None:
        if ends == "signal" and len(told) >= 10:
            seen_after.append(len(told))
            raise Interrupted(2)

    def early() -> bool:
        if ends == "early" and len(told) >= 10:
            seen_after.append(len(told))
            return True
        return False

    def rule(call: Call) -> Fault | None:
        if driver.actor.body.last > 100:
            all_there.set()
        return None

    add_rule(driver.cluster, rule)
    handlers = RunHandlers(tell, lambda model: None, lambda name, content: None, early)
    with pytest.raises(Interrupted):
        driver.client.follow(check, handlers)
    driver.client.end()
    assert seen_after[0] == 10
    assert told == [*range(1, driver.actor.body.last + 1)], "the others are told all the same"


def interrupted_at_five(driver: Driver, look: Any = lambda: None) -> BaseException:
    """Have a driver get a signal when it hears of the fifth step; give what it ends with."""

    def check() -> None:
        if 5 in driver.heard:
            raise Interrupted(2)

    with pytest.raises((Interrupted, KeyboardInterrupt)) as caught:
        driver.follow(check, look)
    driver.client.end()
    return caught.value


@pytest.mark.parametrize("seed", range(3))
def test_after_a_signal_all_is_told_until_the_run_has_stopped(seed: int) -> None:
    driver = Driver(Stops, saves=True)
    add_rule(driver.cluster, lossy(seed))
    error = interrupted_at_five(driver)
    assert getattr(error, "exit_code", None) == 130, "the driver's own signal"
    assert driver.heard == [*range(1, driver.actor.body.last + 1)]
    assert driver.actor.body.asked[0] is StopOrder.SAVE


def test_a_run_that_takes_no_checkpoint_at_a_signal_is_ended_at_once() -> None:
    driver = Driver(Stops)
    assert isinstance(interrupted_at_five(driver), Interrupted)
    assert {*driver.actor.body.asked} == {StopOrder.ABANDON}


def test_after_a_second_signal_nothing_is_waited_for() -> None:
    class GoesOn(Stops):
        def _run(self, actor_group: object, checkpoint_step: int) -> None:
            while self._stop_order is not StopOrder.ABANDON:
                self.last += 1
                self._outbox.put(StepSummary(self.last, 0, 0.5, 8, {}, 10**9))
                time.sleep(0.002)
            raise Interrupted(15)

    driver = Driver(GoesOn, saves=True)

    def again() -> None:
        if driver.actor.body.asked:
            raise KeyboardInterrupt

    assert isinstance(interrupted_at_five(driver, again), KeyboardInterrupt)
    assert {*driver.actor.body.asked} == {StopOrder.SAVE}, "`end` has asked for nothing"
    assert driver.actor.body.stop(60.0) == "STOPPED"


@pytest.mark.parametrize("signals", [1, 2])
def test_two_signals_at_once_are_a_second_one(signals: int) -> None:
    """`KeyboardInterrupt` alone is a callback's: it ends the run in order, as Ctrl-C does."""
    driver, came = Driver(Stops, saves=True), False

    def check() -> None:
        nonlocal came
        if came and signals == 2:
            raise Interrupted(15)
        if len(driver.heard) >= 5:
            came = True
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver.follow(check)
    driver.client.end()
    asked = {*driver.actor.body.asked}
    assert (asked == set()) is (signals == 2), asked


def test_a_controller_that_is_gone_does_not_hide_the_signal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = Driver(Stops, saves=True)
    inject(driver.cluster, "stop", Fault(kill="before"))
    assert isinstance(interrupted_at_five(driver), Interrupted)
    assert "while the run was stopped: controller was lost after step" in caplog.text


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (None, "SUCCEEDED"),
        (Interrupted(15), "STOPPED"),
        (StorageError("full"), "FAILED"),
        (KeyError("a fault"), "FAILED"),
    ],
)
def test_who_stops_a_run_is_told_how_it_ended(raised: Exception | None, status: str) -> None:
    ending = threading.Event()

    class Ends(Run):
        def _run(self, actor_group: object, checkpoint_step: int) -> None:
            assert ending.wait(60)
            if raised is not None:
                raise raised

    driver = Driver(Ends)
    transport = driver.cluster.transport()

    def stop(timeout_s: float) -> object:
        return transport.get(transport.call(driver.actor, "stop", timeout_s), 60.0)

    assert stop(0.0) == "RUNNING", "it has not begun"
    transport.get(transport.call(driver.actor, "begin", GROUP, 0), 60.0)
    assert stop(0.0) == "RUNNING"
    ending.set()
    assert stop(60.0) == stop(0.0) == status, "asked again, it says the same"


def test_an_outbox_answers_the_same_number_alike() -> None:
    box: Outbox[int] = Outbox()
    assert box.take(1) == []
    box.put(1)
    assert box.take(1) == [], "it was answered so"
    assert box.take(2) == [1]
    box.put(2)
    assert box.take(2) == [1]
    assert box.take(3) == [2]
    assert box.take(2) == [], "a question that came too late takes nothing away"
    assert box.take(3) == [2]
    box.close()
    assert box.take(4, 60.0) == [], "nobody waits for what will not come"


def test_an_outbox_that_nobody_empties_leaves_out_what_may_be_missed() -> None:
    box: Outbox[int] = Outbox(max_items=3, droppable=lambda item: item > 0)
    for item in (1, 2, 3, 4, -1, 5, -2):
        box.put(item)
    assert box.take(1) == [1, 2, 3, -1, -2], "what may not be missed is there"
    assert (box.pop_dropped(), box.pop_dropped()) == (2, 0)
    box.put(6)
    assert box.take(2) == [6]


def test_a_driver_that_was_away_is_told_how_much_it_missed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(controller_actor, "_MAX_EVENTS", 2)
    actor = ControllerActor("run/controller")
    for step in range(1, 6):
        actor._outbox.put(StepSummary(step, 0, 0.5, 8, {}, 5))
    actor._outbox.put(ModelReady())
    news = actor.poll(1, 0.0)
    assert [type(one) for one in news.events] == [StepSummary, StepSummary, ModelReady]
    assert "3 steps and log lines were dropped: the driver did not poll" in caplog.text
