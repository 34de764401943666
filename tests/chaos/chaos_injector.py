"""
Injects the faults of a trial into a run at given moments, and checks their effects.

Most faults are signals to processes. A fault has fired if the process existed before, and is gone
(SIGKILL) or stopped (SIGSTOP) afterwards.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil
import ray

EXIT_TIMEOUT_S = 10.0
POLL_S = 0.002
COMPLETE_CHECKPOINTS = "*/checkpoints/step-" + "[0-9]" * 6
"""Pattern of complete checkpoints, relative to the folder of the run directories."""
TITLES = {
    "server": "ServerNode",
    "server-manager": "ServerManager",
    "task-scheduler": "Scheduler",
    "controller": "ControllerActor",
}
"""Roles, and the classes of their actors, which Ray writes to the titles of processes."""

STARVE = "starve"
"""Action: the kernel's OOM killer kills the process."""
CGROUPS = Path("/sys/fs/cgroup/memory")
"""Memory controller of cgroups version 1."""

REPORTED = ("data", "model", "renewed", "forward", "between", "backward", "evaluation")
"""
Moments that the task reports. `between` is between a forward and its backward; its step is the
number of the forward. The injector detects two more moments: `partial`, a checkpoint is being
written; `checkpoint`, a checkpoint is complete.
"""


@dataclass(frozen=True)
class PlannedFault:
    """One fault."""

    moment: str
    """See `REPORTED`."""
    rank: int = 0
    """Rank that reaches the moment."""
    step: int = 0
    """Step of the moment, or the first later step of this rank."""
    victim: str = "self"
    """`self`, `worker-1`, `workers` (all), `server`, `servers`, `primary` (of a shard with a ready
    backup), a role of `TITLES`, `driver`, `disk`, `node`, `head` (of the cluster)."""
    action: int | str = signal.SIGKILL
    """A signal, or `STARVE`. For `self` also an action of the task, for `disk` an action of `Disk`,
    for the link of a `node` `cut` or `slow`."""
    hold: bool = True
    """Whether the rank waits at the moment until the fault is injected."""
    delay_s: float = 0.0
    """Seconds from the moment to the fault."""
    saved: bool = False
    """Whether to wait for a complete checkpoint first."""
    undo_s: float = 0.0
    """Seconds until a frozen process resumes, or a full disk is emptied; 0: never."""

    @property
    def request(self) -> list[object]:
        """Moment, rank, step, and whether to wait there: an item of the task's `moments`."""
        return [self.moment, self.rank, self.step, self.hold or self.saved]

    def __str__(self) -> str:
        action = signal.Signals(self.action).name if isinstance(self.action, int) else self.action
        return f"{action} {self.victim} at {self.moment} of rank {self.rank}, step {self.step}"


@dataclass
class Fired:
    """An injected fault."""

    fault: PlannedFault
    at: float
    """`time.time()` of the fault."""
    proof: str
    """Observed effect."""


class Nodes(Protocol):
    """Nodes of a cluster, for faults of a whole node."""

    def inject_node_fault(self, action: int | str) -> str:
        """
        Inject a fault into a node with a worker, not the driver's node; return the effect.

        Args:
            action: a signal to its processes, or a change of its link.
        """

    def restore(self) -> None:
        """Resume frozen nodes and restore links."""


@dataclass
class Scene:
    """Folders, disk and nodes of a run."""

    folder: Path
    """For the files of task and injector."""
    storage: Path
    """Folder of the run directories."""
    disk: "Disk | None" = None
    nodes: "Nodes | None" = None
    driver: int = 0
    """Process of the current driver."""


