"""One trial: a job with a fault, run by `distplat submit`, and the checks of its result."""

import contextlib
import hashlib
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
from chaos_cluster import AnyCluster
from chaos_injector import Disk, Fired, Injector, PlannedFault, Scene, actors
from chaos_rows import (
    BATCH,
    EVERY,
    HEARTBEAT_S,
    ROWS,
    STEP_S,
    STEPS,
    STORAGE_S,
    STRATEGIES,
    WORLD,
    Plan,
)
from safetensors.numpy import load_file

from distplat.cli.main import run as command
from distplat.platform.apply_log import FILE_NAME, log_flaws, read_logs

HERE = Path(__file__).parent
LIMIT_S = 120.0
"""Deadline of a run."""
CLEANUP_TIMEOUT_S = 20.0
DISK_MB = 256
_DETECTION = re.compile(r"frozen|has not answered|missing[: ]|was lost")
"""In log messages about a process that does not answer."""
DETECTION_DELAY_S = 3.0
"""Maximum delay of the detection of a frozen process after its deadline: one guaranteed second, and
two seconds for the log and other load."""
LOSSES = ("quit", "segfault", "loop")
"""Actions of the task that lose a worker."""
CRASH_CODES = (70, -6, -11)
"""Exit codes of an internal error, an abort and a crash of the driver."""


@dataclass
class Outcome:
    """Result of a trial."""

    row: str
    strategy: str
    seed: int
    faults: tuple[PlannedFault, ...]
    fired: list[Fired]
    not_fired: list[str]
    problems: list[str]
    """Failed checks of the run."""
    recovery_s: float | None
    """Seconds from the last fault to the end of the longest later pause of any worker."""
    seconds: float
    folder: Path
    found_s: float | None = None
    """Seconds from a SIGSTOP until a driver's log reports it; None: no report."""

    @property
    def verdict(self) -> str:
        """`wrong`, `not fired` or `ok`."""
        if self.problems:
            return "wrong"
        return "not fired" if self.not_fired else "ok"


@dataclass
class Runs:
    """
    Runs trials on one cluster, and caches the results of runs without a fault.

    Args:
        cluster: of the runs; None: for rows without a cluster.
        folder: for the files of runs.
    """

    cluster: AnyCluster | None
    folder: Path
    _unfailed: dict[str, str] = field(default_factory=dict)

    def trial(self, name: str, strategy: str, seed: int) -> Outcome:
        """Run the trial of a row, a strategy and a seed."""
        if not ROWS[name].nodes:
            return self.in_memory(name, strategy, seed)
        plan = ROWS[name].plan(strategy, Random(f"{name} {strategy} {seed}"))
        return self.make(name, strategy, seed, plan)

    def in_memory(self, name: str, strategy: str, seed: int) -> Outcome:
        """Run a trial of a row without a cluster."""
        import chaos_inputs
        import chaos_messages

        folder = self.folder / f"{name}-{strategy}-{seed}"
        _create_empty(folder)
        start, not_fired = time.monotonic(), list[str]()
        if name == "F25":
            problems, faults = chaos_messages.trial(strategy, seed)
            not_fired = [
                f"no fault: {fault}" for fault in ("request", "reply", "twice") if not faults[fault]
            ]
        else:
            problems = {"B1": chaos_inputs.jobs, "B2": chaos_inputs.checkpoints}[name](seed, folder)
        duration = time.monotonic() - start
        return Outcome(name, strategy, seed, (), [], not_fired, problems, None, duration, folder)

    def make(self, name: str, strategy: str, seed: int, plan: Plan) -> Outcome:
        """Run a trial of a plan."""
        expected = None if strategy == "ps-async" else self.unfailed_model(strategy, plan)
        folder = self.folder / f"{name}-{strategy}-{seed}"
        assert self.cluster is not None
        run = OneRun(self.cluster, folder, strategy, plan)
        start = time.monotonic()
        try:
            problems = run.make(expected)
        finally:
            run.end()
        left = Counter(plan.faults) - Counter(fired.fault for fired in run.fired)
        not_fired = [str(fault) for fault in left.elements()]
        not_fired += [text for text in run.injector_problems if text not in not_fired]
        duration = time.monotonic() - start
        return Outcome(
            name,
            strategy,
            seed,
            plan.faults,
            run.fired,
            not_fired,
            problems,
            run.recovery(),
            duration,
            folder,
            run.found_s,
        )

    def unfailed_model(self, strategy: str, plan: Plan) -> str:
        """Return the hash of the model of the job without a fault, which is cached."""
        unfailed = Plan((), plan.options, plan.width)
        key = json.dumps([strategy, dict(plan.options), plan.width], sort_keys=True)
        if key not in self._unfailed:
            name = f"unfailed-{len(self._unfailed)}-{strategy}"
            assert self.cluster is not None
            run = OneRun(self.cluster, self.folder / name, strategy, unfailed)
            try:
                if problems := run.make(None):
                    raise RuntimeError(f"the run without a fault has failed: {problems}")
            finally:
                run.end()
            self._unfailed[key] = run.model_hash()
        return self._unfailed[key]


