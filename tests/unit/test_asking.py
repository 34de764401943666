"""Calls under way: asked again when an answer got lost, given up when nobody wants it."""

from collections.abc import Callable
from typing import Any

import pytest
import ray

from distplat.actors import asking
from distplat.actors.asking import Asked
from distplat.platform.errors import ActorLost, DeadlineExceeded, InfrastructureError, StaleError


class Calls:
    """Stands for Ray: each call gets the next of its outcomes; `get` gives or raises them."""

    def __init__(self, *outcomes: list[Any]) -> None:
        self.outcomes = outcomes

    def call(self, index: int) -> Callable[[], Any]:
        return lambda: (index, self.outcomes[index].pop(0))

    def get(self, reference: Any, timeout: float) -> Any:
        outcome = reference[1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        late = [r for r in references if isinstance(r[1], ray.exceptions.GetTimeoutError)]
        return [r for r in references if r not in late], late


def ask(
    monkeypatch: pytest.MonkeyPatch,
    *outcomes: list[Any],
    limit_s: float = 5.0,
    given_up: bool = False,
) -> Asked:
    calls = Calls(*outcomes)
    monkeypatch.setattr(ray, "get", calls.get)
    monkeypatch.setattr(ray, "wait", calls.wait)
    monkeypatch.setattr(asking, "AGAIN_S", 0.0)

    def look() -> None:
        if given_up:
            raise InfrastructureError("told to give up")

    questions = [calls.call(index) for index in range(len(outcomes))]
    names = [f"server-{index}" for index in range(len(outcomes))]
    return Asked("push 3", questions, names, limit_s, "step_timeout_s", look)


def unavailable() -> Any:
    return ray.exceptions.ActorUnavailableError("lost", None)


LATE = ray.exceptions.GetTimeoutError("late")


def test_answers_come_in_the_order_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, [1], [2], [None]).answers() == [1, 2, None]


def test_a_lost_answer_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, [1], [unavailable(), unavailable(), 2]).answers() == [1, 2]


def test_the_late_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        ask(monkeypatch, [1], [LATE], [LATE], limit_s=0.0).wait()
    assert caught.value.missing == ("server-1", "server-2")
    assert caught.value.setting == "failure.step_timeout_s"


def test_who_cannot_be_reached_for_long_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeadlineExceeded, match="push 3: waited 0 s, missing: server-0"):
        ask(monkeypatch, [unavailable()], limit_s=0.0).wait()


def test_a_wait_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InfrastructureError, match="told to give up"):
        ask(monkeypatch, [LATE], given_up=True).wait()


def test_the_dead_and_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = ray.exceptions.ActorDiedError()
    with pytest.raises(ActorLost, match="server-1 was lost"):
        ask(monkeypatch, [1], [dead]).wait()
    raised = ray.exceptions.RayTaskError("push", "", StaleError("push 2 refused"))
    with pytest.raises(StaleError, match="push 2 refused"):
        ask(monkeypatch, [raised]).wait()
