"""Random jobs and faults of the soak in memory, and the injection of these faults."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from call_faults import Call, Fault
from ray_in_memory import InMemoryRay

from distplat.actors.transport import TransportError
from distplat.platform.disk import Disk
from distplat.platform.errors import DistplatError, SpecError
from distplat.strategies.catalog import make_job

STEPS, EVERY = 16, 3
HEARTBEAT_S, STEP_S, COLLECTIVE_S = 5.0, 10.0, 5.0
"""Deadlines; the first applicable one detects a frozen process."""
BURST, SHARE = 60, 0.25
"""Number of calls with faults in a burst, and the share of each type of fault."""
SYNCHRONOUS = ("ring", "ps-sync", "hybrid")
ALL = ("ring", "ps-sync", "ps-async", "hybrid")
FAULT_LABELS = {
    "kill": "a process is killed",
    "kill-many": "several processes are killed at once",
    "freeze": "a process is frozen, for less or more than its deadline",
    "burst": "a quarter of requests and a quarter of replies are lost; some are late or repeated",
    "disk": "a disk operation fails, or writes half of a file",
    "damage": "the newest checkpoint is damaged, and all workers are killed",
    "scale": "the number of workers is changed",
    "driver": "the driver or the controller is killed; resume",
}


@dataclass(frozen=True)
class PlannedFault:
    """One fault."""

    kind: str
    """See `FAULT_LABELS`."""
    moment: str
    """Moment of the task, `call METHOD`, `disk OPERATION`, or `soon`: after the previous fault."""
    process: str
    """Role that reaches the moment, without its attempt, or the called actor; empty: any."""
    count: int
    """Number of the occurrence of the moment, from 1."""
    victim: str = ""
    """`self`, a role, or the plural of a role: all of its processes."""
    seconds: float = 0.0
    """Seconds from the moment to the fault."""
    frozen_s: float = 0.0
    """Seconds for which a process is frozen."""
    workers: int = 0
    """Requested number of workers."""

    def __str__(self) -> str:
        # Do not change this text: it is part of the seed of a burst.
        action = " ".join(filter(None, (self.kind, self.victim, str(self.workers or ""))))
        duration = f" for {self.frozen_s:g} s" if self.frozen_s else ""
        time = f"{self.seconds:.2f} s after {self.moment} of {self.process or 'anybody'}"
        return f"{action}{duration}, {time}, the {self.count}. time"


Moments = Counter[tuple[str, str]]
"""Number of occurrences of a moment, by its name and process; empty: all processes."""


@dataclass(frozen=True)
class Setting:
    """A job, and its number of nodes."""

    fields: dict[str, Any]
    nodes: int
    task: str

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return str(self.fields["strategy"]["name"])

    @property
    def workers(self) -> int:
        """Initial number of workers."""
        return int(self.fields["scaling"]["num_workers"])

    @property
    def own_loop(self) -> bool:
        """Whether the job has a train function."""
        return self.task == "loop"

    @property
    def samples(self) -> int:
        """Samples of a step over all ranks."""
        if self.own_loop:
            args = self.fields["task_args"]
            return int(args["batch"] * args["accumulate"] * self.workers)
        return int(self.fields["global_batch_size"])

    @property
    def is_reproducible(self) -> bool:
        """Whether two runs without a failure are bit-identical."""
        strategy, tables = self.fields["strategy"], self.fields.get("embeddings", {})
        if self.own_loop:
            return strategy["name"] != "ps-async" or self.workers == 1
        free = strategy["name"] == "ps-async" or strategy.get("backup_workers", 0)
        return not (free or tables.get("asynchronous", False))

    @property
    def has_error_feedback(self) -> bool:
        """Whether a worker has error feedback, which is lost with it."""
        return self.fields["strategy"].get("compression") in ("topk", "powersgd")


def draw_setting(draw: Random) -> Setting:
    """Draw a valid job."""
    while True:
        setting = _some_setting(draw)
        try:
            make_job({**setting.fields, "task": "m:T"})
        except SpecError:
            continue
        return setting


def _some_setting(draw: Random) -> Setting:
    strategy, workers = _some_strategy(draw)
    name = strategy["name"]
    with_tables = name != "hybrid" and draw.random() < 0.35
    scales = name in ("ps-sync", "ps-async")
    fields: dict[str, Any] = {
        "name": "soak",
        "strategy": strategy,
        "scaling": {"num_workers": workers},
        "optimizer": draw.choice(OPTIMIZERS),
        "steps": STEPS,
        "global_batch_size": 12,
        "evaluation": draw.choice(({"every_steps": 5}, {"every_epochs": 0})),
        "checkpoint": {"every_steps": EVERY, "num_to_keep": draw.choice((2, 3))},
        "failure": {
            "max_failures": 50,
            "heartbeat_timeout_s": HEARTBEAT_S,
            "step_timeout_s": STEP_S,
            "start_timeout_s": 15.0,
            "spare_workers": draw.random() < 0.2,
        },
        "task_args": {"stateful": not scales},
        "precision": draw.choice(("fp32", "fp32", "fp32", "bf16")),
    }
    if with_tables:
        asynchronous = name == "ps-async" or draw.random() < 0.3
        fields["embeddings"] = {
            "servers": draw.choice((1, 2)),
            "replication": draw.choice((1, 2)),
            "asynchronous": asynchronous,
            "optimizer": draw.choice(TABLE_OPTIMIZERS),
        }
    elif name != "ps-async" and draw.random() < 0.4:
        fields["clip_norm"] = 1.0
    if name != "hybrid" and draw.random() < 0.4:
        fields["gradient_accumulation"] = 2
    if draw.random() < 0.25:
        fields["ema"] = {"decay": 0.9}
    nodes = draw.choice((1, 1, 2, 3))
    _vary(fields, draw)
    return Setting(fields, nodes, "Rows" if with_tables else "Dense")


TENSOR_PLAN = {"0": "colwise_gather", "2.0": "colwise", "2.2": "rowwise", "4": "rowwise"}
COMPRESSIONS: tuple[dict[str, Any], ...] = (
    {"compression": "fp16"},
    {"compression": "bf16"},
    {"compression": "topk", "topk_density": 0.1},
    {"compression": "powersgd", "powersgd_rank": 1},
)
OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"name": "SGD", "lr": 0.1, "momentum": 0.9},
    {"name": "AdamW", "lr": 0.01},
    {"name": "Adagrad", "lr": 0.05},
)
TABLE_OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"name": "SGD", "lr": 0.1},
    {"name": "Adagrad", "lr": 0.1},
    {"name": "SparseAdam", "lr": 0.01},
)


def _some_strategy(draw: Random) -> tuple[dict[str, Any], int]:
    name = draw.choice(ALL)
    if name == "ring":
        options: dict[str, Any] = {"timeout_s": COLLECTIVE_S}
        options |= draw.choice(
            ({}, {}, {"overlap": False}, {"bucket_mb": 0.0005}, {"shard_optimizer": True})
        )
        return {"name": name, **options}, draw.choice((2, 2, 3))
    if name == "hybrid":
        options = {"pipeline": 2, "data": draw.choice((1, 2)), "micro_batches": 2, "cut": ["2"]}
        options |= draw.choice(
            ({}, {"data_strategy": "ps-sync", "num_servers": 1, "replication": draw.choice((1, 2))})
        )
        return {"name": name, "timeout_s": COLLECTIVE_S, **options}, 2 * options["data"]
    options = {"num_servers": draw.choice((1, 2, 3)), "replication": draw.choice((1, 2))}
    if name == "ps-async":
        options |= draw.choice(
            ({}, {"staleness": 2}, {"staleness": 0}, {"staleness_lr": True, "staleness": 3})
        )
    return {"name": name, **options}, draw.choice((2, 2, 3))


def _vary(fields: dict[str, Any], draw: Random) -> None:
    """Add tensor parallelism, backup workers or compression to some jobs."""
    strategy, name = fields["strategy"], fields["strategy"]["name"]
    if name == "hybrid" and draw.random() < 0.4:
        pipeline, data = draw.choice(((1, 1), (2, 1), (1, 2)))
        strategy |= {"pipeline": pipeline, "data": data, "tensor": 2, "tensor_plan": TENSOR_PLAN}
        if pipeline == 1:
            del strategy["cut"]
        fields["scaling"]["num_workers"] = 2 * pipeline * data
    elif name == "ps-sync" and draw.random() < 0.25:
        strategy |= {"num_servers": 1, "replication": 1, "backup_workers": 1}
    elif name == "ring" and draw.random() < 0.35:
        strategy |= draw.choice(COMPRESSIONS)


def draw_faults(setting: Setting, draw: Random, seen: Moments) -> tuple[PlannedFault, ...]:
    """
    Draw three to six faults.

    Args:
        setting: job of the run.
        draw: generator of the trial.
        seen: occurrences of moments in a run without a fault.
    """
    count = draw.randint(3, 6)
    return tuple(_random_fault(setting, draw, seen, at > 0) for at in range(count))


def _random_fault(setting: Setting, draw: Random, seen: Moments, is_later: bool) -> PlannedFault:
    scales = setting.strategy in ("ps-sync", "ps-async") and not setting.own_loop
    kinds = ["kill"] * 6 + ["kill-many", "freeze", "burst", "burst", "disk", "damage", "driver"]
    kind = draw.choice(kinds + (["scale", "scale"] if scales else []))
    moment, process, count = _some_moment(setting, draw, seen)
    seconds = draw.choice((0.0, 0.0, draw.uniform(0, 0.05)))
    if is_later and draw.random() < 0.4:
        moment, process, count, seconds = "soon", "", 1, draw.uniform(0, 0.5)
    beyond_s = HEARTBEAT_S + 1
    frozen_s = draw.choice((0.5, beyond_s, beyond_s, 60.0)) if kind == "freeze" else 0.0
    if kind == "disk":
        seconds, moment, process = 0.0, f"disk {draw.choice(('write', 'rename', 'make'))}", ""
        count = draw.randint(1, 12)
    victim = {
        "kill": draw.choice(_victims(setting)),
        "kill-many": draw.choice(("workers", "servers", "self+server", "self+worker", "node")),
        "freeze": draw.choice(_victims(setting)),
        "driver": draw.choice(("driver", "controller")),
    }.get(kind, "")
    workers = draw.randint(1, 4) if kind == "scale" else 0
    return PlannedFault(kind, moment, process, count, victim, seconds, frozen_s, workers)


def _victims(setting: Setting) -> list[str]:
    found = ["self"] * 4 + ["worker"]
    if "num_servers" in setting.fields["strategy"]:
        found += ["server", "server-manager", "task-scheduler"]
    if "embeddings" in setting.fields:
        found += ["embedding-server", "server-manager"]
    return found


def _some_moment(setting: Setting, draw: Random, seen: Moments) -> tuple[str, str, int]:
    calls = sorted(key for key in seen if key[0].startswith("call ") and key[1])
    if calls and draw.random() < 0.5:
        moment, process = draw.choice(calls)
        return (
            moment,
            process,
            min(draw.choice((1, 2, 3, 5, 8, 13)), max(1, seen[moment, process] // 2)),
        )
    rank = f"worker-{draw.randrange(setting.workers)}"
    once = "report" if setting.own_loop else "evaluation"
    moment = draw.choice(("model", "data", once, *["forward"] * 4, *["backward"] * 4))
    if moment in ("model", "data"):
        return moment, rank, draw.choice((1, 2))  # the second is that of a replacement
    return moment, rank, draw.randint(1, max(1, seen[moment, rank]))


@dataclass
class Injector:
    """
    Injects the faults of a trial, and records their effects.

    Args:
        ray: cluster of the run.
        storage: folder of the run directories.
        faults: the faults; each is injected once, at its moment.
    """

    ray: InMemoryRay
    storage: Path
    faults: tuple[PlannedFault, ...]
    seed: int = 0
    fired: list[tuple[PlannedFault, str]] = field(default_factory=list)
    """Injected faults and their effects."""
    disk_copy: Path | None = None
    """Copy of the disk at the kill of driver or controller."""
    seen: Moments = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    """Faults whose injection has failed."""

    def __post_init__(self) -> None:
        self.kill_lock = threading.Lock()  #: held while driver or controller is killed
        self._left = list(self.faults)
        self._changing = threading.Lock()
        self._bursts: list[list[Any]] = []
        self._copies = 0

    def reach(self, moment: str, name: str) -> None:
        """Inject the faults of a moment that a process has reached."""
        for fault in self._due(moment, role_of(name)):
            if fault.seconds:
                _start_timer(fault.seconds, self._inject_later, fault, name)
            else:
                self._inject(fault, name)

    def _due(self, moment: str, role: str) -> list[PlannedFault]:
        with self._changing:
            for process in (role, ""):
                self.seen[moment, process] += 1
            due = [
                fault
                for fault in self._left
                if fault.moment == moment
                and fault.process in (role, "")
                and self.seen[moment, fault.process] >= fault.count
            ]
            self._left = [fault for fault in self._left if fault not in due]
        return due

    def rule(self, call: Call) -> Fault | None:
        """Return the fault of a call; see `Rule`."""
        self.reach(f"call {call.method}", call.actor)
        with self._changing:
            for burst in self._bursts:
                left, random, fault = burst
                if left <= 0:
                    continue
                burst[0] -= 1
                call_fault = _random_call_fault(random)
                if call_fault != Fault() and fault not in [fired for fired, _ in self.fired]:
                    self.fired.append((fault, f"{call_fault}"))
                return call_fault
        return None

    def _inject(self, fault: PlannedFault, name: str) -> None:
        after = self.faults.index(fault) + 1
        if after < len(self.faults) and self.faults[after].moment == "soon":
            _start_timer(
                self.faults[after].seconds, self._inject_later, self.faults[after], "worker"
            )
        proof = getattr(self, "_" + fault.kind.replace("-", "_"))(fault, name)
        if proof:
            self.fired.append((fault, proof))

    def _inject_later(self, fault: PlannedFault, name: str) -> None:
        """Inject a fault in a timer's thread, which nobody joins."""
        try:
            self._inject(fault, name)
        except Exception as error:
            self.errors.append(f"{fault}: {type(error).__name__}: {error}")

    def _kill(self, fault: PlannedFault, name: str) -> str:
        return self._end(self._find_victims(fault.victim, name)[:1])

    def _kill_many(self, fault: PlannedFault, name: str) -> str:
        parts = [self._find_victims(part, name) for part in fault.victim.split("+")]
        count = 1 if len(parts) > 1 else None
        return self._end([victim for victims in parts for victim in victims[:count]])

    def _end(self, names: list[str]) -> str:
        return ", ".join(name for name in names if self.ray.kill_process(name))

    def _find_victims(self, victim: str, name: str) -> list[str]:
        """Return the names of the victims."""
        if victim == "self":
            found = self.ray.alive(name)
            return found if name not in ("driver", "controller") else []
        if victim == "node":
            last, here = self.ray.node_names[-1], self.ray.node_names[0]
            processes = [self.ray.processes[alive] for alive in self.ray.alive("")]
            found = [process.name for process in processes if process.node == last != here]
            return [role for role in found if role not in ("driver", "controller")]
        if victim.endswith("s"):
            return [alive for alive in self.ray.alive("") if victim[:-1] in alive]
        found = self.ray.alive(f"{victim}-" if victim == "server" else victim)
        found = [role for role in found if victim != "server" or "manager" not in role]
        first = self.seed % len(found) if found else 0
        return found[first:] + found[:first]

    def _freeze(self, fault: PlannedFault, name: str) -> str:
        for victim in self._find_victims(fault.victim, name)[:1]:
            process = self.ray.processes[victim]
            process.freeze()
            _start_timer(fault.frozen_s, process.resume)
            return f"{victim} is frozen"
        return ""

    def _burst(self, fault: PlannedFault, name: str) -> str:
        with self._changing:
            self._bursts.append([BURST, Random(f"{self.seed} {fault}"), fault])
        return ""  # fired by the first fault of a call

    def _disk(self, fault: PlannedFault, name: str) -> str:
        self.fired.append((fault, f"the disk refused to {fault.moment.removeprefix('disk ')}"))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _damage(self, fault: PlannedFault, name: str) -> str:
        found = sorted(self.storage.glob("*/checkpoints/step-" + "[0-9]" * 6))
        workers = self._find_victims("workers", name)
        if len(found) < 2 or not workers:
            return ""
        path = found[-1] / "model.safetensors"
        try:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        except OSError:
            return ""
        self._end(workers)
        return f"{found[-1].name} is damaged"

    def _scale(self, fault: PlannedFault, name: str) -> str:
        with suppress(TransportError, DistplatError, KeyError):  # refused, or no controller
            return f"{self.ray.call_actor('controller', 'scale', fault.workers)}"
        return ""

    def _driver(self, fault: PlannedFault, name: str) -> str:
        with self.kill_lock:
            if self.ray.kill_process(fault.victim):
                self._copies += 1
                self.disk_copy = snapshot(
                    self.storage, self.storage.with_name(f"kept-{self._copies}")
                )
                self.fired.append((fault, f"{fault.victim} was killed"))
        return ""

    def on_disk(self, operation: str) -> Callable[..., Any]:
        """Return a replacement of an operation of `Disk` that reports the moment first."""
        real = getattr(Disk, operation)

        def work(disk: Disk, path: Path, *more: Any) -> Any:
            try:
                self.reach(f"disk {operation}", "")
            except OSError:
                if operation == "write" and not path.exists():
                    path.write_bytes(b"half")
                raise
            return real(disk, path, *more)

        return work


def _start_timer(seconds: float, work: Callable[..., object], *args: Any) -> None:
    timer = threading.Timer(seconds, work, args)
    timer.daemon = True
    timer.start()


def role_of(name: str) -> str:
    """Return an actor's name without its attempt."""
    return name.partition("/")[0]


def _random_call_fault(draw: Random) -> Fault:
    lose: Any = draw.choices(("", "request", "reply"), (1 - 2 * SHARE, SHARE, SHARE))[0]
    delay_s = draw.choice((0.0, 0.0, 0.02, 0.3))
    return Fault(delay_s, draw.choice((0.0, 0.0, 0.1)), lose, draw.random() < SHARE)


def snapshot(folder: Path, to: Path) -> Path:
    """Copy a folder; threads of killed processes may still write to it."""
    deadline = time.monotonic() + 5
    while True:
        shutil.rmtree(to, ignore_errors=True)
        try:
            shutil.copytree(folder, to)
        except (shutil.Error, OSError):
            if time.monotonic() > deadline:
                raise
        else:
            return to
