"""
Three hosts on one machine: each with a network, processes, mounts and shared memory of its own.

    this process's network --- bridge dpbr0 --- host 1 (head, driver)   10.77.0.1
                                           \\--- host 2                  10.77.0.2
                                            \\-- host 3                  10.77.0.3

Needs root and namespaces. `isolated` puts the caller into namespaces of its own first, so that
nothing is left on the machine, whatever dies. The hosts share the disk.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil

HOSTS = 3
_PORT = 6379
_ADDRESS = "10.77.0.{}"
_INSIDE = """
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up
mount -t tmpfs -o size=1g tmpfs /dev/shm; mkdir -p /tmp/ray; mount -t tmpfs tmpfs /tmp/ray
exec ray start {how} --node-ip-address={address} --num-cpus=4 --resources='{{"place": 1}}' \
    --object-store-memory=150000000 --disable-usage-stats --block
"""
_SLOW = "tbf rate 1mbit burst 8kb latency 1s".split()
"""10 ms and more for each packet on its way to a host; not every kernel has netem's delays."""
_NAMESPACES = ["--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]


def possible() -> bool:
    """Say whether hosts can be made here."""
    probe = ["unshare", *_NAMESPACES, "ip", "link", "add", "dpbr0", "type", "bridge"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except OSError:
        return False


def isolated(variable: str = "CHAOS_ISOLATED") -> None:
    """Begin this program anew in namespaces of its own, unless it is in them."""
    if variable not in os.environ:
        os.environ.update({variable: "1", "RAY_AUTH_MODE": "disabled"})  # nobody else gets there
        os.execvp("unshare", ["unshare", *_NAMESPACES, sys.executable, *sys.argv])


class ThreeHosts:
    """A cluster of three hosts; call `isolated` first."""

    def __init__(self) -> None:
        os.environ["PYTHONHASHSEED"] = "0"  # as for a run's own Ray, so that workers start at once
        os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "dpbr0", "type", "bridge")
        _ip("link", "set", "dpbr0", "up")
        self.address = f"{_ADDRESS.format(1)}:{_PORT}"
        self._hosts = {1: self._start(1)}
        self._wait_for_head()
        self._hosts |= {number: self._start(number) for number in range(2, HOSTS + 1)}
        self._touched: set[int] = set()
        time.sleep(5)  # `before_run` waits for what is late

    def _start(self, number: int) -> "subprocess.Popen[bytes]":
        how = f"--head --port={_PORT} --include-dashboard=false"
        if number > 1:
            how = f"--address={self.address}"
        script = _INSIDE.format(address=_ADDRESS.format(number), how=how)
        with open(os.devnull, "wb") as nowhere:
            process = subprocess.Popen(
                ["unshare", *_NAMESPACES, "bash", "-c", script], stdout=nowhere, stderr=nowhere
            )
        time.sleep(0.2)  # it is in its own network by then
        outer, inner = f"dpv{number}", f"dpp{number}"
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", outer, "master", "dpbr0")
        _ip("link", "set", outer, "up")
        _ip("link", "set", inner, "netns", str(process.pid), "name", "eth0")
        return process

    def _wait_for_head(self) -> None:
        until = time.monotonic() + 60
        while not any("raylet" in " ".join(p.cmdline()) for p in self._processes(1)):
            if time.monotonic() > until:
                raise TimeoutError("host 1 did not come up")
            time.sleep(0.2)
        time.sleep(3)

    def _processes(self, number: int) -> list[psutil.Process]:
        found = []
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._hosts[number].pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.cmdline()
                    found.append(process)
        return found

    def worker_resources(self, world: int) -> Mapping[str, float]:
        """One of two workers, or two of four, on a host; the third host is for who is replaced."""
        return {"CPU": 0.5, "place": 2 / world}

    def before_run(self) -> None:
        """Have three hosts."""
        self.mend()
        gone = [number for number, process in self._hosts.items() if process.poll() is not None]
        for number in gone:
            self._hosts[number] = self._start(number)
        if gone:
            time.sleep(6)

    def named_actors(self) -> list[str]:
        """Nobody outside the hosts can ask."""
        return []

    def hit_node(self, action: int | str) -> str:
        """See `Nodes`: kill or freeze all processes of a host, cut its link, or slow it down."""
        busy = [n for n in self._hosts if n > 1 and any(map(_is_worker, self._processes(n)))]
        if not busy:
            raise LookupError("no host but the first has a worker")
        number = busy[0]
        link = f"dpv{number}"
        if action == "cut":
            _ip("link", "set", link, "down")
            self._touched.add(number)
            return f"host {number} is cut off"
        if action == "slow":
            self._touched.add(number)
            _run(["tc", "qdisc", "add", "dev", link, "root", *_SLOW])
            return f"the link to host {number} is slow"
        assert isinstance(action, int)
        processes = self._processes(number)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(action)
        if action == signal.SIGSTOP:
            self._touched.add(number)
            return f"{len(processes)} processes of host {number} were stopped"
        self._hosts[number].wait(10)
        return f"host {number} is gone"

    def mend(self) -> None:
        """See `Nodes`."""
        for number in self._touched:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("link", "set", f"dpv{number}", "up")
            subprocess.run(
                ["tc", "qdisc", "del", "dev", f"dpv{number}", "root"], capture_output=True
            )
            for process in self._processes(number):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)
        self._touched.clear()

    def start_driver(self, command: list[str], **more: Any) -> "subprocess.Popen[bytes]":
        """Start a driver on host 1."""
        inside = str(self._processes(1)[0].pid)
        enter = ["nsenter", "-t", inside, "-n", "-m", "-p", "-u", f"--wd={os.getcwd()}", "--"]
        return subprocess.Popen([*enter, *command], **more)

    def close(self) -> None:
        """End all hosts."""
        for process in self._hosts.values():
            process.kill()
            process.wait()


def _is_worker(process: psutil.Process) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::Worker")
    except psutil.Error:
        return False


def _ip(*args: str) -> None:
    _run(["ip", *args])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)
