"""What the command of `make soak` says of its trials."""

import importlib
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
    ids=["no trial", "no fault fired", "one had no occasion", "one is wrong"],
)
def test_trials_in_which_no_fault_fired_are_no_success(
    outcomes: list[tuple[list[str], list[str]]], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(CHAOS))
    exit_code: Any = importlib.import_module("chaos_memory").exit_code
    assert exit_code([SimpleNamespace(fired=f, problems=p) for f, p in outcomes]) == code
