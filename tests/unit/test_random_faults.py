"""Verdicts of the commands of `make soak` and `make chaos`."""

import importlib
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CHAOS = Path(__file__).parent.parent / "chaos"


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([], 1),
        ([([], [])], 1),
        ([([], []), (["a kill"], [])], 0),
        ([(["a kill"], []), (["a kill"], ["other bits"])], 1),
    ],
    ids=["no trial", "no fault fired", "one without a fault", "one wrong result"],
)
def test_trials_without_a_fault_fail(
    outcomes: list[tuple[list[str], list[str]]], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(CHAOS))
    exit_code: Any = importlib.import_module("chaos_memory").exit_code
    assert exit_code([SimpleNamespace(fired=f, problems=p) for f, p in outcomes]) == code


_LOG = "no apply_log.safetensors: log: waited 20 s; `failure.step_timeout_s` changes this deadline"


@pytest.mark.parametrize(
    ("action", "undo_s", "found_s", "text", "late"),
    [
        (signal.SIGSTOP, 0.0, 10.9, "worker-0 was lost", False),
        (signal.SIGSTOP, 0.0, 11.1, "worker-0 was lost", True),
        (signal.SIGSTOP, 0.0, 22.9, _LOG, False),
        (signal.SIGSTOP, 0.0, 23.1, _LOG, True),
        (signal.SIGSTOP, 0.0, None, "", False),
        (signal.SIGSTOP, 1.5, 11.1, "worker-0 was lost", False),
        (signal.SIGKILL, 0.0, 11.1, "worker-0 was lost", False),
    ],
    ids=[
        "in time",
        "late",
        "in time after the last step",
        "late after the last step",
        "no error",
        "process resumed",
        "process killed, not frozen",
    ],
)
def test_frozen_process_must_be_detected_within_the_deadline(
    action: int,
    undo_s: float,
    found_s: float | None,
    text: str,
    late: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(CHAOS))
    trial: Any = importlib.import_module("chaos_trial")
    faults = [SimpleNamespace(action=int(action), undo_s=undo_s)]
    assert bool(trial.found_late(faults, found_s, text)) == late
