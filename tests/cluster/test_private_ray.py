"""The Ray that a run starts for itself: who on this machine or its network can reach it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

DRIVER = """
import json, os, socket, subprocess, sys
from pathlib import Path
import psutil, ray
from jobs import job_of
from members import Member
from distplat.actors.launch import local_ray

ray._private.worker.enable_token_auth_by_default = lambda: False  # as in a release that has it off

def told_without_token():
    ask = "from ray._raylet import InnerGcsClient as C; C.standalone(%r, None, 30000)"
    command = [sys.executable, "-c", ask % ray.get_runtime_context().gcs_address]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=90).stderr

def listeners(mine):
    return [c.laddr for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.pid in mine]

def said_to_a_stranger(port):
    found = set()
    for words in (b"", bytes(80), b"GET /metrics HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(words)
            stranger.settimeout(0.3)
            try:
                found.add(stranger.recv(1000).hex())
            except OSError:
                found.add("")
    return found

with local_ray(job_of("ring", 2).scaling):
    kind = ray.remote(Member).options(num_cpus=0.1)
    members = [kind.remote() for _ in range(2)]
    ray.get([m.join.remote("g", r, 2) for r, m in enumerate(members)], timeout=60)
    pids = {*ray.get([m.pid.remote() for m in members], timeout=60)}
    mine = {p.pid for p in psutil.Process().children(recursive=True)} | {os.getpid()}
    said = [said_to_a_stranger(one.port) for one in listeners(pids)]
    files = Path(ray._private.worker._global_node.get_session_dir_path())
    reach = [p for p in (files, *files.parents) if p.stat().st_mode & 0o005 != 0o005]
    print(json.dumps({
        "files": [str(files), [p.stat().st_mode & 0o777 for p in reach]],
        "listeners": sorted({one.ip.removeprefix("::ffff:") for one in listeners(mine)}),
        "mode": os.environ["RAY_AUTH_MODE"],
        "told without token": told_without_token(),
        "said": sorted({one for each in said for one in each}),
        "ports": len(said),
        "in our group": [p for p in mine - {os.getpid()} if os.getpgid(p) == os.getpgid(0)],
    }))
    ray.get([m.leave.remote() for m in members], timeout=60)
"""
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own: Ray reads the token of a home once in a process's life."""
    home = tmp_path_factory.mktemp("home")
    hidden = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    path = os.pathsep.join([str(SUPPORT), str(Path(__file__).parent)])
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env={**kept, "HOME": str(home), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr
    found: dict[str, Any] = json.loads(driver.stdout.splitlines()[-1])
    return {**found, "token mode": (home / ".ray" / "auth_token").stat().st_mode & 0o777}


def test_it_listens_on_loopback_alone_and_asks_for_a_token(told: dict[str, Any]) -> None:
    """Whatever the default of the installed Ray is."""
    assert (told["listeners"], told["mode"]) == (["127.0.0.1"], "token")
    assert "AuthenticationError" in told["told without token"]
    assert told["token mode"] == 0o600


def test_its_files_are_its_owners_alone_and_go_with_it(told: dict[str, Any]) -> None:
    """Ray's own directories, with its sockets, are for everybody to write."""
    files, modes = told["files"]
    assert modes == [0o700]
    assert not Path(files).parents[1].exists()


def test_no_port_of_a_rank_answers_a_stranger(told: dict[str, Any]) -> None:
    """Ray's own begin with the settings of gRPC, whoever comes. The others say nothing."""
    assert told["ports"] >= 4
    greeting = bytes.fromhex("0000180400000000000004")  # a frame of settings
    assert all(not one or bytes.fromhex(one).startswith(greeting) for one in told["said"])


def test_a_signal_to_the_drivers_group_is_the_drivers_alone(told: dict[str, Any]) -> None:
    """`timeout`, or a terminal that goes away: else Ray ends before the run can end in order."""
    assert told["in our group"] == []
