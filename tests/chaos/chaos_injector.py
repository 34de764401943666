"""
Does to a run what a trial asks for, at the moment it asks for, and proves that it was done.

A deed is done from outside: a signal to a process, by its number. It counts as fired if the process
was there, and is gone (SIGKILL) or stopped (SIGSTOP) afterwards.
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

GONE_WITHIN_S = 10.0
POLL_S = 0.002
WHOLE = "*/checkpoints/step-" + "[0-9]" * 6
"""A checkpoint that is whole, from the folder of the run directories."""
TITLES = {
    "server": "ServerNode",
    "server-manager": "ServerManager",
    "task-scheduler": "Scheduler",
    "controller": "ControllerActor",
}
"""Roles, and the classes of their actors as Ray writes them into the title of a process."""

STARVE = "starve"
"""Instead of a signal: memory is refused."""
CGROUPS = Path("/sys/fs/cgroup/memory")
"""Of version 1."""

ASKED = ("data", "model", "renewed", "forward", "between", "backward", "evaluation")
"""
Moments that a worker gets to; `between` a forward and its backward, where a step is the number of a
forward. The others are seen from outside: `partial`, a checkpoint is being written; `checkpoint`,
one is whole.
"""


@dataclass(frozen=True)
class Deed:
    """One fault."""

    moment: str
    """See `ASKED`."""
    rank: int = 0
    """Who gets there."""
    step: int = 0
    """At which step, or the first one after it that this rank makes."""
    victim: str = "self"
    """`self`, `worker-1`, `workers` (all of them), `server`, `servers`, `primary` (of a shard whose
    backup is ready), a role of `TITLES`, `driver`, `disk`, `node`, `head` (of the cluster)."""
    action: int | str = signal.SIGKILL
    """A signal, or `STARVE`; for `self` also what the task does itself, for `disk` an action of
    `Disk`, for the link of a `node` `cut` or `slow`."""
    hold: bool = True
    """Whether who gets there waits until it is done; else only for what it waits for itself."""
    delay_s: float = 0.0
    """From the moment to the deed."""
    saved: bool = False
    """Wait for a whole checkpoint first."""
    undo_s: float = 0.0
    """So long afterwards a frozen process goes on, a full disk is empty again; 0: never."""

    @property
    def request(self) -> list[object]:
        """What the task is told: moment, rank, step, and whether to hold still there."""
        return [self.moment, self.rank, self.step, self.hold or self.saved]

    def __str__(self) -> str:
        what = signal.Signals(self.action).name if isinstance(self.action, int) else self.action
        return f"{what} {self.victim} at {self.moment} of rank {self.rank}, step {self.step}"


@dataclass
class Fired:
    """A deed that was done."""

    deed: Deed
    at: float
    """`time.time()` when it was done."""
    proof: str
    """What was seen of it."""


class Nodes(Protocol):
    """The nodes of a cluster, to be hit as a whole."""

    def hit_node(self, action: int | str) -> str:
        """
        Hit a node that has a worker and is not the driver's; give a proof.

        Args:
            action: a signal for all of it, or what happens to its link.
        """

    def mend(self) -> None:
        """Let frozen nodes go on, and links be as they were."""


@dataclass
class Scene:
    """Where a run takes place."""

    folder: Path
    """For the files of task and injector."""
    storage: Path
    """Where the run directory is made."""
    disk: "Disk | None" = None
    nodes: "Nodes | None" = None
    driver: int = 0
    """Process of the present driver."""


@dataclass
class Disk:
    """A small disk of its own (tmpfs) for run directories."""

    path: Path
    run: Callable[[list[str]], None]
    """Runs a command as root."""
    ballast: list[Path] = field(default_factory=list)
    _covered: bool = False  #: by a mount that nobody may write to, or that does not answer
    _unserved: int = -1  #: descriptor of the latter

    def act(self, action: int | str) -> str:
        """Do something to it (`fill`, `read-only`, `remove`, `hang`); give a proof."""
        actions = {"fill": self.fill, "read-only": self.read_only}
        return (actions | {"remove": self.remove, "hang": self.hang})[str(action)]()

    def fill(self) -> str:
        """Leave no byte."""
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
        Let nobody open a file to write; those that are open for it go on.

        They would keep the disk itself from it, and so it is mounted once more, above itself.
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
        Let whoever comes to it wait, by a file system (FUSE) above it that nobody serves.

        Files that are open go on: they are below it.
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

    def mend(self) -> None:
        """Let everybody write again."""
        if self._covered:
            self._covered = False
            self.run(["umount", "-l", str(self.path)])
        if self._unserved >= 0:
            os.close(self._unserved)  # who still waits gets an error
            self._unserved = -1
        for path in self.ballast:
            path.unlink(missing_ok=True)
        self.ballast.clear()


class Injector(threading.Thread):
    """
    Carries the deeds of one trial out.

    Args:
        scene: of the run.
        deeds: each once, when its moment comes; the file `ask-<n>` is that of the n-th.
    """

    def __init__(self, scene: Scene, deeds: tuple[Deed, ...]) -> None:
        super().__init__(daemon=True)
        self.scene, self.deeds = scene, deeds
        self.fired: list[Fired] = []
        self.problems: list[str] = []
        self._over = threading.Event()
        self._undo: list[tuple[float, Callable[[], None]]] = []

    def run(self) -> None:
        """Look for moments until all deeds are done and undone, or the run is over."""
        left = dict(enumerate(self.deeds))
        while (left or self._undo) and not self._over.is_set():
            for number, deed in list(left.items()):
                if not self._reached(number, deed):
                    continue
                del left[number]
                try:
                    self._carry_out(number, deed)
                except (LookupError, OSError, psutil.Error, ray.exceptions.RayError) as error:
                    self.problems.append(f"{deed}: {type(error).__name__}: {error}")
            self._undo_what_is_due()
            self._over.wait(0.0005 if any(d.moment == "partial" for d in left.values()) else POLL_S)

    def end(self) -> None:
        """Stop, and undo what is still to be undone."""
        self._over.set()
        if self.ident is not None:  # else it was never started
            self.join(GONE_WITHIN_S + 60)
        for _, undo in self._undo:
            with contextlib.suppress(OSError):
                undo()

    def _reached(self, number: int, deed: Deed) -> bool:
        if deed.moment in ASKED:
            return (self.scene.folder / f"ask-{number}").exists()
        whole = any(self.scene.storage.glob(WHOLE))
        if deed.moment == "checkpoint":
            return whole
        return whole >= deed.saved and any(self.scene.storage.glob("*/checkpoints/*.partial"))

    def _carry_out(self, number: int, deed: Deed) -> None:
        if deed.saved:
            self._wait_for_checkpoint()
        if deed.victim == "self" and isinstance(deed.action, str):
            self.fired.append(Fired(deed, time.time(), "the task was told"))
            self._answer(number, deed.action)
            return
        if not deed.hold:
            self._answer(number, "")
        time.sleep(deed.delay_s)
        # The primary of a shard is waited for until its backup is ready; that is no recovery.
        wait = deed.victim == "primary"
        victims = self._victims(number, deed) if wait else None
        at = time.time()
        proof = self._do(number, deed, victims)
        if proof:
            self.fired.append(Fired(deed, at, proof))
        else:
            self.problems.append(f"{deed}: it was done, and had no effect")
        if deed.hold:
            self._answer(number, "")

    def _answer(self, number: int, text: str) -> None:
        part = self.scene.folder / f".done-{number}"
        part.write_text(text)
        part.rename(self.scene.folder / f"done-{number}")

    def _do(self, number: int, deed: Deed, found: list[psutil.Process] | None) -> str:
        if deed.victim == "disk":
            disk = self.scene.disk
            assert disk is not None
            proof = disk.act(deed.action)
            self._later(deed, disk.mend)
            return proof
        if deed.victim == "node":
            assert self.scene.nodes is not None
            proof = self.scene.nodes.hit_node(deed.action)
            self._later(deed, self.scene.nodes.mend)
            return proof
        victims = self._victims(number, deed) if found is None else found
        if deed.action == STARVE:
            return ", ".join(starve(process) for process in victims)
        assert isinstance(deed.action, int)
        for process in victims:
            process.send_signal(deed.action)
        if deed.action == signal.SIGSTOP:
            self._later(deed, lambda: _wake(victims))
        return ", ".join(_proof(process, deed.action) for process in victims)

    def _later(self, deed: Deed, undo: Callable[[], None]) -> None:
        if deed.undo_s:
            self._undo.append((time.monotonic() + deed.undo_s, undo))

    def _undo_what_is_due(self) -> None:
        now = time.monotonic()
        due = [undo for at, undo in self._undo if at <= now]
        self._undo = [(at, undo) for at, undo in self._undo if at > now]
        for undo in due:
            undo()

    def _victims(self, number: int, deed: Deed) -> list[psutil.Process]:
        role = deed.victim
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
        until = time.monotonic() + 20
        while not any(self.scene.storage.glob(WHOLE)):
            if time.monotonic() > until or self._over.is_set():
                raise LookupError("no checkpoint came")
            time.sleep(0.01)

    def _primary(self) -> int:
        """Find who serves shard 0, once every shard has a backup that is ready."""
        named = ray.util.list_named_actors(all_namespaces=True)
        manager = next(one for one in named if "/server-manager" in one["name"])
        handle = ray.get_actor(manager["name"], namespace=manager["namespace"])
        until = time.monotonic() + 30
        while not all(
            assignment.ready for assignment in ray.get(handle.assignments.remote(), timeout=30)
        ):
            if time.monotonic() > until or self._over.is_set():
                raise LookupError("backups were not ready")
            time.sleep(0.02)
        return int(ray.get(handle.follow.remote(0, 0, 0, 1.0), timeout=30).parameters[0].pid)


def actors(title: str) -> Iterator[psutil.Process]:
    """Give the processes of a class of actors that come from this process."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if re.match(rf"ray::{title}\b", " ".join(process.cmdline())):
                yield process


