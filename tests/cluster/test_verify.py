"""`distplat verify` on real processes: tasks that draw random numbers, one that hides a fault."""

from pathlib import Path
from typing import Any

import pytest
from small_runs import HERE, job

from distplat.actors.verifying import VerifyRequest, verify
from distplat.platform.errors import UserCodeError
from distplat.strategies.catalog import make_job
from distplat.strategies.verification.verdicts import EQUAL, NOT_COMPARED, REFUSED, Row

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


def rows(task: str, *strategies: str, **more: Any) -> dict[tuple[str, str], Row]:
    spec = make_job({**job("ring", 2), "task": f"verified_tasks:{task}", **more})
    wanted = VerifyRequest(spec, HERE, strategies, steps=6)
    return {(row.strategy, row.check): row for row in verify(wanted, print)}


@pytest.mark.slow
def test_dropout_and_samples_that_draw_repeat_and_are_those_of_a_plain_loop() -> None:
    found = rows("Drawing", "ring", "ps-sync")
    for strategy in ("ring", "ps-sync"):
        assert found[strategy, "plain loop"].verdict == EQUAL
        assert found[strategy, "repeat"].verdict == EQUAL
        assert found[strategy, "whole batch"].verdict == EQUAL


@pytest.mark.slow
def test_strategies_are_chosen_by_what_the_task_can_do() -> None:
    found = rows("WholeBatch", "ring", "ps-async")
    assert found["ps-async", "loss curve"].verdict == NOT_COMPARED
    assert "staleness" in found["ps-async", "loss curve"].reason
    assert not any(row.failed for row in found.values())


@pytest.mark.slow
def test_numbers_that_no_seed_reaches_are_found() -> None:
    (row,) = rows("Unseeded", "ring").values()
    assert row.failed and row.verdict == REFUSED and "samples" in row.reason


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, for this test alone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_a_task_that_fails_by_itself_says_so_and_leaves_nothing(temporary: Path) -> None:
    with pytest.raises(UserCodeError, match="no samples today"):
        rows("Failing", "ring")
    assert not [*temporary.glob("distplat*")]


@pytest.mark.slow
def test_nothing_is_left_on_the_disk(temporary: Path) -> None:
    rows("WholeBatch", "ring")
    assert not [*temporary.glob("distplat*")]
