"""One trial: a job with a fault, run by the command as a user runs it, and what came of it."""

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
from chaos_cluster import AnyCluster
from chaos_injector import Deed, Disk, Fired, Injector, Scene, actors
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
"""A run that takes longer hangs."""
GONE_WITHIN_S = 20.0
DISK_MB = 256
_FOUND = re.compile(r"frozen|has not answered|missing[: ]|was lost")
"""In what a driver and its actors say of one that gives no answer."""
FOUND_LATE_S = 3.0
"""By how much a frozen process may be found after its deadline: the second that is promised, and
two for the driver's log and a machine whose cores others want."""
HUGE_CODES = (70, -6, -11)
"""An error inside distplat, an abort and a crash of the driver: never right."""


@dataclass
class Outcome:
    """What came of a trial."""

    row: str
    strategy: str
    seed: int
    deeds: tuple[Deed, ...]
    fired: list[Fired]
    not_fired: list[str]
    problems: list[str]
    """What is wrong with how the run went on; empty: as it should."""
    recovery_s: float | None
    """From the last deed to the end of the longest pause after it, of any worker."""
    seconds: float
    folder: Path
    found_s: float | None = None
    """From the deed that froze somebody until a driver's log says so; None: it does not."""

    @property
    def verdict(self) -> str:
        """One word for the table."""
        if self.problems:
            return "wrong"
        return "not fired" if self.not_fired else "ok"


@dataclass
class Runs:
    """
    Makes the runs of a grid on one cluster, and keeps those without a fault to compare with.

    Args:
        cluster: where they run; None: rows that need none.
        folder: for all that they leave.
    """

    cluster: AnyCluster | None
    folder: Path
    _undisturbed: dict[str, str] = field(default_factory=dict)

    def trial(self, name: str, strategy: str, seed: int) -> Outcome:
        """Make the trial that row, strategy and seed name."""
        if not ROWS[name].nodes:
            return self.in_memory(name, strategy, seed)
        plan = ROWS[name].plan(strategy, Random(f"{name} {strategy} {seed}"))
        return self.make(name, strategy, seed, plan)

    def in_memory(self, name: str, strategy: str, seed: int) -> Outcome:
        """Make a trial of a row that needs no cluster."""
        import chaos_inputs
        import chaos_messages

        folder = self.folder / f"{name}-{strategy}-{seed}"
        _anew(folder)
        began, missed = time.monotonic(), list[str]()
        if name == "F25":
            problems, became = chaos_messages.trial(strategy, seed)
            missed = [
                f"nothing: {what}" for what in ("request", "reply", "twice") if not became[what]
            ]
        else:
            problems = {"B1": chaos_inputs.jobs, "B2": chaos_inputs.checkpoints}[name](seed, folder)
        lasted = time.monotonic() - began
        return Outcome(name, strategy, seed, (), [], missed, problems, None, lasted, folder)

    def make(self, name: str, strategy: str, seed: int, plan: Plan) -> Outcome:
        """Make a trial of a plan."""
        expected = None if strategy == "ps-async" else self.undisturbed(strategy, plan)
        folder = self.folder / f"{name}-{strategy}-{seed}"
        assert self.cluster is not None
        run = OneRun(self.cluster, folder, strategy, plan)
        began = time.monotonic()
        try:
            problems = run.make(expected)
        finally:
            run.end()
        missed = [str(deed) for deed in plan.deeds if deed not in [f.deed for f in run.fired]]
        missed += [text for text in run.injector_problems if text not in missed]
        lasted = time.monotonic() - began
        return Outcome(
            name,
            strategy,
            seed,
            plan.deeds,
            run.fired,
            missed,
            problems,
            run.recovery(),
            lasted,
            folder,
            run.found_s,
        )

    def undisturbed(self, strategy: str, plan: Plan) -> str:
        """Give the hash of the model of the same job without a fault; made once."""
        same = Plan((), plan.options, plan.width)
        key = json.dumps([strategy, dict(plan.options), plan.width], sort_keys=True)
        if key not in self._undisturbed:
            name = f"undisturbed-{len(self._undisturbed)}-{strategy}"
            assert self.cluster is not None
            run = OneRun(self.cluster, self.folder / name, strategy, same)
            try:
                if problems := run.make(None):
                    raise RuntimeError(f"the run without a fault went wrong: {problems}")
            finally:
                run.end()
            self._undisturbed[key] = run.model_hash()
        return self._undisturbed[key]


