"""
Three hosts on one machine, each with a separate network, pid and mount namespace.

    this process's network --- bridge dpbr0 --- host 1 (head, driver)   10.77.0.1
                                           \\--- host 2                  10.77.0.2
                                            \\-- host 3                  10.77.0.3

Requires root and namespaces. `isolate` restarts the caller in new namespaces, so that nothing is
left on the machine after a crash. The hosts share the disk.
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
_HOST_SCRIPT = """
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up
mount -t tmpfs -o size=1g tmpfs /dev/shm; mkdir -p /tmp/ray; mount -t tmpfs tmpfs /tmp/ray
exec ray start {options} --node-ip-address={address} --num-cpus=4 --resources='{{"place": 1}}' \
    --object-store-memory=150000000 --disable-usage-stats --block
"""
_SLOW = "tbf rate 1mbit burst 8kb latency 1s".split()
"""Delays each packet to a host by 10 ms or more; some kernels lack netem."""
_NAMESPACES = ["--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]


def can_create_hosts() -> bool:
    """Return whether namespaces are permitted on this machine."""
    probe = ["unshare", *_NAMESPACES, "ip", "link", "add", "dpbr0", "type", "bridge"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except OSError:
        return False


def isolate(variable: str = "CHAOS_ISOLATED") -> None:
    """Restart this program in new namespaces, once."""
    if variable not in os.environ:
        os.environ.update({variable: "1", "RAY_AUTH_MODE": "disabled"})  # no other user can connect
        os.execvp("unshare", ["unshare", *_NAMESPACES, sys.executable, *sys.argv])


class ThreeHosts:
    """A cluster of three hosts; call `isolate` first."""

    def __init__(self) -> None:
        os.environ["PYTHONHASHSEED"] = "0"  # as for a private Ray, so that workers start at once
        os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "dpbr0", "type", "bridge")
        _ip("link", "set", "dpbr0", "up")
        self.address = f"{_ADDRESS.format(1)}:{_PORT}"
        self._hosts = {1: self._start(1)}
        self._wait_for_head()
        self._hosts |= {number: self._start(number) for number in range(2, HOSTS + 1)}
        self._faulty: set[int] = set()
        time.sleep(5)  # `before_run` waits for late hosts

    def _start(self, number: int) -> "subprocess.Popen[bytes]":
        options = f"--head --port={_PORT} --include-dashboard=false"
        if number > 1:
            options = f"--address={self.address}"
        script = _HOST_SCRIPT.format(address=_ADDRESS.format(number), options=options)
        with open(os.devnull, "wb") as devnull:
            process = subprocess.Popen(
                ["unshare", *_NAMESPACES, "bash", "-c", script], stdout=devnull, stderr=devnull
            )
        time.sleep(0.2)  # it has its network namespace by then
        outer, inner = f"dpv{number}", f"dpp{number}"
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", outer, "master", "dpbr0")
        _ip("link", "set", outer, "up")
        _ip("link", "set", inner, "netns", str(process.pid), "name", "eth0")
        return process

    def _wait_for_head(self) -> None:
        deadline = time.monotonic() + 60
        while not any("raylet" in " ".join(p.cmdline()) for p in self._processes(1)):
            if time.monotonic() > deadline:
                raise TimeoutError("host 1 did not start")
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
        """Place one of two workers, or two of four, on a host; host 3 is for replacements."""
        return {"CPU": 0.5, "place": 2 / world}

    def before_run(self) -> None:
        """Restore links, and restart ended hosts."""
        self.restore()
        gone = [number for number, process in self._hosts.items() if process.poll() is not None]
        for number in gone:
            self._hosts[number] = self._start(number)
        if gone:
            time.sleep(6)

    def named_actors(self) -> list[str]:
        """Return an empty list: this process is not connected to the cluster."""
        return []

    def inject_node_fault(self, action: int | str) -> str:
        """See `Nodes`; actions: a signal to all processes of a host, `cut` or `slow` its link."""
        busy = [n for n in self._hosts if n > 1 and any(map(_is_worker, self._processes(n)))]
        if not busy:
            raise LookupError("only the first host has workers")
        number = busy[0]
        link = f"dpv{number}"
        if action == "cut":
            _ip("link", "set", link, "down")
            self._faulty.add(number)
            return f"host {number} is cut off"
        if action == "slow":
            self._faulty.add(number)
            _run(["tc", "qdisc", "add", "dev", link, "root", *_SLOW])
            return f"the link to host {number} is slow"
        assert isinstance(action, int)
        processes = self._processes(number)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(action)
        if action == signal.SIGSTOP:
            self._faulty.add(number)
            return f"{len(processes)} processes of host {number} were stopped"
        self._hosts[number].wait(10)
        return f"host {number} is gone"

    def restore(self) -> None:
        """See `Nodes`."""
        for number in self._faulty:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("link", "set", f"dpv{number}", "up")
            subprocess.run(
                ["tc", "qdisc", "del", "dev", f"dpv{number}", "root"], capture_output=True
            )
            for process in self._processes(number):
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)
        self._faulty.clear()

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