def head_process() -> psutil.Process:
    """
    Give the process of the cluster's head that this process, or a child of it, has started.

    Raises:
        LookupError: there is none.
    """
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() == "gcs_server":
                return process
    raise LookupError("no process of the cluster's head")


def inner_pid(pid: int) -> int:
    """Give the number of a process as it is in its own namespace."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)
    return int(found[1]) if found else pid


def pid_space(pid: int) -> str:
    """Name the namespace of a process's number."""
    return os.readlink(f"/proc/{pid}/ns/pid")


def _proof(process: psutil.Process, number: int) -> str:
    """Say what became of a process; empty: nothing."""
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        return f"process {process.pid} was sent {signal.Signals(number).name}"
    until = time.monotonic() + GONE_WITHIN_S
    while time.monotonic() < until:
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
    Have the kernel kill a process for memory, by a group (cgroup) that is given none; give a proof.

    Raises:
        OSError: there are no such groups here, or they are not ours to make.
    """
    group = CGROUPS / f"chaos-{process.pid}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text("0")
        (group / "cgroup.procs").write_text(str(process.pid))
        if not _proof(process, signal.SIGKILL):
            return ""
        killed = re.search(r"^oom_kill ([1-9])", (group / "memory.oom_control").read_text(), re.M)
        return f"the kernel killed process {process.pid} for memory" if killed else ""
    finally:
        until = time.monotonic() + GONE_WITHIN_S
        while group.exists() and time.monotonic() < until:
            with contextlib.suppress(OSError):  # its last process is not all gone yet
                group.rmdir()
            time.sleep(0.01)


def _wake(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGCONT)