class OneRun:
    """A run, and the one that resumes it."""

    def __init__(self, cluster: AnyCluster, folder: Path, strategy: str, plan: Plan) -> None:
        self._cluster, self._folder, self._strategy, self._plan = cluster, folder, strategy, plan
        _anew(folder)
        (folder / "talk").mkdir()
        self._storage = folder / "runs"
        self._storage.mkdir()
        disk = self._mount() if plan.small_disk else None
        scene = Scene(folder / "talk", self._storage, disk, cluster)
        self._scene, self._disk = scene, disk
        self._injector = Injector(scene, plan.deeds)
        self._drivers = 0
        self._ended_at = 0.0
        self.found_s: float | None = None  #: see `Outcome`
        self._found_as = ""  #: what was said of it

    @property
    def fired(self) -> list[Fired]:
        """The deeds that were done."""
        return self._injector.fired

    @property
    def injector_problems(self) -> list[str]:
        """Deeds that could not be done."""
        return self._injector.problems

    def make(self, expected: str | None) -> list[str]:
        """
        Run it to its end, and once more where it is to be resumed.

        Args:
            expected: hash of the model; None: it is not compared.
        """
        self._cluster.before_run()
        self._injector.start()
        codes, problems = self._plan.codes, []
        code = self._drive(())
        if code not in codes:
            problems.append(f"exit code {code}, not one of {codes}: {self._last_words()}")
        elif self._plan.resumes:
            problems += self._unsaved() + self._damage()
            self._cluster.before_run()  # where its head has died
            code = self._drive(("--resume", str(self._directories()[0])))
            if code != 0:
                problems.append(f"resumed: exit code {code}: {self._last_words()}")
        self._ended_at = time.time()
        problems += found_late(self._plan.deeds, self.found_s, self._found_as)
        problems += self._left_behind()
        if code == 0 and not problems:
            problems += self._compare(expected)
        return problems

    def end(self) -> None:
        """Undo what is still to be undone."""
        self._injector.end()
        if self._disk is not None:
            self._disk.mend()
            _root(["umount", "-l", str(self._storage)])

    def recovery(self) -> float | None:
        """Give the seconds from the last deed to the end of the longest pause after it."""
        if not self.fired:
            return None
        at = max(fired.at for fired in self.fired)
        logs = [path.read_text() for path in self._scene.folder.glob("steps-*")]
        later = [[t for t in map(float, log.split()) if t > at] for log in logs]
        return max((_longest_pause(at, times or [self._ended_at]) for times in later), default=None)

    def model_hash(self) -> str:
        """Hash the trained model."""
        return hash_of(self._directories()[-1] / "model.safetensors")

    def _mount(self) -> Disk:
        _root(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self._storage)])
        return Disk(self._storage, _root)

    def _directories(self) -> list[Path]:
        """Give the run directories, the oldest first."""
        found = [path.parent for path in self._storage.glob("*/job.yaml")]
        return sorted(found, key=lambda path: path.stat().st_mtime)

    def _job(self) -> dict[str, Any]:
        plan, name = self._plan, self._strategy
        moments = [deed.request for deed in plan.deeds]
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

    def _drive(self, more: tuple[str, ...]) -> int | str:
        """Be the user; give the exit code, or say that it never came."""
        path = self._folder / "job.json"
        path.write_text(json.dumps(self._job()))
        options = ["--working-dir", str(HERE), "--address", self._cluster.address, *more]
        submit = [sys.executable, "-m", "distplat.cli.main", "submit", str(path), *options]
        self._drivers += 1
        log = self._folder / f"driver-{self._drivers}.log"
        with log.open("wb") as out:
            process = self._cluster.start_driver(submit, stdout=out, stderr=subprocess.STDOUT)
        self._scene.driver = process.pid
        until, read = time.monotonic() + LIMIT_S, 0
        while (code := process.poll()) is None and time.monotonic() < until:
            read = self._listen(log, read)
            time.sleep(0.05)
        self._listen(log, read)
        if code is not None:
            return code
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        return f"none after {LIMIT_S:g} s"

    def _listen(self, log: Path, read: int) -> int:
        """Note when somebody is told to be frozen; give up to where the log was read."""
        frozen = [one.at for one in self.fired if one.deed.action == signal.SIGSTOP]
        with log.open("rb") as file:
            file.seek(read)
            new = file.read()
        text = new.decode(errors="replace")
        if frozen and self.found_s is None and _FOUND.search(text):
            self.found_s, self._found_as = time.time() - max(frozen), text
        return read + new.rfind(b"\n") + 1  # a line may come in pieces

    def _last_words(self) -> str:
        text = (self._folder / f"driver-{self._drivers}.log").read_text(errors="replace")
        return " | ".join(text.strip().splitlines()[-3:])[-500:]

    def _unsaved(self) -> list[str]:
        """Compare the last step of a run that was stopped with its newest checkpoint's."""
        if not self._plan.saves:
            return []
        directory = self._directories()[0]
        told = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        made = max(one["step"] for one in told if one["kind"] == "step")
        saved = max(path.name for path in directory.glob("checkpoints/step-" + "[0-9]" * 6))
        same = saved == f"step-{made:06d}"
        return [] if same else [f"stopped after step {made}, and the newest checkpoint is {saved}"]

    def _damage(self) -> list[str]:
        """Spoil the newest checkpoint, where there is an older one."""
        if not self._plan.damage:
            return []
        found = sorted(self._directories()[0].glob("checkpoints/step-" + "[0-9]" * 6))
        if len(found) < 2:
            return [f"{len(found)} checkpoints: none could be damaged"]
        path = found[-1] / "model.safetensors"
        content = bytearray(path.read_bytes())
        if self._plan.damage == "flip":
            content[len(content) // 2] ^= 1
        else:
            del content[len(content) // 2 :]
        path.write_bytes(content)
        return []

    def _left_behind(self) -> list[str]:
        """Wait for the end of all that belonged to the run."""
        until = time.monotonic() + GONE_WITHIN_S
        while left := [*self._cluster.named_actors(), *(str(p.pid) for p in _processes())]:
            if time.monotonic() > until:
                return [f"left behind: {left}"]
            time.sleep(0.1)
        return []

    def _compare(self, expected: str | None) -> list[str]:
        """Compare the result with that of the run without a fault."""
        directory = self._directories()[-1]
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        told = [json.loads(line) for line in lines]
        steps = [one["step"] for one in told if one["kind"] == "step"]
        failures = [one for one in told if one["kind"] == "failure"]
        problems = []
        first = steps[0] if steps and self._plan.resumes else 1
        missing = set(range(first, STEPS + 1)) - set(steps)
        if steps != sorted(set(steps)) or (missing and not self._may_miss(failures)):
            problems.append(f"steps were told as {steps}")
        if self._plan.quiet and failures:
            problems.append(f"taken for a failure: {failures[0]['cause']}")
        if expected is not None and self.model_hash() != expected:
            problems.append("the model has other bits than that of the run without a fault")
        if any(not math.isfinite(one["loss"]) for one in told if one["kind"] == "step"):
            problems.append("a loss is not finite")
        if self._strategy == "ps-async":
            problems += self._audit(directory, failures)
        return problems

    def _may_miss(self, failures: list[Mapping[str, Any]]) -> bool:
        """Say whether steps may not be told: of a lost worker alone, or while the disk was full."""
        log = (self._folder / f"driver-{self._drivers}.log").read_text(errors="replace")
        unwritten = self._plan.small_disk and "of metrics were not written" in log
        return unwritten or (self._strategy == "ps-async" and bool(failures))

    def _audit(self, directory: Path, failures: list[Mapping[str, Any]]) -> list[str]:
        """Every task was applied once at each shard, and the run can be made again from that."""
        path = directory / FILE_NAME
        world = WORLD[self._strategy]
        if not path.exists():
            rolled_back = any(one["step"] and len(one["replaced"]) >= world for one in failures)
            log = (self._folder / f"driver-{self._drivers}.log").read_text(errors="replace")
            excused = self._plan.resumes or rolled_back or f"no {FILE_NAME}: " in log
            return [] if excused else [f"no {FILE_NAME}, though nothing was made again"]
        problems = [
            flaw for log in read_logs(str(path))[0] for flaw in log_flaws(log, world, STEPS)
        ]
        if problems:
            return problems
        code, said = quietly(["replay", str(directory), "--working-dir", str(HERE)])
        followed = code == 0 or (code == 5 and bool(failures))  # a task made by two workers
        return [] if followed else [f"`distplat replay`: exit code {code} {said}"]


def found_late(deeds: Sequence[Deed], found_s: float | None, text: str) -> list[str]:
    """
    Say if a process that was frozen for good was found too late.

    Args:
        deeds: that were planned.
        found_s: see `Outcome`; None: the driver was told nothing, as where a backup goes on.
        text: what it was told: one that is asked when all steps are made, as the server manager is
            for the log of updates, has no heartbeats any more, but the deadline that is named.
    """
    frozen = any(deed.action == signal.SIGSTOP and not deed.undo_s for deed in deeds)
    limit_s = FOUND_LATE_S + (STEP_S if "step_timeout_s" in text else HEARTBEAT_S)
    if not frozen or found_s is None or found_s <= limit_s:
        return []
    return [f"a frozen process was found after {found_s:.1f} s, not within {limit_s:g} s"]


def _anew(folder: Path) -> None:
    """Make an empty folder, also where a grid was broken off before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _longest_pause(at: float, times: list[float]) -> float:
    """Give the seconds from `at` to the end of the longest pause between forwards."""
    begins = [at, *times[:-1]]
    pauses = {end - begin: end for begin, end in zip(begins, times, strict=True)}
    return pauses[max(pauses)] - at


def hash_of(model: Path) -> str:
    """Hash a model's tensors, in the order of their names."""
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


def quietly(args: list[str]) -> tuple[int, str]:
    """Run a command line; give its exit code and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        return command(args), said.getvalue()
