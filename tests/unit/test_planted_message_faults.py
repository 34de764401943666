"""
Row F25 of the fault grid detects each rule that is removed from the servers' ledgers.

A remaining rule raises an error, or the row's comparison fails.

`tests/chaos/chaos_messages.py` loses, delays and repeats the messages.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distplat.actors import retrying_calls
from distplat.platform.errors import GapError, StaleError
from distplat.platform.ledger import PushId, StepLedger, TaskLedger, Verdict

sys.path.append(str(Path(__file__).parent.parent / "chaos"))

from chaos_messages import trial

Patch = pytest.MonkeyPatch


def accept_a_repeat_as_the_next_push(patch: Patch) -> None:
    original = StepLedger.offer

    def offer(self: StepLedger, push: PushId) -> Verdict:
        seq = self.version if self.version and push.seq == self.version - 1 else push.seq
        return original(self, PushId(push.job, push.attempt, push.rank, seq))

    patch.setattr(StepLedger, "offer", offer)


def update_without_all_ranks(patch: Patch) -> None:
    patch.setattr(StepLedger, "complete", property(lambda self: bool(self._staged)))


def apply_each_push_of_a_task(patch: Patch) -> None:
    original = TaskLedger.offer

    def offer(self: Any, push: PushId) -> Verdict:
        verdict = original(self, push)
        if verdict is Verdict.REPEAT_COMMITTED:
            self._staged = push.task
            return Verdict.NEW
        return verdict

    patch.setattr(TaskLedger, "offer", offer)


REFUSED = r"push \d+ of rank \d refused: expected|version \d+ is not here"
"""Errors of the remaining rules."""
MISMATCH = r"a shard made \d+ updates|the model has other bits"

FAULTS: dict[str, tuple[str, Callable[[Patch], None], str]] = {
    "a repeated push counts for the next step": (
        "ps-sync",
        accept_a_repeat_as_the_next_push,
        f"{REFUSED}|{MISMATCH}",
    ),
    "a server does not wait for all ranks": (
        "ps-sync",
        update_without_all_ranks,
        f"{REFUSED}|{MISMATCH}",
    ),
    "a repeated push is another update": (
        "ps-async",
        apply_each_push_of_a_task,
        r"update \d+ is task \d+, which was applied before",
    ),
}


def problems_of(strategy: str) -> str:
    """Return the problems of a run with lost messages; another error is a fault of the test."""
    try:
        return "; ".join(trial(strategy, 1)[0])
    except (GapError, StaleError) as error:
        return str(error)


@pytest.fixture
def quick_calls(monkeypatch: Patch) -> Iterator[None]:
    """Shorten the pause between calls, and restore the log level that a trial sets."""
    monkeypatch.setattr(retrying_calls, "RETRY_PAUSE_S", 0.001)
    logger = logging.getLogger(retrying_calls.__name__)
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("quick_calls")
def test_removed_rule_is_detected(fault: str, monkeypatch: Patch) -> None:
    strategy, inject, text = FAULTS[fault]
    assert not problems_of(strategy)
    inject(monkeypatch)
    assert re.search(text, problems_of(strategy))