@dataclass
class Disk:
    """A small disk (tmpfs) for run directories."""

    path: Path
    run: Callable[[list[str]], None]
    """Runs a command as root."""
    ballast: list[Path] = field(default_factory=list)
    _covered: bool = False  #: by a mount that is read-only or does not respond
    _unserved: int = -1  #: descriptor of the mount that does not respond

    def act(self, action: int | str) -> str:
        """Inject a fault (`fill`, `read-only`, `remove`, `hang`); return the effect."""
        actions = {"fill": self.fill, "read-only": self.read_only}
        return (actions | {"remove": self.remove, "hang": self.hang})[str(action)]()

    def fill(self) -> str:
        """Fill the disk."""
        path = self.path / f"ballast-{len(self.ballast)}"
        self.ballast.append(path)
        try:
            with path.open("wb", buffering=0) as file:
                while file.write(bytes(2**16)):
                    pass
        except OSError as error:
            return f"ENOSPC: {error.strerror}"
        return ""

    def read_only(self) -> str:
        """
        Make the disk read-only; files that are already open stay writable.

        Open files prevent a remount of the disk itself, so a bind mount covers it.
        """
        self.run(["mount", "--bind", str(self.path), str(self.path)])
        self._covered = True
        self.run(["mount", "-o", "remount,bind,ro", str(self.path)])
        try:
            (self.path / "probe").touch()
        except OSError as error:
            return f"EROFS: {error.strerror}"
        return ""

    def hang(self) -> str:
        """
        Block all accesses by a FUSE mount without a server; open files are not affected.
        """
        self._unserved = file = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={file},rootmode=40000,user_id=0,group_id=0"
        mount = ["mount", "-i", "-t", "fuse", "-o", options, "unserved", str(self.path)]
        subprocess.run(mount, check=True, capture_output=True, pass_fds=(file,))
        self._covered = True
        try:
            subprocess.run(["stat", str(self.path / "probe")], capture_output=True, timeout=0.5)
        except subprocess.TimeoutExpired:
            return "no answer within 0.5 s"
        return ""

    def remove(self) -> str:
        """Delete all run directories."""
        found = [path.parent for path in self.path.glob("*/job.yaml")]
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        gone = [path.name for path in found if not (path / "job.yaml").exists()]
        return f"deleted: {', '.join(gone)}" if gone else ""

    def restore(self) -> None:
        """Restore write access."""
        if self._covered:
            self._covered = False
            self.run(["umount", "-l", str(self.path)])
        if self._unserved >= 0:
            os.close(self._unserved)  # blocked accesses get an error
            self._unserved = -1
        for path in self.ballast:
            path.unlink(missing_ok=True)
        self.ballast.clear()


