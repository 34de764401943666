"""The Ray that a run starts for itself: who on this machine or its network can reach it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

DRIVER = """
import json, os, sys
import psutil, ray
from jobs import job_of
from distplat.actors.launch import local_ray

def listeners():
    mine = {p.pid for p in psutil.Process().children(recursive=True)} | {os.getpid()}
    return sorted({c.laddr.ip.removeprefix("::ffff:") for c in psutil.net_connections("tcp")
                   if c.status == psutil.CONN_LISTEN and c.pid in mine})

with local_ray(job_of("ring", 1).scaling):
    ray.get(ray.remote(lambda: None).remote(), timeout=60)  # workers listen, too
    print(json.dumps({"listeners": listeners(), "mode": os.environ["RAY_AUTH_MODE"]}))
"""


def test_it_listens_on_loopback_alone_and_asks_for_a_token(tmp_path: Path) -> None:
    """In a process of its own: Ray reads the token of a home once in a process's life."""
    hidden = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env={**kept, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr
    told = json.loads(driver.stdout.splitlines()[-1])
    assert told == {"listeners": ["127.0.0.1"], "mode": "token"}
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