class OneRun:
    """A run, and the run that resumes it."""

    def __init__(self, cluster: AnyCluster, folder: Path, strategy: str, plan: Plan) -> None:
        self._cluster, self._folder, self._strategy, self._plan = cluster, folder, strategy, plan
        _create_empty(folder)
        (folder / "talk").mkdir()
        self._storage = folder / "runs"
        self._storage.mkdir()
        disk = self._mount() if plan.small_disk else None
        scene = Scene(folder / "talk", self._storage, disk, cluster)
        self._scene, self._disk = scene, disk
        self._injector = Injector(scene, plan.faults)
        self._drivers = 0
        self._ended_at = 0.0
        self.found_s: float | None = None  #: see `Outcome`
        self._found_text = ""  #: log message of the detection

    @property
    def fired(self) -> list[Fired]:
        """Injected faults."""
        return self._injector.fired

    @property
    def injector_problems(self) -> list[str]:
        """Faults that could not be injected."""
        return self._injector.problems

    def make(self, expected: str | None) -> list[str]:
        """
        Run to the end, and resume if planned; return the problems.

        Args:
            expected: hash of the model; None: not compared.
        """
        self._cluster.before_run()
        self._injector.start()
        codes, problems = self._plan.codes, []
        code = self._submit(())
        if code not in codes:
            problems.append(f"exit code {code}, not one of {codes}: {self._log_tail()}")
        elif self._plan.resumes:
            problems += self._unsaved() + self._damage()
            self._cluster.before_run()  # restarts a killed head
            code = self._submit(("--resume", str(self._directories()[0])))
            if code != 0:
                problems.append(f"resumed: exit code {code}: {self._log_tail()}")
        self._ended_at = time.time()
        problems += found_late(self._plan.faults, self.found_s, self._found_text)
        problems += self._leftovers()
        if code == 0 and not problems:
            problems += self._compare(expected)
        return problems

    def end(self) -> None:
        """Undo the remaining faults."""
        self._injector.end()
        if self._disk is not None:
            self._disk.restore()
            _root(["umount", "-l", str(self._storage)])

    def recovery(self) -> float | None:
        """Return the seconds from the last fault to the end of the longest later pause."""
        if not self.fired:
            return None
        at = max(fired.at for fired in self.fired)
        logs = [path.read_text() for path in self._scene.folder.glob("steps-*")]
        later = [[t for t in map(float, log.split()) if t > at] for log in logs]
        return max((_longest_pause(at, times or [self._ended_at]) for times in later), default=None)

    def model_hash(self) -> str:
        """Return the hash of the trained model."""
        return hash_of(self._directories()[-1] / "model.safetensors")

    def _mount(self) -> Disk:
        _root(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self._storage)])
        return Disk(self._storage, _root)

    def _directories(self) -> list[Path]:
        """Return the run directories, oldest first."""
        found = [path.parent for path in self._storage.glob("*/job.yaml")]
        return sorted(found, key=lambda path: path.stat().st_mtime)

    def _job(self) -> dict[str, Any]:
        plan, name = self._plan, self._strategy
        moments = [fault.request for fault in plan.faults]
        task = {"folder": str(self._scene.folder), "moments": moments, "width": plan.width}
        per_step = STRATEGIES[name].get("micro_batches", 1)
        clip = {} if name == "ps-async" else {"clip_norm": 1.0}
        return {
            "name": "chaos",
            "task": "chaos_task:Watched",
            "task_args": {
                **task,
                "per_step": per_step,
                "pause": plan.pause_s / per_step,
                "stateful": name != "ps-async",
            },
            "strategy": {**STRATEGIES[name], **plan.options},
            "scaling": {
                "num_workers": WORLD[name],
                "resources_per_worker": self._cluster.worker_resources(WORLD[name]),
            },
            "optimizer": {"name": "AdamW", "lr": 0.01},
            "steps": STEPS,
            "global_batch_size": BATCH,
            "evaluation": {"every_steps": 2 * EVERY},
            "checkpoint": {"every_steps": EVERY},
            "failure": {
                "max_failures": plan.max_failures,
                "heartbeat_timeout_s": HEARTBEAT_S,
                "step_timeout_s": STEP_S,
                **({"storage_timeout_s": STORAGE_S} if plan.small_disk else {}),
            },
            "storage_path": str(self._storage),
            **clip,
        }

    def _submit(self, more: tuple[str, ...]) -> int | str:
        """Run `submit`; return the exit code, or a description of the timeout."""
        path = self._folder / "job.json"
        path.write_text(json.dumps(self._job()))
        options = ["--working-dir", str(HERE), "--address", self._cluster.address, *more]
        submit = [sys.executable, "-m", "distplat.cli.main", "submit", str(path), *options]
        self._drivers += 1
        log = self._folder / f"driver-{self._drivers}.log"
        with log.open("wb") as out:
            process = self._cluster.start_driver(submit, stdout=out, stderr=subprocess.STDOUT)
        self._scene.driver = process.pid
        deadline, read = time.monotonic() + LIMIT_S, 0
        while (code := process.poll()) is None and time.monotonic() < deadline:
            read = self._read_log(log, read)
            time.sleep(0.05)
        self._read_log(log, read)
        if code is not None:
            return code
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        return f"none after {LIMIT_S:g} s"

    def _read_log(self, log: Path, read: int) -> int:
        """Record the detection of a frozen process; return the new position in the log."""
        frozen = [fired.at for fired in self.fired if fired.fault.action == signal.SIGSTOP]
        with log.open("rb") as file:
            file.seek(read)
            new = file.read()
        text = new.decode(errors="replace")
        if frozen and self.found_s is None and _DETECTION.search(text):
            self.found_s, self._found_text = time.time() - max(frozen), text
        return read + new.rfind(b"\n") + 1  # the last line may be incomplete

    def _log_tail(self) -> str:
        text = (self._folder / f"driver-{self._drivers}.log").read_text(errors="replace")
        return " | ".join(text.strip().splitlines()[-3:])[-500:]

    def _unsaved(self) -> list[str]:
        """Compare the last step of a stopped run with its newest checkpoint."""
        if not self._plan.saves:
            return []
        directory = self._directories()[0]
        lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        last = max(line["step"] for line in lines if line["kind"] == "step")
        saved = max(path.name for path in directory.glob("checkpoints/step-" + "[0-9]" * 6))
        if saved == f"step-{last:06d}":
            return []
        return [f"stopped after step {last}, but the newest checkpoint is {saved}"]

    def _damage(self) -> list[str]:
        """Damage the newest checkpoint, if there is an older one."""
        if not self._plan.damage:
            return []
        found = sorted(self._directories()[0].glob("checkpoints/step-" + "[0-9]" * 6))
        if len(found) < 2:
            return [f"{len(found)} checkpoints: at least 2 are needed"]
        path = found[-1] / "model.safetensors"
        content = bytearray(path.read_bytes())
        if self._plan.damage == "flip":
            content[len(content) // 2] ^= 1
        else:
            del content[len(content) // 2 :]
        path.write_bytes(content)
        return []

    def _leftovers(self) -> list[str]:
        """Wait for the end of the run's actors and processes; return the remaining ones."""
        deadline = time.monotonic() + CLEANUP_TIMEOUT_S
        while left := [*self._cluster.named_actors(), *(str(p.pid) for p in _processes())]:
            if time.monotonic() > deadline:
                return [f"left behind: {left}"]
            time.sleep(0.1)
        return []

    def _compare(self, expected: str | None) -> list[str]:
        """Compare the result with the run without a fault; return the problems."""
        directory = self._directories()[-1]
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        steps = [record["step"] for record in records if record["kind"] == "step"]
        failures = [record for record in records if record["kind"] == "failure"]
        problems = []
        first = steps[0] if steps and self._plan.resumes else 1
        missing = set(range(first, STEPS + 1)) - set(steps)
        if steps != sorted(set(steps)) or (missing and not self._may_miss(failures)):
            problems.append(f"reported steps: {steps}")
        if self._plan.quiet and failures:
            problems.append(f"reported as a failure: {failures[0]['cause']}")
        if not failures and any(fault.action in LOSSES for fault in self._plan.faults):
            problems.append("the task's fault was not reported as a failure")
        if expected is not None and self.model_hash() != expected:
            problems.append("the model has other bits than that of the run without a fault")
        if any(not math.isfinite(r["loss"]) for r in records if r["kind"] == "step"):
            problems.append("a loss is not finite")
        if self._strategy == "ps-async":
            problems += self._audit(directory, failures)
        return problems

    def _may_miss(self, failures: list[Mapping[str, Any]]) -> bool:
        """Return whether steps may be missing: of a lost worker, or while the disk was full."""
        log = (self._folder / f"driver-{self._drivers}.log").read_text(errors="replace")
        unwritten = self._plan.small_disk and "of metrics were not written" in log
        return unwritten or (self._strategy == "ps-async" and bool(failures))

    def _audit(self, directory: Path, failures: list[Mapping[str, Any]]) -> list[str]:
        """Check that each shard applied every task once, and that the run replays."""
        path = directory / FILE_NAME
        world = WORLD[self._strategy]
        if not path.exists():
            rolled_back = any(f["step"] and len(f["replaced"]) >= world for f in failures)
            log = (self._folder / f"driver-{self._drivers}.log").read_text(errors="replace")
            excused = self._plan.resumes or rolled_back or f"no {FILE_NAME}: " in log
            return [] if excused else [f"no {FILE_NAME}, though no step was repeated"]
        problems = [
            flaw for log in read_logs(str(path))[0] for flaw in log_flaws(log, world, STEPS)
        ]
        if problems:
            return problems
        code, stderr = run_quietly(["replay", str(directory), "--working-dir", str(HERE)])
        followed = code == 0 or (code == 5 and bool(failures))  # a task computed by two workers
        return [] if followed else [f"`distplat replay`: exit code {code} {stderr}"]


def found_late(faults: Sequence[PlannedFault], found_s: float | None, text: str) -> list[str]:
    """
    Return a problem if a permanently frozen process was detected too late.

    Args:
        faults: planned faults.
        found_s: see `Outcome`; None: not reported, such as a frozen server with a backup.
        text: log message. After the last step there are no heartbeats: calls such as that for the
            log of updates have the deadline `step_timeout_s`.
    """
    frozen = any(fault.action == signal.SIGSTOP and not fault.undo_s for fault in faults)
    limit_s = DETECTION_DELAY_S + (STEP_S if "step_timeout_s" in text else HEARTBEAT_S)
    if not frozen or found_s is None or found_s <= limit_s:
        return []
    return [f"a frozen process was detected after {found_s:.1f} s, not within {limit_s:g} s"]


def _create_empty(folder: Path) -> None:
    """Create an empty folder; remove the files of an interrupted grid."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _longest_pause(start: float, times: list[float]) -> float:
    """Return the seconds from `start` to the end of the longest pause between forwards."""
    begins = [start, *times[:-1]]
    pauses = {end - begin: end for begin, end in zip(begins, times, strict=True)}
    return pauses[max(pauses)] - start


def hash_of(model: Path) -> str:
    """Return the hash of a model's tensors, in the order of their names."""
    tensors = load_file(model)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _processes() -> list[psutil.Process]:
    roles = ("Worker", "ServerNode", "ServerManager", "Scheduler", "ControllerActor")
    return [process for role in roles for process in actors(role)]


def _root(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def run_quietly(args: list[str]) -> tuple[int, str]:
    """Run a command; return its exit code and stderr."""
    stderr = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
        return command(args), stderr.getvalue()
