"""Security of a private Ray: its listeners, its token, its files and its process group."""

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

ray._private.worker.enable_token_auth_by_default = lambda: False  # no token by default

def error_without_token():
    code = "from ray._raylet import InnerGcsClient as C; C.standalone(%r, None, 30000)"
    command = [sys.executable, "-c", code % ray.get_runtime_context().gcs_address]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=90).stderr

def listeners(mine):
    return [c.laddr for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.pid in mine]

def responses_to_stranger(port):
    responses = set()
    for request in (b"", bytes(80), b"GET /metrics HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(request)
            client.settimeout(0.3)
            try:
                responses.add(client.recv(1000).hex())
            except OSError:
                responses.add("")
    return responses

with local_ray(job_of("ring", 2).scaling):
    cls = ray.remote(Member).options(num_cpus=0.1)
    members = [cls.remote() for _ in range(2)]
    ray.get([m.join.remote("g", r, 2) for r, m in enumerate(members)], timeout=60)
    pids = {*ray.get([m.pid.remote() for m in members], timeout=60)}
    mine = {p.pid for p in psutil.Process().children(recursive=True)} | {os.getpid()}
    responses = [responses_to_stranger(address.port) for address in listeners(pids)]
    files = Path(ray._private.worker._global_node.get_session_dir_path())
    closed = [p for p in (files, *files.parents) if p.stat().st_mode & 0o005 != 0o005]
    print(json.dumps({
        "files": [str(files), [p.stat().st_mode & 0o777 for p in closed]],
        "listeners": sorted({a.ip.removeprefix("::ffff:") for a in listeners(mine)}),
        "mode": os.environ["RAY_AUTH_MODE"],
        "error without token": error_without_token(),
        "responses": sorted({text for texts in responses for text in texts}),
        "ports": len(responses),
        "in driver's group": [p for p in mine - {os.getpid()} if os.getpgid(p) == os.getpgid(0)],
    }))
    ray.get([m.leave.remote() for m in members], timeout=60)
"""
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run a driver in a separate process: Ray reads the token once per process."""
    home = tmp_path_factory.mktemp("home")
    hidden = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    path = os.pathsep.join([str(SUPPORT), str(Path(__file__).parent)])
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env={**environ, "HOME": str(home), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr
    found: dict[str, Any] = json.loads(driver.stdout.splitlines()[-1])
    return {**found, "token mode": (home / ".ray" / "auth_token").stat().st_mode & 0o777}


def test_listens_on_loopback_only_and_requires_a_token(facts: dict[str, Any]) -> None:
    """Independent of the default of the installed Ray."""
    assert (facts["listeners"], facts["mode"]) == (["127.0.0.1"], "token")
    assert "AuthenticationError" in facts["error without token"]
    assert facts["token mode"] == 0o600


def test_files_are_private_and_removed(facts: dict[str, Any]) -> None:
    """By default any user may write to Ray's directories, which contain its sockets."""
    files, modes = facts["files"]
    assert modes == [0o700]
    assert not Path(files).parents[1].exists()


def test_ports_of_ranks_do_not_answer_strangers(facts: dict[str, Any]) -> None:
    """Ports of Ray send the settings frame of gRPC to any client; other ports send nothing."""
    assert facts["ports"] >= 4
    greeting = bytes.fromhex("0000180400000000000004")  # an empty settings frame
    assert all(not r or bytes.fromhex(r).startswith(greeting) for r in facts["responses"])


def test_driver_is_alone_in_its_process_group(facts: dict[str, Any]) -> None:
    """Otherwise a signal of `timeout` or of a closed terminal would end Ray before the run."""
    assert facts["in driver's group"] == []
