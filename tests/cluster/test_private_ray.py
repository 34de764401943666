"""The Ray that a run starts for itself: who on this machine or its network can reach it."""

import os
from pathlib import Path

import psutil
import pytest
import ray
from jobs import job_of

from distplat.actors.launch import local_ray

pytestmark = pytest.mark.cluster


def running() -> bool:
    """Be a worker process: it listens, too."""
    return True


def listeners() -> set[str]:
    """Addresses at which this process and those that come from it take connections."""
    mine = {p.pid for p in psutil.Process().children(recursive=True)} | {os.getpid()}
    found = set()
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in mine:
            found.add(str(next(iter(connection.laddr))).removeprefix("::ffff:"))
    return found


def test_it_listens_on_loopback_alone_and_asks_for_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with local_ray(job_of("ring", 1)):
        assert ray.get(ray.remote(running).remote(), timeout=60)
        assert listeners() == {"127.0.0.1"}
        assert os.environ["RAY_AUTH_MODE"] == "token", "which Ray sets, and its processes inherit"
        token = tmp_path / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o777 == 0o600
