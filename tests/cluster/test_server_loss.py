"""Replicated shards: no acknowledged push is lost with a killed or frozen server node."""

import signal
from pathlib import Path
from typing import Any

import pytest
from marks import slow
from server_losses import STEPS, PrimaryKiller, long_job, unfailed_weights
from small_runs import HERE, train, weights

from distplat.cli.main import run as command
from distplat.platform.apply_log import FILE_NAME, log_flaws, read_logs

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


@pytest.mark.parametrize(
    ("losses", "pace_s", "strategy", "more"),
    [
        (1, 0.04, {"name": "ps-sync"}, {"optimizer": {"name": "AdamW", "lr": 0.01}}),
        # a long pause: servers change while the workers compute
        slow(1, 1.5, {"name": "ps-sync"}, {"optimizer": {"name": "AdamW", "lr": 0.01}}),
        # the primary, then the promoted backup
        slow(2, 0.04, {"name": "ps-sync", "num_servers": 2}, {"clip_norm": 0.5}),
    ],
)
def test_killed_primaries_do_not_change_the_model(
    losses: int, pace_s: float, strategy: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    done = tmp_path / "done"
    killer = PrimaryKiller(done, *[signal.SIGKILL] * losses)
    spec = long_job(strategy, done, pace_s, **more)
    result = train(spec, tmp_path, callbacks=(killer,))
    assert len(killer.standstills) == losses, "the run ended before the loss"
    assert [summary.step for summary in result.history] == list(range(1, STEPS + 1))
    assert weights(result).tobytes() == unfailed_weights(spec)


@pytest.mark.slow
def test_asynchronous_run_loses_no_update_and_replays(tmp_path: Path) -> None:
    done = tmp_path / "done"
    killer = PrimaryKiller(done, signal.SIGKILL)
    strategy = {"name": "ps-async", "staleness": 3, "delay_compensation": 0.5}
    result = train(long_job(strategy, done), tmp_path, callbacks=(killer,))
    assert len(killer.standstills) == 1, "the run ended before the loss"
    (log,) = read_logs(str(result.path / FILE_NAME))[0]
    assert log_flaws(log, 2, STEPS) == []
    assert command(["replay", str(result.path), "--working-dir", str(HERE)]) == 0


@pytest.mark.slow
def test_frozen_primary_is_replaced(tmp_path: Path) -> None:
    done = tmp_path / "done"
    killer = PrimaryKiller(done, signal.SIGSTOP)
    spec = long_job({"name": "ps-sync"}, done, failure={"heartbeat_timeout_s": 3})
    result = train(spec, tmp_path, callbacks=(killer,))
    assert len(killer.standstills) == 1, "the run ended before the loss"
    assert weights(result).tobytes() == unfailed_weights(spec)
