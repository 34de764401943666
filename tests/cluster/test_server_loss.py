"""Shards that are kept twice: server nodes die and freeze, and no acknowledged push is lost."""

import signal
from pathlib import Path
from typing import Any

import pytest
from marks import slow
from server_losses import STEPS, Losing, long_job, undisturbed
from small_runs import HERE, train, weights

from distplat.cli.main import run as command
from distplat.platform.apply_log import FILE_NAME, log_flaws, read_logs

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


@pytest.mark.parametrize(
    ("losses", "pace_s", "strategy", "more"),
    [
        (1, 0.04, {"name": "ps-sync"}, {"optimizer": {"name": "AdamW", "lr": 0.01}}),
        # so long that servers change while the workers compute
        slow(1, 1.5, {"name": "ps-sync"}, {"optimizer": {"name": "AdamW", "lr": 0.01}}),
        # the primary, then the promoted one
        slow(2, 0.04, {"name": "ps-sync", "num_servers": 2}, {"clip_norm": 0.5}),
    ],
)
def test_killed_primaries_leave_the_bits_as_they_are(
    losses: int, pace_s: float, strategy: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    done = tmp_path / "done"
    losing = Losing(done, *[signal.SIGKILL] * losses)
    spec = long_job(strategy, done, pace_s, **more)
    result = train(spec, tmp_path, callbacks=(losing,))
    assert len(losing.standstills) == losses, "the run was over too soon"
    assert [summary.step for summary in result.history] == list(range(1, STEPS + 1))
    assert weights(result).tobytes() == undisturbed(spec)


@pytest.mark.slow
def test_asynchronous_runs_lose_no_update_and_can_be_made_again(tmp_path: Path) -> None:
    done = tmp_path / "done"
    losing = Losing(done, signal.SIGKILL)
    strategy = {"name": "ps-async", "staleness": 3, "delay_compensation": 0.5}
    result = train(long_job(strategy, done), tmp_path, callbacks=(losing,))
    assert len(losing.standstills) == 1, "the run was over too soon"
    (log,) = read_logs(str(result.path / FILE_NAME))[0]
    assert log_flaws(log, 2, STEPS) == []
    assert command(["replay", str(result.path), "--working-dir", str(HERE)]) == 0


@pytest.mark.slow
def test_a_frozen_primary_is_replaced(tmp_path: Path) -> None:
    done = tmp_path / "done"
    losing = Losing(done, signal.SIGSTOP)
    spec = long_job({"name": "ps-sync"}, done, failure={"heartbeat_timeout_s": 3})
    result = train(spec, tmp_path, callbacks=(losing,))
    assert len(losing.standstills) == 1, "the run was over too soon"
    assert weights(result).tobytes() == undisturbed(spec)