class Injector(threading.Thread):
    """
    Injects the faults of a trial.

    Args:
        scene: of the run.
        faults: the faults; the task creates the file `ask-<n>` at the moment of fault n.
    """

    def __init__(self, scene: Scene, faults: tuple[PlannedFault, ...]) -> None:
        super().__init__(daemon=True)
        self.scene, self.faults = scene, faults
        self.fired: list[Fired] = []
        self.problems: list[str] = []
        self._stopped = threading.Event()
        self._undo: list[tuple[float, Callable[[], None]]] = []

    def run(self) -> None:
        """Poll for moments until all faults are injected and undone, or until `end`."""
        left = dict(enumerate(self.faults))
        while (left or self._undo) and not self._stopped.is_set():
            for number, fault in list(left.items()):
                if not self._is_reached(number, fault):
                    continue
                del left[number]
                try:
                    self._handle(number, fault)
                except (LookupError, OSError, psutil.Error, ray.exceptions.RayError) as error:
                    self.problems.append(f"{fault}: {type(error).__name__}: {error}")
            self._undo_due()
            self._stopped.wait(
                0.0005 if any(d.moment == "partial" for d in left.values()) else POLL_S
            )

    def end(self) -> None:
        """Stop the thread, and undo the remaining faults."""
        self._stopped.set()
        if self.ident is not None:  # the thread was started
            self.join(EXIT_TIMEOUT_S + 60)
        for _, undo in self._undo:
            with contextlib.suppress(OSError):
                undo()

    def _is_reached(self, number: int, fault: PlannedFault) -> bool:
        if fault.moment in REPORTED:
            return (self.scene.folder / f"ask-{number}").exists()
        is_complete = any(self.scene.storage.glob(COMPLETE_CHECKPOINTS))
        if fault.moment == "checkpoint":
            return is_complete
        return is_complete >= fault.saved and any(
            self.scene.storage.glob("*/checkpoints/*.partial")
        )

    def _handle(self, number: int, fault: PlannedFault) -> None:
        if fault.saved:
            self._wait_for_checkpoint()
        if fault.victim == "self" and isinstance(fault.action, str):
            at = time.time()
            self._answer(number, fault.action)
            proof = (
                self._shift_of_clock(number) if fault.action == "clock" else "the task was asked"
            )
            self._record(fault, at, proof)
            return
        if not fault.hold:
            self._answer(number, "")
        time.sleep(fault.delay_s)
        # The wait for the backup of a primary does not count as recovery.
        wait = fault.victim == "primary"
        victims = self._victims(number, fault) if wait else None
        at = time.time()
        self._record(fault, at, self._inject(number, fault, victims))
        if fault.hold:
            self._answer(number, "")

    def _record(self, fault: PlannedFault, at: float, proof: str) -> None:
        if proof:
            self.fired.append(Fired(fault, at, proof))
        else:
            self.problems.append(f"{fault}: no effect")

    def _shift_of_clock(self, number: int) -> str:
        """Wait until the task has acted; return by how much its clock is ahead, if it is."""
        path, deadline = self.scene.folder / f"acted-{number}", time.monotonic() + EXIT_TIMEOUT_S
        while not path.exists():
            if time.monotonic() > deadline:
                return ""
            time.sleep(POLL_S)
        seconds = float(path.read_text())
        return f"the clock is {seconds:.0f} s ahead" if seconds > 1 else ""

    def _answer(self, number: int, text: str) -> None:
        part = self.scene.folder / f".done-{number}"
        part.write_text(text)
        part.rename(self.scene.folder / f"done-{number}")

    def _inject(self, number: int, fault: PlannedFault, found: list[psutil.Process] | None) -> str:
        if fault.victim == "disk":
            disk = self.scene.disk
            assert disk is not None
            proof = disk.act(fault.action)
            self._schedule_undo(fault, disk.restore)
            return proof
        if fault.victim == "node":
            assert self.scene.nodes is not None
            proof = self.scene.nodes.inject_node_fault(fault.action)
            self._schedule_undo(fault, self.scene.nodes.restore)
            return proof
        victims = self._victims(number, fault) if found is None else found
        if fault.action == STARVE:
            return _all_of([starve(process) for process in victims])
        assert isinstance(fault.action, int)
        for process in victims:
            process.send_signal(fault.action)
        if fault.action == signal.SIGSTOP:
            self._schedule_undo(fault, lambda: _resume(victims))
        return _all_of([effect_of(process, fault.action) for process in victims])

    def _schedule_undo(self, fault: PlannedFault, undo: Callable[[], None]) -> None:
        if fault.undo_s:
            self._undo.append((time.monotonic() + fault.undo_s, undo))

    def _undo_due(self) -> None:
        now = time.monotonic()
        due = [undo for time_s, undo in self._undo if time_s <= now]
        self._undo = [(time_s, undo) for time_s, undo in self._undo if time_s > now]
        for undo in due:
            undo()

    def _victims(self, number: int, fault: PlannedFault) -> list[psutil.Process]:
        role = fault.victim
        if role == "self":
            role = (self.scene.folder / f"ask-{number}").read_text()
        if role == "driver":
            return [psutil.Process(self.scene.driver)]
        if role == "workers":
            names = sorted(path.name for path in self.scene.folder.glob("worker-*"))
            return [self._worker(name) for name in names]
        if role.startswith("worker-"):
            return [self._worker(role)]
        if role == "primary":
            return [psutil.Process(self._primary())]
        if role == "head":
            return [head_process()]
        found = list(actors(TITLES[role.removesuffix("s") if role == "servers" else role]))
        if not found:
            raise LookupError(f"no process of {role}")
        return found if role == "servers" else found[:1]

    def _worker(self, name: str) -> psutil.Process:
        pid, _, space = (self.scene.folder / name).read_text().partition(" ")
        if space == os.readlink("/proc/self/ns/pid"):
            return psutil.Process(int(pid))
        for process in actors("Worker"):
            if (inner_pid(process.pid), space) == (int(pid), pid_space(process.pid)):
                return process
        raise LookupError(f"no process of {name}")

    def _wait_for_checkpoint(self) -> None:
        deadline = time.monotonic() + 20
        while not any(self.scene.storage.glob(COMPLETE_CHECKPOINTS)):
            if time.monotonic() > deadline or self._stopped.is_set():
                raise LookupError("no checkpoint was written")
            time.sleep(0.01)

    def _primary(self) -> int:
        """Wait until every shard has a ready backup; return the process of shard 0's primary."""
        named = ray.util.list_named_actors(all_namespaces=True)
        manager = next(actor for actor in named if "/server-manager" in actor["name"])
        handle = ray.get_actor(manager["name"], namespace=manager["namespace"])
        deadline = time.monotonic() + 30
        while not all(
            assignment.ready for assignment in ray.get(handle.assignments.remote(), timeout=30)
        ):
            if time.monotonic() > deadline or self._stopped.is_set():
                raise LookupError("backups were not ready")
            time.sleep(0.02)
        return int(ray.get(handle.follow.remote(0, 0, 0, 1.0), timeout=30).parameters[0].pid)


