"""A run's own local Ray: errors of its start, its logs and its files."""

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

STARTUP_ERROR = "The current node timed out during startup. This\ncould happen because"


def fail_to_start(error: BaseException, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Let the start of Ray fail with `error`, and check that it is shut down and cleaned up."""
    shutdowns: list[bool] = []

    def fail(**settings: Any) -> None:
        if not isinstance(error, Exception):
            Path(settings["_temp_dir"]).mkdir()  # created before the interrupt
        raise error

    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setattr("ray.shutdown", lambda: shutdowns.append(True))
    files = use_home(monkeypatch, home)
    try:
        with local_ray(Scaling(num_workers=1)):
            pass
    finally:
        assert shutdowns == [True] and list(files.iterdir()) == []


def use_home(monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """Place Ray's files and token below `home`; return the folder of the files."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv(ray_token.MODE, "token")  # as Ray sets it for the whole process
    monkeypatch.setattr(launch, "RayFolder", lambda base: RayFolder(home / "ray"))
    return home / "ray"


def write_log(folder: str, name: str, text: str) -> None:
    """Write a log file into Ray's folder."""
    logs = Path(folder, "session_2026-01-01_00-00-00_000000_17", "logs")
    logs.mkdir(parents=True, exist_ok=True)
    (logs / name).write_text(text)


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (ActorLost("worker-1", 3, "killed"), True),
        (KeyError("inside distplat"), True),
        (UserCodeError(0, 3, "it raised", ""), False),
        (Interrupted(2), False),
    ],
)
def test_ray_logs_are_kept_after_infrastructure_errors(
    error: Exception,
    is_kept: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def init(**settings: Any) -> None:
        token = (tmp_path / ".ray/auth_token").read_text()
        write_log(settings["_temp_dir"], "worker-17.out", "printed by the task")
        for name in ("runtime_env_agent.log", "runtime_env_setup-01000000.log"):
            write_log(settings["_temp_dir"], name, "env_vars: {'SOME_KEY': 'secret'}")
        write_log(settings["_temp_dir"], "log_monitor.log", f"token {token}")
        write_log(settings["_temp_dir"], "raylet.out", "x" * 100_000 + "killed")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    for name in (ray_token.TOKEN, ray_token.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    files = use_home(monkeypatch, tmp_path)
    (run := tmp_path / "run").mkdir()
    with pytest.raises(type(error)), local_ray(Scaling(num_workers=1), keep_in=run):
        raise error
    assert list(files.iterdir()) == []
    messages = [record.message for record in caplog.records if str(run) in record.message]
    assert messages == is_kept * [f"what Ray logged at the end is in {run}/ray.log"]
    if is_kept:
        log_text = (run / "ray.log").read_text()
        first, second = log_text.split("\n\n")[:2]
        assert first.startswith("==> raylet.out <==\nxxx") and first.endswith("xkilled")
        assert second == "==> log_monitor.log <==\ntoken ***"
        assert len(log_text) < 20_000 and "secret" not in log_text


@pytest.mark.parametrize(
    ("error", "is_logged"), [(ActorLost("worker-1", 3, "killed"), True), (Interrupted(2), False)]
)
def test_log_folder_of_an_existing_ray_is_named(
    error: Exception,
    is_logged: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("distplat.actors.ray_compat.log_folder", lambda: "/there/logs")
    with pytest.raises(type(error)), local_ray(Scaling(num_workers=1), keep_in=tmp_path):
        raise error
    assert caplog.messages == is_logged * ["Ray's own logs are in /there/logs of each node"]


def test_ray_logs_are_kept_after_a_failed_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(**settings: Any) -> None:
        write_log(settings["_temp_dir"], "gcs_server.out", "no such port")
        raise RuntimeError(STARTUP_ERROR)

    monkeypatch.setattr("ray.init", fail)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    files = use_home(monkeypatch, tmp_path)
    with pytest.raises(InfrastructureError), local_ray(Scaling(num_workers=1), keep_in=tmp_path):
        pass
    assert (tmp_path / "ray.log").read_text() == "==> gcs_server.out <==\nno such port\n\n"
    [remaining] = files.iterdir()  # kept, since the error names files in it
    RayFolder(files).remove()
    assert not remaining.exists()


def test_failed_start_is_an_infrastructure_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (23.4, 0.0, 0.0))
    with pytest.raises(InfrastructureError, match="local Ray could not be started") as raised:
        fail_to_start(Exception(STARTUP_ERROR), monkeypatch, tmp_path)
    assert raised.value.exit_code == 4
    assert f"(23 processes want the {os.cpu_count()} cores of this machine)" in str(raised.value)
    assert "during startup. This could happen because; try again, or" in str(raised.value)


def test_failed_start_names_scarce_resources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/there")
    disk = {Path("/there"): SimpleNamespace(free=3 * 2**20)}
    monkeypatch.setattr(shutil, "disk_usage", disk.__getitem__)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2**31, 2**31))
    with pytest.raises(InfrastructureError) as raised:
        fail_to_start(Exception(STARTUP_ERROR), monkeypatch, tmp_path)
    assert "`ulimit -v` allows 2.0 GiB of addresses; /there has 3 MiB free" in str(raised.value)


def test_ray_is_not_started_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray would retry for half a minute."""

    def fail_allocation(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail_allocation)
    with pytest.raises(
        InfrastructureError, match=rf"{tmp_path}/ray/\S+: No space left.*RAY_TMPDIR"
    ):
        fail_to_start(AssertionError("Ray was started"), monkeypatch, tmp_path)


@pytest.mark.parametrize("error", [Interrupted(2), KeyboardInterrupt()])
def test_interrupt_during_start_is_raised(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        fail_to_start(error, monkeypatch, tmp_path)


def test_second_signal_during_start_interrupts_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def send_two_signals(**settings: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("ray.init", send_two_signals)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Interrupted) as raised, Stopping() as stopping:
        with ray_for_run(stopping, Scaling(num_workers=1)):
            pass
    assert raised.value.exit_code == 143


def test_too_long_tmpdir_is_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configured = "/" + "x" * ray_compat.FOLDER_BYTES
    monkeypatch.setenv("RAY_TMPDIR", configured)
    with pytest.raises(KeyboardInterrupt):
        fail_to_start(KeyboardInterrupt(), monkeypatch, tmp_path)
    [line] = [record.message for record in caplog.records if "sockets" in record.message]
    assert line.startswith(f"the files of this run's Ray lie in /tmp, not in {configured}: ")
