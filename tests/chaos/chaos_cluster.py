"""The Ray clusters of the fault grid: one or several nodes on this host."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import psutil
import ray
from chaos_injector import effect_of
from ray.cluster_utils import Cluster

NODE: dict[str, Any] = {"object_store_memory": 150 * 2**20}


def with_token() -> None:
    """
    Restart this program with a random token, unless `RAY_AUTH_MODE` is set.

    The token protects the clusters from other users. Ray reads it when it is imported.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        os.execv(sys.executable, [sys.executable, *sys.argv])


class OneCluster:
    """
    A cluster of `nodes` Ray nodes.

    With several nodes, driver and controller are on the head, and workers and servers on the other
    nodes; lost nodes are replaced before the next run.

    Args:
        nodes: number of nodes.
    """

    def __init__(self, nodes: int = 1) -> None:
        os.environ["PYTHONHASHSEED"] = "0"  # as for a private Ray, so that workers start at once
        self._has_worker_nodes = nodes > 1
        head = {**NODE, "num_cpus": 4 if self._has_worker_nodes else 32, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._worker_nodes = [self._add() for _ in range(nodes - 1)]
        ray.init(address=self._cluster.address, logging_level="error", log_to_driver=False)
        self.address = str(self._cluster.address)
        self._frozen: list[psutil.Process] = []

    def worker_resources(self, world: int) -> Mapping[str, float]:
        """Return the resources of a worker: with several nodes, a place on a node but the head."""
        return {"CPU": 0.5, "place": 1} if self._has_worker_nodes else {"CPU": 0.5}

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=8, resources={"place": 8}, **NODE)

    def before_run(self) -> None:
        """Resume frozen nodes, and replace lost ones."""
        self.restore()
        for node in [other for other in self._worker_nodes if not other.live_processes()]:
            self._worker_nodes.remove(node)
            self._cluster.remove_node(node, allow_graceful=False)
            self._worker_nodes.append(self._add())
        if self._has_worker_nodes:
            self._cluster.wait_for_nodes()

    def named_actors(self) -> list[str]:
        """Return the names of all actors."""
        return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]

    def inject_node_fault(self, action: int | str) -> str:
        """See `Nodes`; the signal is sent to the raylet."""
        assert isinstance(action, int)
        raylets = [_raylet(node) for node in self._worker_nodes]
        busy = [r for r in raylets if any(map(_is_worker, r.children(recursive=True)))]
        if not busy:
            raise LookupError("no node has a worker")
        victim = busy[0]
        victim.send_signal(action)
        if action == signal.SIGSTOP:
            self._frozen.append(victim)
        return effect_of(victim, action)

    def restore(self) -> None:
        """See `Nodes`."""
        while self._frozen:
            self._frozen.pop().send_signal(signal.SIGCONT)

    def start_driver(self, command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        """Start a driver that uses this cluster."""
        return _start_driver(command, **more)

    def close(self) -> None:
        """End the cluster."""
        self.restore()
        ray.shutdown()
        self._cluster.shutdown()


class SeparateHead:
    """
    A cluster of one node, started by a separate process, so that its head can be killed.

    Ray ends the processes that are connected to a lost head, so the grid does not connect. The
    time for which Ray waits for a restarted head is shortened.
    """

    def __init__(self) -> None:
        os.environ["PYTHONHASHSEED"] = "0"  # as for a private Ray, so that workers start at once
        os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "15"
        self._head_starter: subprocess.Popen[str] | None = None
        self.address = ""

    def worker_resources(self, world: int) -> Mapping[str, float]:
        """Return the resources of each of `world` workers."""
        return {"CPU": 0.5}

    def before_run(self) -> None:
        """Start a head, unless it is running."""
        if any(process.name() == "gcs_server" for process in self._processes()):
            return
        for _ in range(_START_ATTEMPTS):
            self.close()
            command = [sys.executable, __file__]
            self._head_starter = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for line in self._head_starter.stdout or ():
                self.address = line.partition(_ADDRESS)[2].strip()
                if self.address:
                    return
        raise RuntimeError("the head did not start")

    def named_actors(self) -> list[str]:
        """Return an empty list: this process is not connected to the cluster."""
        return []

    def inject_node_fault(self, action: int | str) -> str:
        """See `Nodes`."""
        raise LookupError("the cluster has one node")

    def restore(self) -> None:
        """See `Nodes`."""

    def start_driver(self, command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        """Start a driver that uses this cluster."""
        return _start_driver(command, **more)

    def close(self) -> None:
        """End the cluster."""
        left = self._processes()
        if self._head_starter is not None:
            self._head_starter.kill()
            self._head_starter.wait()
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._head_starter, self.address = None, ""

    def _processes(self) -> list[psutil.Process]:
        if self._head_starter is None:
            return []
        try:
            found = psutil.Process(self._head_starter.pid).children(recursive=True)
        except psutil.Error:
            return []
        return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


_ADDRESS = "address of the head: "
_START_ATTEMPTS = 3
"""Ray waits 30 s for the start of a node; a busy machine may need longer."""


def _run_head() -> None:
    """Start a head, print its address, and end with the parent process."""
    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "num_cpus": 32, "include_dashboard": False}
    )
    print(f"{_ADDRESS}{cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()


def _start_driver(command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
    # Background jobs ignore SIGINT; drivers would inherit that.
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
    """A cluster as used by a trial."""

    address: str

    def worker_resources(self, world: int) -> Mapping[str, float]:
        """Return the resources of each of `world` workers."""

    def before_run(self) -> None:
        """Restore all nodes."""

    def named_actors(self) -> list[str]:
        """Return the names of all actors, if this process is connected to the cluster."""

    def inject_node_fault(self, action: int | str) -> str:
        """See `Nodes`."""

    def restore(self) -> None:
        """See `Nodes`."""

    def start_driver(self, command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        """Start a driver that uses this cluster."""

    def close(self) -> None:
        """End the cluster."""


if __name__ == "__main__":
    _run_head()
