"""
Latency from `submit` to the first loss of the first step, on a running cluster.

Two ways to submit are measured. Joined: the client process itself is the driver (`--address
HOST:PORT` and `python script.py`). Job API: the client submits the job to the cluster over HTTP,
with its folder (`--address http://...` and a script submitted in the same way). The peer's script
is a TorchTrainer. Both start 2 workers and train the same small model; the time is measured from
the start of the client process to the first loss on rank 0.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from common import WORKERS, alternately, print_ratio

GOAL_S = 4.0

TASK = """
import os, time
import torch
from torch import nn
from torch.utils.data import TensorDataset
from distplat import Task

class Small(Task):
    def model(self): return nn.Linear(8, 1)
    def train_data(self): return TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
    def loss(self, outputs, targets):
        if not os.path.exists({stamp!r}): open({stamp!r}, "w").write(str(time.time()))
        return nn.functional.mse_loss(outputs, targets)
"""

JOB = """
name: latency
task: small:Small
strategy: {strategy}
scaling: {{num_workers: {workers}}}
optimizer: {{name: SGD, lr: 0.1}}
steps: 3
global_batch_size: 8
checkpoint: {{save_final: false}}
storage_path: {runs}
"""

PEER = """
import os, time
import torch, ray.train.torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

def loop():
    model = ray.train.torch.prepare_model(torch.nn.Linear(8, 1))
    outputs = model(torch.randn(4, 8))
    if ray.train.get_context().get_world_rank() == 0:
        open({stamp!r}, "w").write(str(time.time()))
    torch.nn.functional.mse_loss(outputs, torch.randn(4, 1)).backward()

TorchTrainer(loop, scaling_config=ScalingConfig(num_workers={workers}),
             torch_config=TorchConfig(backend="gloo"),
             run_config=RunConfig(storage_path={runs!r})).fit()
"""

PEER_CLIENT = """
import sys, time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient(sys.argv[1])
job = client.submit_job(entrypoint="python peer.py", runtime_env={"working_dir": sys.argv[2]})
while client.get_job_status(job) not in ("SUCCEEDED", "FAILED"): time.sleep(0.2)
"""


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def head() -> Iterator[tuple[str, str]]:
    """Run a Ray head with its dashboard; yield the addresses of its job API and its GCS."""
    port, gcs = free_port(), free_port()
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
        *(f"--port={gcs}", f"--dashboard-port={port}", "--dashboard-host=127.0.0.1"),
        *("--num-cpus=2", "--disable-usage-stats"),
    ]
    folder = str(Path(sys.executable).parent)  # a job's `python` is to be this one
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        time.sleep(3)  # its agents start up too; a cluster that is running has them
        yield f"http://127.0.0.1:{port}", f"127.0.0.1:{gcs}"
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=20)
        for left in alive:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait(20)


def measure(command: list[str], stamp: Path) -> float:
    """Run a client to its end; return the seconds until the first loss."""
    stamp.unlink(missing_ok=True)
    began = time.time()
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return float(stamp.read_text()) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # on loopback, for the minutes of the benchmark
    with TemporaryDirectory() as folder, head() as (api, gcs):
        root, stamp = Path(folder), Path(folder, "stamp")
        mine, theirs = root / "mine", root / "theirs"
        mine.mkdir()
        theirs.mkdir()
        facts = {"stamp": str(stamp), "workers": WORKERS, "runs": str(root / "runs")}
        (mine / "small.py").write_text(TASK.format(**facts))
        (theirs / "peer.py").write_text(PEER.format(**facts))
        submit = [sys.executable, "-m", "distplat.cli.main", "submit", str(mine / "job.yaml")]
        os.environ["RAY_ADDRESS"] = gcs  # for the peer's script; ours is told by its flag
        ways = {
            "joined": (gcs, [sys.executable, str(theirs / "peer.py")]),
            "job API": (api, [sys.executable, "-c", PEER_CLIENT, api, str(theirs)]),
        }
        for strategy in ("ring", "ps-sync"):
            (mine / "job.yaml").write_text(JOB.format(strategy=strategy, **facts))
            for way, (address, peer) in ways.items():
                ours, theirs_s = alternately(
                    partial(measure, [*submit, "--address", address], stamp),
                    partial(measure, peer, stamp),
                    args.rounds,
                )
                what = f"submit to first step, {strategy}, {way}"
                print_ratio(what, ours, theirs_s, GOAL_S / theirs_s, "s")


if __name__ == "__main__":
    main()
