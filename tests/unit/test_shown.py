"""Weights shown while a worker trains: copied between steps, only when somebody asked."""

import threading
import time
from itertools import count

import torch
from torch import Tensor, nn

from distplat.strategies.loop.snapshot_publisher import SnapshotPublisher, state_copy

State = SnapshotPublisher[dict[str, Tensor]]


def offer(shown: State, version: int, model: nn.Module) -> None:
    shown.offer(version, lambda: state_copy(model))


def test_nothing_is_copied_before_somebody_asks() -> None:
    shown, model = State(), nn.Linear(2, 2)
    offer(shown, 1, model)
    assert shown.ask(0) is None
    offer(shown, 2, model)
    offer(shown, 3, model)  # nobody asked since
    copy = shown.ask(2)
    assert copy is not None and copy.version == 2
    assert shown.ask(3) is None
    offer(shown, 4, model)
    later = shown.ask(3)
    assert later is not None and later.version == 4


def test_a_copy_does_not_follow_the_model() -> None:
    shown, model = State(), nn.BatchNorm1d(3)
    shown.ask(0)
    offer(shown, 1, model)
    with torch.no_grad():
        model.weight.fill_(7.0)
    copy = shown.ask(1)
    assert copy is not None
    assert set(copy.content) == set(model.state_dict())
    assert (copy.content["weight"] == 1.0).all()


def test_copies_are_of_one_version() -> None:
    """A thread that changes the model between its offers, and one that asks all the time."""
    shown, model, done = State(), nn.Linear(100, 100), threading.Event()

    def train() -> None:
        for version in count(1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float(version))
            offer(shown, version, model)
            if done.is_set():
                return

    thread = threading.Thread(target=train)
    thread.start()
    seen, copies, until = 0, 0, time.monotonic() + 30
    try:
        while copies < 20:
            assert time.monotonic() < until
            copy = shown.ask(seen + 1)
            if copy is not None:
                assert copy.version > seen
                seen, copies = copy.version, copies + 1
                assert all((value == seen).all() for value in copy.content.values())
    finally:
        done.set()
        thread.join(30)


def test_a_version_may_be_asked_for_beforehand() -> None:
    shown = SnapshotPublisher[str]()
    assert shown.exactly(2) == (0, None)
    shown.offer(1, lambda: "one")
    assert shown.exactly(1) == (1, None), "it is past, and was not asked for in time"
    shown.offer(2, lambda: "two")
    shown.offer(3, lambda: "three")
    passed, copy = shown.exactly(2)
    assert copy is not None and (passed, copy.content) == (3, "two")


def test_the_last_version_is_there_for_who_asks_later() -> None:
    shown = SnapshotPublisher[str]()
    shown.offer(4, lambda: "four", last=True)
    assert shown.exactly(4)[1] is not None