def actors(title: str) -> Iterator[psutil.Process]:
    """Yield the descendants of this process that are actors of a class."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if re.match(rf"ray::{title}\b", " ".join(process.cmdline())):
                yield process


def head_process() -> psutil.Process:
    """
    Return the process of the cluster's head, a descendant of this process.

    Raises:
        LookupError: there is no such process.
    """
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() == "gcs_server":
                return process
    raise LookupError("no process of the cluster's head")


def inner_pid(pid: int) -> int:
    """Return the pid of a process in its own namespace."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)
    return int(found[1]) if found else pid


def pid_space(pid: int) -> str:
    """Return the name of the pid namespace of a process."""
    return os.readlink(f"/proc/{pid}/ns/pid")


def _all_of(effects: list[str]) -> str:
    """Join the effects on several processes; empty if one of them is missing."""
    return ", ".join(effects) if all(effects) else ""


def effect_of(process: psutil.Process, number: int) -> str:
    """Wait for the effect of a signal; return a description, or an empty string."""
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        return f"process {process.pid} was sent {signal.Signals(number).name}"
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            status = process.status()
        except psutil.NoSuchProcess:
            status = psutil.STATUS_DEAD
        if number == signal.SIGSTOP and status == psutil.STATUS_STOPPED:
            return f"process {process.pid} is stopped"
        if number == signal.SIGKILL and status in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE):
            return f"process {process.pid} is gone"
        time.sleep(0.001)
    return ""


def starve(process: psutil.Process) -> str:
    """
    Trigger the kernel's OOM killer by a cgroup without memory; return the effect.

    Raises:
        OSError: cgroups are not available, or not permitted.
    """
    group = CGROUPS / f"chaos-{process.pid}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text("0")
        (group / "cgroup.procs").write_text(str(process.pid))
        if not effect_of(process, signal.SIGKILL):
            return ""
        killed = re.search(r"^oom_kill ([1-9])", (group / "memory.oom_control").read_text(), re.M)
        return f"the kernel killed process {process.pid} for memory" if killed else ""
    finally:
        deadline = time.monotonic() + EXIT_TIMEOUT_S
        while group.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # its last process has not ended yet
                group.rmdir()
            time.sleep(0.01)


def _resume(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGCONT)
