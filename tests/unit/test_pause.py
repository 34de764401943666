"""The gate before each step: who comes waits, goes on or is sent home, whatever thread says so."""

import threading
import time
from collections.abc import Callable

import pytest

from distplat.platform.errors import Abandoned, DeadlineExceeded
from distplat.strategies.loop.pause import PauseGate

PATIENCE_S = 10.0


class Trainer(threading.Thread):
    """Passes a gate before each of ten steps, as the loop does."""

    def __init__(self, gate: PauseGate, start: int = 0) -> None:
        super().__init__(daemon=True)
        self.gate, self.first, self.made = gate, start, 0
        self.error: Exception | None = None
        self.begin = threading.Semaphore(0)  #: one for each step that may be come to
        self.start()

    def run(self) -> None:
        try:
            for step in range(self.first, 10):
                self.begin.acquire()
                if not self.gate.before(step):
                    break
                self.made += 1
        except Exception as error:
            self.error = error

    def passes(self, steps: int) -> None:
        for _ in range(steps):
            self.begin.release()

    def ends(self) -> Exception | None:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self.error


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_an_open_gate_lets_pass() -> None:
    trainer = Trainer(PauseGate(0.0))
    trainer.passes(10)
    assert (trainer.ends(), trainer.made) == (None, 10)
    assert trainer.gate.answer is None


def test_who_rests_waits_and_goes_on_to_where_all_stop() -> None:
    gate = PauseGate(PATIENCE_S)
    trainer = Trainer(gate)
    trainer.passes(3)
    until(lambda: trainer.made == 3)
    gate.rest()
    assert gate.answer == 3, "step 2 is under way"
    trainer.passes(7)
    time.sleep(0.05)
    assert (trainer.made, trainer.is_alive()) == (3, True)
    gate.rest_at(5)
    error = trainer.ends()
    assert isinstance(error, Abandoned)
    assert "between two steps" in str(error)
    assert (trainer.made, gate.rested) == (5, True)


def test_who_is_to_end_goes_on_to_where_all_end() -> None:
    gate = PauseGate(PATIENCE_S)
    gate.start(0)
    gate.rest()
    trainer = Trainer(gate)
    gate.end_at(4)
    trainer.passes(10)
    assert (trainer.ends(), trainer.made, gate.rested) == (None, 4, False)


def test_the_answer_comes_when_the_first_step_is_known() -> None:
    gate = PauseGate(PATIENCE_S)
    gate.rest()
    assert gate.answer is None
    gate.start(4)
    assert gate.answer == 4
    trainer = Trainer(gate, 4)
    trainer.passes(1)
    gate.rest_at(4)
    assert isinstance(trainer.ends(), Abandoned)
    assert trainer.made == 0


@pytest.mark.parametrize("rests", [True, False])
def test_whoever_comes_or_waits_is_sent_home_when_the_attempt_is_over(rests: bool) -> None:
    gate = PauseGate(60)
    if rests:
        gate.rest()
    trainer = Trainer(gate)
    if rests:
        trainer.passes(1)
        time.sleep(0.05)
        assert trainer.is_alive()
    gate.give_up()
    trainer.passes(1)
    assert isinstance(trainer.ends(), Abandoned)
    assert (trainer.made, gate.rested) == (0, False), "not where all stop"


def test_nobody_waits_for_ever_for_word_where_to_stop() -> None:
    gate = PauseGate(0.05)
    gate.rest()
    trainer = Trainer(gate)
    trainer.passes(1)
    error = trainer.ends()
    assert isinstance(error, DeadlineExceeded)
    assert error.missing == ("the controller",)
    assert "failure.step_timeout_s" in str(error)
    assert (trainer.made, gate.rested) == (0, False)
