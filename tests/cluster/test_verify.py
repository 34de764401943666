"""`distplat verify` on real processes: tasks with random numbers, and a task without a seed."""

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
    request = VerifyRequest(spec, HERE, strategies, steps=6)
    return {(row.strategy, row.check): row for row in verify(request, print)}


@pytest.mark.slow
def test_dropout_and_random_samples_match_plain_loop() -> None:
    found = rows("Drawing", "ring", "ps-sync")
    for strategy in ("ring", "ps-sync"):
        assert found[strategy, "plain loop"].verdict == EQUAL
        assert found[strategy, "repeat"].verdict == EQUAL
        assert found[strategy, "whole batch"].verdict == EQUAL


@pytest.mark.slow
def test_unsupported_comparisons_are_reported() -> None:
    found = rows("WholeBatch", "ring", "ps-async")
    assert found["ps-async", "loss curve"].verdict == NOT_COMPARED
    assert "staleness" in found["ps-async", "loss curve"].reason
    assert not any(row.failed for row in found.values())


@pytest.mark.slow
def test_unseeded_samples_are_refused() -> None:
    (row,) = rows("Unseeded", "ring").values()
    assert row.failed and row.verdict == REFUSED and "samples" in row.reason


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set a separate folder for temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_failing_task_raises_its_error_and_leaves_no_files(temporary_folder: Path) -> None:
    with pytest.raises(UserCodeError, match="no samples today"):
        rows("Failing", "ring")
    assert not [*temporary_folder.glob("distplat*")]


@pytest.mark.slow
def test_temporary_files_are_removed(temporary_folder: Path) -> None:
    rows("WholeBatch", "ring")
    assert not [*temporary_folder.glob("distplat*")]
