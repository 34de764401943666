"""Clusters of one node, a user's folder and the command line, as processes."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

TOKEN = "canary-3d1f7a52c0"
BIN = Path(sys.executable).parent
TASK = """\
import os
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

import distplat


class Line(distplat.Task):
    def __init__(self, fail=False, pause=0.0):
        self.fail, self.pause = fail, pause

    def model(self):
        print("distplat is", distplat.__file__, "beside", sorted(os.listdir(".")))
        print("the colour is", os.environ.get("COLOUR"))
        return nn.Linear(4, 1)

    def train_data(self):
        x = torch.randn(64, 4)
        return TensorDataset(x, x.sum(1, keepdim=True))

    def eval_data(self):
        return self.train_data()

    def loss(self, outputs, targets):
        time.sleep(self.pause)
        if self.fail:
            raise ValueError("as requested")
        return nn.functional.mse_loss(outputs, targets)
"""
JOB = """\
name: line
task: line:Line
strategy: ring
scaling: {num_workers: 1}
optimizer: {name: SGD, lr: 0.1}
steps: 40
global_batch_size: 16
"""


@dataclass
class Head:
    """A cluster of one node, and the environment of its clients."""

    home: Path
    environ: dict[str, str]
    url: str = ""

    @property
    def gcs(self) -> str:
        return (self.home / "ray" / "ray_current_cluster").read_text().strip()


def make_folder(path: Path) -> Path:
    """Write a task, a job file, and a file that must not be uploaded."""
    (path / "line.py").write_text(TASK)
    (path / "job.yaml").write_text(JOB)
    (path / ".env").write_text("SECRET=1")
    return path


def clean_environ(home: Path, mode: str) -> dict[str, str]:
    """Return an environment without settings of other clusters; `home` is also Ray's folder."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DISTPLAT_"))}
    for name in ("PYTHONPATH", "FORCE_COLOR"):
        base.pop(name, None)
    path = f"{BIN}{os.pathsep}{base['PATH']}"  # the job's `python` is this one
    token = home / "token"
    token.write_text(TOKEN)
    changes = {"HOME": str(home), "PATH": path, "RAY_AUTH_MODE": mode, "RAY_TMPDIR": str(home)}
    return {**base, **changes, "RAY_AUTH_TOKEN_PATH": str(token)}


def script_environ(home: Path) -> dict[str, str]:
    """
    Return a `clean_environ` for scripts with DistributedDataParallel: they sleep before they exit.

    torch 2.13 keeps gloo's threads after `destroy_process_group` once DDP has used them. If such a
    thread requests the GIL while the interpreter ends, the process aborts: under plain torchrun,
    every third script aborted without this sleep.
    """
    site = home / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import atexit, time\natexit.register(time.sleep, 0.2)")
    # torchrun leaves a folder for logs among the temporary files.
    changes = {"PYTHONPATH": str(site), "TMPDIR": str(home)}
    return {**clean_environ(home, "disabled"), **changes}


def short_folder() -> Path:
    """Create a folder for Ray: the paths of pytest's folders are too long for its sockets."""
    return Path(tempfile.mkdtemp(prefix="dp", dir="/tmp"))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def wait_for_head(url: str, address_file: Path, head: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait for the dashboard, and for the file with the address, which Ray writes later."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        if dashboard_answers(url) and address_file.exists():
            return
        time.sleep(0.2)
    raise AssertionError(f"no dashboard at {url}, or no {address_file}: {log.read_text()}")


def dashboard_answers(url: str) -> bool:
    """Return whether a dashboard answers."""
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=2)
    except urllib.error.HTTPError:  # it requires a token
        return True
    except OSError:
        return False
    return True


def run_head(mode: str) -> Iterator[Head]:
    home = short_folder()
    environ = clean_environ(home, mode)
    dashboard, client = free_ports(2)
    command = (
        f"ray start --head --port=0 --dashboard-host=127.0.0.1 --dashboard-port={dashboard} "
        f"--dashboard-agent-listen-port=0 --ray-client-server-port={client} --min-worker-port=0 "
        f"--max-worker-port=0 --num-cpus=2 --include-dashboard=true --disable-usage-stats "
        f"--temp-dir={home}/ray --block"
    ).split()
    log = home / "head.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environ, stdout=out, stderr=out, start_new_session=True, cwd=home
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_head(url, home / "ray" / "ray_current_cluster", process, log)
        yield Head(home, environ, url)
        assert process.poll() is None, f"the head has ended: {log.read_text()[-3000:]}"
    finally:
        kill_tree(process)
        shutil.rmtree(home, ignore_errors=True)


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """End a head and its child processes only: other clusters may run on this machine."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # SIGTERM would drain the node first, for seconds
    process.wait(30)
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(family, timeout=30)


def run_distplat(
    *args: str, environ: dict[str, str], cwd: Path, timeout: float = 200
) -> "subprocess.CompletedProcess[str]":
    command = [str(BIN / "distplat"), *args]
    return subprocess.run(
        command, env=environ, cwd=cwd, capture_output=True, text=True, timeout=timeout
    )


def read_until(process: "subprocess.Popen[str]", text: str, seconds: float = 90) -> list[str]:
    """Read stderr until a line contains `text`; kill the process at the deadline."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    lines = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if text in line:
            timer.cancel()
            return lines
    timer.cancel()
    raise AssertionError(f"no {text!r} in: {''.join(lines)}")


def start_distplat(args: list[str], environ: dict[str, str], cwd: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(BIN / "distplat"), *args],
        env=environ,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


SLOW_JOB = ["--set", "task_args.pause=0.05", "--set", "steps=5000"]
