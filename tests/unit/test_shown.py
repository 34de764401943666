"""Snapshots of weights during training: copied between steps, only on request."""

import threading
import time
from itertools import count

import torch
from torch import Tensor, nn

from distplat.strategies.loop.snapshot_publisher import SnapshotPublisher, state_copy

State = SnapshotPublisher[dict[str, Tensor]]


def offer_state(publisher: State, version: int, model: nn.Module) -> None:
    publisher.offer(version, lambda: state_copy(model))


def test_copies_only_after_a_request() -> None:
    publisher, model = State(), nn.Linear(2, 2)
    offer_state(publisher, 1, model)
    assert publisher.ask(0) is None
    offer_state(publisher, 2, model)
    offer_state(publisher, 3, model)  # no request since
    copy = publisher.ask(2)
    assert copy is not None and copy.version == 2
    assert publisher.ask(3) is None
    offer_state(publisher, 4, model)
    second = publisher.ask(3)
    assert second is not None and second.version == 4


def test_copy_is_independent_of_the_model() -> None:
    publisher, model = State(), nn.BatchNorm1d(3)
    publisher.ask(0)
    offer_state(publisher, 1, model)
    with torch.no_grad():
        model.weight.fill_(7.0)
    copy = publisher.ask(1)
    assert copy is not None
    assert set(copy.content) == set(model.state_dict())
    assert (copy.content["weight"] == 1.0).all()


def test_copies_are_consistent_during_training() -> None:
    """One thread changes the model between offers, and another one requests copies."""
    publisher, model, done = State(), nn.Linear(100, 100), threading.Event()

    def train() -> None:
        for version in count(1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float(version))
            offer_state(publisher, version, model)
            if done.is_set():
                return

    thread = threading.Thread(target=train)
    thread.start()
    version_seen, copies, deadline = 0, 0, time.monotonic() + 30
    try:
        while copies < 20:
            assert time.monotonic() < deadline
            copy = publisher.ask(version_seen + 1)
            if copy is not None:
                assert copy.version > version_seen
                version_seen, copies = copy.version, copies + 1
                assert all((value == version_seen).all() for value in copy.content.values())
    finally:
        done.set()
        thread.join(30)


def test_version_can_be_requested_in_advance() -> None:
    publisher = SnapshotPublisher[str]()
    assert publisher.exactly(2) == (0, None)
    publisher.offer(1, lambda: "one")
    assert publisher.exactly(1) == (1, None), "version 1 is past and was not requested in time"
    publisher.offer(2, lambda: "two")
    publisher.offer(3, lambda: "three")
    latest, copy = publisher.exactly(2)
    assert copy is not None and (latest, copy.content) == (3, "two")


def test_last_version_is_available_later() -> None:
    publisher = SnapshotPublisher[str]()
    publisher.offer(4, lambda: "four", last=True)
    assert publisher.exactly(4)[1] is not None
