"""
Row F25 of the fault grid can fail: rules of the servers' books are taken away, and it finds each.

Lost, late and repeated messages are those of `tests/chaos/chaos_messages.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distplat.actors import retrying_calls
from distplat.platform.ledger import PushId, StepLedger, TaskLedger, Verdict

sys.path.append(str(Path(__file__).parent.parent / "chaos"))

from chaos_messages import trial

Patch = pytest.MonkeyPatch


def take_a_repeat_for_the_next_push(patch: Patch) -> None:
    original = StepLedger.offer

    def offer(self: StepLedger, push: PushId) -> Verdict:
        seq = self.version if self.version and push.seq == self.version - 1 else push.seq
        return original(self, PushId(push.job, push.attempt, push.rank, seq))

    patch.setattr(StepLedger, "offer", offer)


def update_without_all_ranks(patch: Patch) -> None:
    patch.setattr(StepLedger, "complete", property(lambda self: bool(self._staged)))


def count_each_push_of_a_task(patch: Patch) -> None:
    original = TaskLedger.offer

    def offer(self: Any, push: PushId) -> Verdict:
        verdict = original(self, push)
        if verdict is Verdict.REPEAT_COMMITTED:
            self._staged = push.task
            return Verdict.NEW
        return verdict

    patch.setattr(TaskLedger, "offer", offer)


FAULTS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "a repeated push is one of the next step": ("ps-sync", take_a_repeat_for_the_next_push),
    "a server does not wait for all ranks": ("ps-sync", update_without_all_ranks),
    "a repeated push is another update": ("ps-async", count_each_push_of_a_task),
}


def broken(strategy: str) -> bool:
    """Say whether a run with lost messages goes wrong, or ends with an error."""
    try:
        return bool(trial(strategy, 1)[0])
    except Exception:
        return True


@pytest.mark.sweep(3)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rule_that_is_taken_away_is_missed(fault: str, monkeypatch: Patch) -> None:
    strategy, plant = FAULTS[fault]
    monkeypatch.setattr(retrying_calls, "AGAIN_S", 0.001)
    assert not broken(strategy)
    plant(monkeypatch)
    assert broken(strategy)
