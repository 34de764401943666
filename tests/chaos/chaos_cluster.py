"""The Ray clusters of the grid: nodes on this host, one or several, that are its own."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

import psutil
import ray
from ray.cluster_utils import Cluster

NODE: dict[str, Any] = {"object_store_memory": 150 * 2**20}


def with_token() -> None:
    """
    Begin this program anew with a token in its environment, unless it says how Ray is to be used.

    Nobody else is to use its clusters. Ray reads the token when it is imported.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        os.execv(sys.executable, [sys.executable, *sys.argv])


class OneCluster:
    """
    A cluster of `nodes` Ray nodes.

    With several, workers and servers are spread over all but the head, where driver and controller
    are, and a node that was hit is replaced before the next run.

    Args:
        nodes: how many.
    """

    def __init__(self, nodes: int = 1) -> None:
        os.environ["PYTHONHASHSEED"] = "0"  # as for a run's own Ray, so that workers start at once
        self._several = nodes > 1
        head = {**NODE, "num_cpus": 4 if self._several else 32, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._others = [self._add() for _ in range(nodes - 1)]
        ray.init(address=self._cluster.address, logging_level="error", log_to_driver=False)
        self.address = str(self._cluster.address)
        self._frozen: list[psutil.Process] = []

    def worker_resources(self, world: int) -> Mapping[str, float]:
        """What a worker asks for: a place on another node than the head, if there are several."""
        return {"CPU": 0.5, "place": 1} if self._several else {"CPU": 0.5}

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=8, resources={"place": 8}, **NODE)

    def before_run(self) -> None:
        """Have as many nodes as at first."""
        self.mend()
        for node in [one for one in self._others if not one.live_processes()]:
            self._others.remove(node)
            self._cluster.remove_node(node, allow_graceful=False)
            self._others.append(self._add())
        if self._several:
            self._cluster.wait_for_nodes()

    def named_actors(self) -> list[str]:
        """Name the actors that there are."""
        return [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]

    def hit_node(self, action: int | str) -> str:
        """See `Nodes`: its raylet is sent a signal."""
        assert isinstance(action, int)
        raylets = [_raylet(node) for node in self._others]
        busy = [one for one in raylets if any(map(_is_worker, one.children(recursive=True)))]
        if not busy:
            raise LookupError("no node has a worker")
        victim = busy[0]
        victim.send_signal(action)
        if action == signal.SIGSTOP:
            self._frozen.append(victim)
            return f"raylet {victim.pid} is {victim.status()}"
        until = time.monotonic() + 10
        while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > until:
                return ""
            time.sleep(0.01)
        return f"raylet {victim.pid} is gone"

    def mend(self) -> None:
        """See `Nodes`."""
        while self._frozen:
            self._frozen.pop().send_signal(signal.SIGCONT)

    def start_driver(self, command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        """Start a driver of this cluster."""
        return _start_driver(command, **more)

    def close(self) -> None:
        """End it."""
        self.mend()
        ray.shutdown()
        self._cluster.shutdown()


class HeadApart:
    """
    A cluster of one node whose head may die: a process of its own starts it.

    Ray ends all processes that are connected to a head which is gone, and the grid is not to be
    one of them. What Ray waits for a head to come back is shortened.
    """

    def __init__(self) -> None:
        os.environ["PYTHONHASHSEED"] = "0"  # as for a run's own Ray, so that workers start at once
        os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "15"
        self._keeper: subprocess.Popen[str] | None = None
        self.address = ""

    def worker_resources(self, world: int) -> Mapping[str, float]:
        """Say what each of so many workers asks for."""
        return {"CPU": 0.5}

    def before_run(self) -> None:
        """Have a head."""
        if any(one.name() == "gcs_server" for one in self._processes()):
            return
        for _ in range(_TRIES):
            self.close()
            command = [sys.executable, __file__]
            self._keeper = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for line in self._keeper.stdout or ():
                self.address = line.partition(_ADDRESS)[2].strip()
                if self.address:
                    return
        raise RuntimeError("no head came up")

    def named_actors(self) -> list[str]:
        """Nobody outside of the cluster can ask."""
        return []

    def hit_node(self, action: int | str) -> str:
        """See `Nodes`."""
        raise LookupError("there is one node only")

    def mend(self) -> None:
        """See `Nodes`."""

    def start_driver(self, command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        """Start a driver of this cluster."""
        return _start_driver(command, **more)

    def close(self) -> None:
        """End it."""
        left = self._processes()
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._keeper, self.address = None, ""

    def _processes(self) -> list[psutil.Process]:
        if self._keeper is None:
            return []
        try:
            found = psutil.Process(self._keeper.pid).children(recursive=True)
        except psutil.Error:
            return []
        return [one for one in found if one.status() != psutil.STATUS_ZOMBIE]


_ADDRESS = "address of the head: "
_TRIES = 3
"""Ray gives a node 30 s to come up, which a busy machine may exceed."""


def _keep_head() -> None:
    """Start a head, say where it is, and end with whoever has started this."""
    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "num_cpus": 32, "include_dashboard": False}
    )
    print(f"{_ADDRESS}{cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()


def _start_driver(command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
    # A grid in the background ignores SIGINT, and so would its drivers.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=environ, start_new_session=True, **more)


def _raylet(node: Any) -> psutil.Process:
    (info,) = node.all_processes["raylet"]
    return psutil.Process(info.process.pid)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::Worker")
    except psutil.Error:
        return False


class AnyCluster(Protocol):
    """What a trial needs of a cluster."""

    address: str

    def worker_resources(self, world: int) -> Mapping[str, float]:
        """Say what each of so many workers asks for."""

    def before_run(self) -> None:
        """Have all nodes there are to be."""

    def named_actors(self) -> list[str]:
        """Name the actors that there are, as far as that can be asked."""

    def hit_node(self, action: int | str) -> str:
        """See `Nodes`."""

    def mend(self) -> None:
        """See `Nodes`."""

    def start_driver(self, command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        """Start a driver of this cluster."""

    def close(self) -> None:
        """End it."""


if __name__ == "__main__":
    _keep_head()
