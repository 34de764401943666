"""Weights shown while a worker trains: copied between steps, only when somebody asked."""

import threading
import time
from itertools import count

import torch
from torch import nn

from distplat.strategies.training.shown import Shown


def test_nothing_is_copied_before_somebody_asks() -> None:
    shown, model = Shown(), nn.Linear(2, 2)
    shown.offer(1, model)
    assert shown.ask(0) is None
    shown.offer(2, model)
    shown.offer(3, model)  # nobody asked since
    copy = shown.ask(2)
    assert copy is not None and copy.version == 2
    assert shown.ask(3) is None
    shown.offer(4, model)
    later = shown.ask(3)
    assert later is not None and later.version == 4


def test_a_copy_does_not_follow_the_model() -> None:
    shown, model = Shown(), nn.BatchNorm1d(3)
    shown.ask(0)
    shown.offer(1, model)
    with torch.no_grad():
        model.weight.fill_(7.0)
    copy = shown.ask(1)
    assert copy is not None
    assert set(copy.state) == set(model.state_dict())
    assert (copy.state["weight"] == 1.0).all()


def test_copies_are_of_one_version() -> None:
    """A thread that changes the model between its offers, and one that asks all the time."""
    shown, model, done = Shown(), nn.Linear(100, 100), threading.Event()

    def train() -> None:
        for version in count(1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float(version))
            shown.offer(version, model)
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
                assert all((value == seen).all() for value in copy.state.values())
    finally:
        done.set()
        thread.join(30)
