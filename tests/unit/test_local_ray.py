"""A Ray of the run's own that does not start is told with what to do about it."""

import errno
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distplat.actors import launch, ray_compat, ray_token
from distplat.actors.launch import local_ray, ray_for_run
from distplat.actors.ray_folder import RayFolder
from distplat.actors.stopping import Stopping
from distplat.platform.errors import ActorLost, InfrastructureError, Interrupted, UserCodeError
from distplat.platform.spec import Scaling

ITS_WORDS = "The current node timed out during startup. This\ncould happen because"


def start(error: BaseException, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Have a Ray fail to start; what there is of it is ended, for a notebook goes on."""
    ended: list[bool] = []

    def fail(**settings: Any) -> None:
        if not isinstance(error, Exception):
            Path(settings["_temp_dir"]).mkdir()  # it was under way
        raise error

    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setattr("ray.shutdown", lambda: ended.append(True))
    files = at_home(monkeypatch, home)
    try:
        with local_ray(Scaling(num_workers=1)):
            pass
    finally:
        assert ended == [True] and list(files.iterdir()) == []


def at_home(monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """Have Ray's files and its token lie in a directory of the test's; give where the files are."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv(ray_token.MODE, "token")  # as Ray would set it for this whole process
    monkeypatch.setattr(launch, "RayFolder", lambda base: RayFolder(home / "ray"))
    return home / "ray"


def lines_of(folder: str, name: str, text: str) -> None:
    """Log as Ray does."""
    logs = Path(folder, "session_2026-01-01_00-00-00_000000_17", "logs")
    logs.mkdir(parents=True, exist_ok=True)
    (logs / name).write_text(text)


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (ActorLost("worker-1", 3, "killed"), True),
        (KeyError("inside distplat"), True),
        (UserCodeError(0, 3, "it raised", ""), False),
        (Interrupted(2), False),
    ],
)
def test_what_ray_logged_is_kept_where_the_cluster_failed_or_distplat(
    error: Exception,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def init(**settings: Any) -> None:
        token = (tmp_path / ".ray/auth_token").read_text()
        lines_of(settings["_temp_dir"], "worker-17.out", "printed by the task")
        for name in ("runtime_env_agent.log", "runtime_env_setup-01000000.log"):
            lines_of(settings["_temp_dir"], name, "env_vars: {'SOME_KEY': 'secret'}")
        lines_of(settings["_temp_dir"], "log_monitor.log", f"token {token}")
        lines_of(settings["_temp_dir"], "raylet.out", "x" * 100_000 + "killed")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    for name in (ray_token.TOKEN, ray_token.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    files = at_home(monkeypatch, tmp_path)
    (run := tmp_path / "run").mkdir()
    with pytest.raises(type(error)), local_ray(Scaling(num_workers=1), keep_in=run):
        raise error
    assert list(files.iterdir()) == []
    told = [one.message for one in caplog.records if str(run) in one.message]
    assert told == kept * [f"what Ray logged at the end is in {run}/ray.log"]
    if kept:
        logged = (run / "ray.log").read_text()
        first, second = logged.split("\n\n")[:2]
        assert first.startswith("==> raylet.out <==\nxxx") and first.endswith("xkilled")
        assert second == "==> log_monitor.log <==\ntoken ***"
        assert len(logged) < 20_000 and "secret" not in logged


@pytest.mark.parametrize(
    ("error", "said"), [(ActorLost("worker-1", 3, "killed"), True), (Interrupted(2), False)]
)
def test_where_another_ray_logs_is_said(
    error: Exception,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("distplat.actors.ray_compat.log_folder", lambda: "/there/logs")
    with pytest.raises(type(error)), local_ray(Scaling(num_workers=1), keep_in=tmp_path):
        raise error
    assert caplog.messages == said * ["Ray's own logs are in /there/logs of each node"]


def test_what_ray_logged_before_it_did_not_start_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(**settings: Any) -> None:
        lines_of(settings["_temp_dir"], "gcs_server.out", "no such port")
        raise RuntimeError(ITS_WORDS)

    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    files = at_home(monkeypatch, tmp_path)
    with pytest.raises(InfrastructureError), local_ray(Scaling(num_workers=1), keep_in=tmp_path):
        pass
    assert (tmp_path / "ray.log").read_text() == "==> gcs_server.out <==\nno such port\n\n"
    [left] = files.iterdir()  # Ray's words for why name files
    RayFolder(files).remove()
    assert not left.exists()


def test_ray_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (23.4, 0.0, 0.0))
    with pytest.raises(InfrastructureError, match="local Ray could not be started") as raised:
        start(Exception(ITS_WORDS), monkeypatch, tmp_path)
    assert raised.value.exit_code == 4
    assert f"(23 processes want the {os.cpu_count()} cores of this machine)" in str(raised.value)
    assert "during startup. This could happen because; try again, or" in str(raised.value)


def test_what_ray_may_have_too_little_of_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/there")
    disk = {Path("/there"): SimpleNamespace(free=3 * 2**20)}
    monkeypatch.setattr(shutil, "disk_usage", disk.__getitem__)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**31, 2**31))
    with pytest.raises(InfrastructureError) as raised:
        start(Exception(ITS_WORDS), monkeypatch, tmp_path)
    assert "`ulimit -v` allows 2.0 GiB of addresses; /there has 3 MiB free" in str(raised.value)


def test_without_any_room_ray_is_not_even_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It would try for half a minute."""

    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        InfrastructureError, match=rf"{tmp_path}/ray/\S+: No space left.*RAY_TMPDIR"
    ):
        start(AssertionError("it was started"), monkeypatch, tmp_path)


@pytest.mark.parametrize("error", [Interrupted(2), KeyboardInterrupt()])
def test_who_is_interrupted_is_told_so(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        start(error, monkeypatch, tmp_path)


def test_a_second_signal_while_ray_starts_ends_the_run_as_the_first_one_would(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(**settings: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("ray.init", interrupted)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Interrupted) as raised, Stopping() as stopping:
        with ray_for_run(stopping, Scaling(num_workers=1)):
            pass
    assert raised.value.exit_code == 143


def test_it_is_said_where_files_lie_that_cannot_lie_where_they_should(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = "/" + "x" * ray_compat.FOLDER_BYTES
    monkeypatch.setenv("RAY_TMPDIR", wanted)
    with pytest.raises(KeyboardInterrupt):
        start(KeyboardInterrupt(), monkeypatch, tmp_path)
    [line] = [one.message for one in caplog.records if "sockets" in one.message]
    assert line.startswith(f"the files of this run's Ray lie in /tmp, not in {wanted}: ")
