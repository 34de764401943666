"""
Random faults in memory: a sequence of jobs, each with several faults at random moments.

    chaos_memory.py --minutes 10            runs trials for ten minutes
    chaos_memory.py --seed 17 --trials 1    repeats that trial

Only Ray is replaced (`tests/support/ray_in_memory.py`): driver, controller, workers, servers and
checkpoints on the disk are those of distplat. Processes are threads, so a job takes a second.

Exits with 1 if a trial is wrong, or if no fault of any trial fired.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "support")]

import chaos_memory_task
from call_faults import add_rule
from chaos_memory_loops import setting_of
from chaos_memory_plan import (
    ALL,
    FAULT_LABELS,
    STEPS,
    SYNCHRONOUS,
    Injector,
    Moments,
    PlannedFault,
    Setting,
    draw_faults,
)
from chaos_trial import hash_of, run_quietly
from in_memory_processes import Killed
from rank_threads import stacks_of
from ray_in_memory import InMemoryRay

from distplat import Trainer
from distplat.actors import retrying_calls
from distplat.platform.apply_log import FILE_NAME, log_flaws, read_logs
from distplat.platform.disk import Disk
from distplat.platform.errors import InfrastructureError

HERE = Path(__file__).parent
PER_JOB = 6
"""Number of consecutive trials of a job; its run without a fault is cached."""
LIMIT_S = 240.0
"""Deadline of a run."""
MAX_DRIVERS = 6
"""Maximum number of drivers of a trial."""
TRAINED = "nothing is left to train"
"""In the error of a run resumed from the checkpoint of the last step."""
RESUMABLE_ERRORS = (
    "controller",
    "without a step between",
    "in a row could not be written",
    "`failure.start_timeout_s` changes",  # a process frozen before its first answer is not replaced
    "SHA-256 is",  # the resumed checkpoint was damaged, and there is no other
)
"""In errors that a fault may cause; the run is resumed."""


@dataclass
class Outcome:
    """Result of a trial."""

    seed: int
    setting: Setting
    faults: tuple[PlannedFault, ...]
    fired: list[tuple[PlannedFault, str]]
    problems: list[str]
    seconds: float
    drivers: int
    """Number of started drivers."""
    reasons: list[str]
    """Errors after which the run was resumed."""


@dataclass
class Expected:
    """Results of a run without a fault."""

    model: str
    """Hash of the model."""
    tables: str
    """Hashes of all files of tensors."""
    losses: dict[int, float]
    metrics: dict[int, dict[str, float]]
    seen: Moments


@dataclass
class Soak:
    """
    Runs trials.

    Args:
        folder: for the files of runs.
    """

    folder: Path
    _unfailed: dict[str, Expected] = field(default_factory=dict)

    def trial(self, seed: int) -> Outcome:
        """Run the trial of a seed."""
        start = time.monotonic()
        setting = setting_of(seed // PER_JOB)
        expected = self.unfailed(setting)
        # docs/faults.md has seeds of this text
        faults = draw_faults(setting, Random(f"deeds {seed}"), expected.seen)
        run = OneRun(setting, self.folder / f"seed-{seed}", faults, seed)
        run.run_to_end()
        if not run.problems:
            run.compare(expected)
        if not run.problems:
            shutil.rmtree(run.folder)
        duration = time.monotonic() - start
        fired = run.injector.fired
        ends = run.drivers, run.reasons
        return Outcome(seed, setting, faults, fired, run.problems, duration, *ends)

    def unfailed(self, setting: Setting) -> Expected:
        """Return the results of the job without a fault, which are cached."""
        key = json.dumps([setting.fields, setting.nodes], sort_keys=True)
        if key not in self._unfailed:
            run = OneRun(setting, self.folder / "unfailed", ())
            run.run_to_end()
            if not run.problems and not run.is_compared:
                run.audit()
            if run.problems:
                raise RuntimeError(f"the run without a fault has failed: {run.problems}")
            losses, metrics = run.reported()
            seen, hashes = run.injector.seen, (run.model_hash(), run.tables_hash())
            self._unfailed[key] = Expected(*hashes, losses, metrics, seen)
        return self._unfailed[key]


class OneRun:
    """
    A run, and the runs that resume it.

    Args:
        setting: the job.
        folder: for the files of the runs.
        faults: the faults.
        seed: of the trial.
    """

    def __init__(
        self, setting: Setting, folder: Path, faults: tuple[PlannedFault, ...], seed: int = 0
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.setting, self.folder = setting, folder
        self.storage = folder / "runs-0"
        self.ray = InMemoryRay(setting.nodes)
        self.injector = Injector(self.ray, self.storage, faults, seed)
        self.problems: list[str] = []
        self.drivers = 0
        self.reasons: list[str] = []  #: errors after which the run was resumed
        self.trained: Path | None = None  #: checkpoint of the last step, if the run ended after it

    @property
    def is_compared(self) -> bool:
        """Whether losses and model are compared; otherwise the log of updates is checked."""
        return self.setting.strategy in SYNCHRONOUS or self.setting.own_loop

    def run_to_end(self) -> None:
        """Run to the end; resume if driver or controller is lost."""
        with ExitStack() as patches, _LogFile(self.folder / "log.txt"):
            patches.enter_context(self.ray)
            add_rule(self.ray.cluster, self.injector.rule)
            patches.enter_context(
                mock.patch.object(chaos_memory_task, "on_moment", self.injector.reach)
            )
            for name in ("make", "write", "sync", "rename", "remove"):
                on_disk = self.injector.on_disk(name)
                patches.enter_context(mock.patch.object(Disk, name, on_disk))
            while self._drive():
                pass
        self.problems += self.injector.errors

    def _drive(self) -> bool:
        """Start a driver and wait for its end; return whether to resume the run."""
        self.drivers += 1
        raised: list[BaseException] = []

        def work() -> None:
            try:
                self.ray.as_driver(self._trainer().fit)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(LIMIT_S)
        if thread.is_alive():
            threads = dict(enumerate(threading.enumerate()))
            (self.folder / "stacks.txt").write_text("\n".join(stacks_of(threads)))
            self.problems.append(f"still running after {LIMIT_S:g} s")
            return False
        if not raised:
            return False
        with self.injector.kill_lock:  # wait for the copy of the disk
            pass
        if TRAINED in str(raised[0]):
            self.trained = max(self.directories()[-1].glob("checkpoints/step-" + "[0-9]" * 6))
            return False
        if self._is_resumable(raised[0]) and self.drivers < MAX_DRIVERS:
            self.ray.kill_process("driver")
            disk_copy, self.injector.disk_copy = self.injector.disk_copy, None
            if disk_copy is not None:
                self.storage = self.injector.storage = disk_copy
            return True
        text = "".join(traceback.format_exception(raised[0]))[-1500:]
        self.problems.append(f"{type(raised[0]).__name__}: {raised[0]}\n{text}")
        return False

    def _is_resumable(self, error: BaseException) -> bool:
        """Return whether a fault may have caused the error, so that a user would resume."""
        if not self.injector.fired or isinstance(error, Killed):
            return bool(self.injector.fired)
        self.reasons.append(str(error).splitlines()[0])
        known = any(text in str(error) for text in RESUMABLE_ERRORS)
        # After the last step nothing is trained again: the model may be lost with its holders.
        return known or (isinstance(error, InfrastructureError) and STEPS in self.reported()[0])

    def _trainer(self) -> Trainer:
        job = {**self.setting.fields, "storage_path": str(self.storage)}
        job["task"] = f"chaos_memory_task:{self.setting.task}"
        found = self.directories()
        saved = [path for path in found if any(path.glob("checkpoints/step-" + "[0-9]" * 6))]
        more: dict[str, Any] = {"working_dir": str(HERE), "progress": False, "log_to_driver": False}
        return Trainer(job, resume=saved[-1] if saved else None, **more)

    def directories(self) -> list[Path]:
        """Return the run directories, oldest first."""
        found = [path.parent for path in self.storage.glob("*/job.yaml")]
        return sorted(found, key=lambda path: path.stat().st_mtime)

    def model_hash(self) -> str:
        """Return the hash of the trained model."""
        return hash_of((self.trained or self.directories()[-1]) / "model.safetensors")

    def tables_hash(self) -> str:
        """Return the hashes of all files: model, embedding tables, average."""
        files = sorted(self.directories()[-1].glob("*.safetensors"))
        return " ".join(f"{path.name} {hash_of(path)}" for path in files)

    def reported(self) -> tuple[dict[int, float], dict[int, dict[str, float]]]:
        """
        Return the loss of each step and the metrics of each evaluation, as reported last.

        The loss is NaN if the report of a lost worker is missing.
        """
        losses: dict[int, float] = {}
        metrics: dict[int, dict[str, float]] = {}
        for directory in self.directories():
            for line in _lines(directory):
                if line["kind"] == "step":
                    is_complete = line["samples"] == self.setting.samples
                    losses[line["step"]] = line["loss"] if is_complete else math.nan
                elif line["kind"] == "evaluation":
                    metrics[line["step"]] = line["metrics"]
        return losses, metrics

    def compare(self, expected: Expected) -> None:
        """Compare the results with the run without a fault."""
        for directory in self.directories():
            steps = [line["step"] for line in _lines(directory) if line["kind"] == "step"]
            if steps != sorted(set(steps)):
                self.problems.append(f"{directory.name}: reported steps: {steps}")
        losses, metrics = self.reported()
        if self.is_compared:
            self._compare_all(expected, losses, metrics)
        else:
            self.audit()

    def _compare_all(
        self, expected: Expected, losses: dict[int, float], metrics: dict[int, dict[str, float]]
    ) -> None:
        missing = {step for step in expected.losses if step >= self._first()} - losses.keys()
        if missing:
            self.problems.append(f"steps were not reported: {sorted(missing)}")
        if any(loss is None for loss in losses.values()):  # in strict JSON NaN is null
            self.problems.append(f"a loss is not finite: {losses}")
        resized = any(fault.kind == "scale" for fault, _ in self.injector.fired)
        lost_feedback = self.setting.has_error_feedback and (self.drivers > 1 or self._failures())
        if resized or lost_feedback or not self.setting.is_reproducible:
            return
        wrong = [
            step
            for step, loss in losses.items()
            if not (math.isnan(loss) or math.isclose(loss, expected.losses[step], rel_tol=1e-6))
        ]
        if wrong:
            self.problems.append(f"other losses in steps {wrong}")
        if any(metrics.get(step) != expected.metrics[step] for step in self._evaluated(expected)):
            self.problems.append(f"evaluations: {metrics}, not {expected.metrics}")
        if self.model_hash() != expected.model:
            self.problems.append("the model has other bits than that of the run without a fault")
        if self.trained is None and self.tables_hash() != expected.tables:
            self.problems.append("a table or an average has other bits")

    def _failures(self) -> list[dict[str, Any]]:
        """Return the failure records of the last run."""
        return [line for line in _lines(self.directories()[-1]) if line["kind"] == "failure"]

    def _first(self) -> int:
        """Return the first step that must be reported: a killed driver may miss earlier steps."""
        if self.trained is not None:
            return STEPS + 1
        last = [line["step"] for line in _lines(self.directories()[-1]) if line["kind"] == "step"]
        return min(last, default=1) if self.drivers > 1 else 1

    def _evaluated(self, expected: Expected) -> list[int]:
        return [step for step in expected.metrics if step >= self._first()]

    def audit(self) -> None:
        """Check that each shard applied every task once, and that the run replays."""
        directory = self.directories()[-1]
        if not (directory / FILE_NAME).exists():
            messages = (self.folder / "log.txt").read_text()
            # rolled back and resumed runs have no log
            if self.drivers == 1 and not self._failures() and f"no {FILE_NAME}: " not in messages:
                self.problems.append(f"no {FILE_NAME}, though no step was repeated")
            return
        world = self.setting.workers
        for log in read_logs(str(directory / FILE_NAME))[0]:
            self.problems += log_flaws(log, world, STEPS)
        if self.problems or "embeddings" in self.setting.fields:
            return  # the logs do not contain updates of tables
        code, stderr = run_quietly(["replay", str(directory), "--working-dir", str(HERE)])
        if code and not (code == 5 and self._failures()):  # a task computed by two workers
            self.problems.append(f"`distplat replay`: exit code {code} {stderr}")


def _lines(directory: Path) -> Iterable[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class _LogFile(logging.FileHandler):
    """Writes distplat's log to a file during the block."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        form = "%(relativeCreated)d %(threadName)s %(levelname).1s %(message)s"
        self.setFormatter(logging.Formatter(form))

    def __enter__(self) -> None:
        logger = logging.getLogger("distplat")
        logger.handlers, logger.propagate = [self], False
        logger.setLevel(logging.INFO)

    def __exit__(self, *error: object) -> None:
        self.close()


def line(outcome: Outcome) -> str:
    """Describe an outcome; with all details if it is wrong."""
    verdict = "wrong" if outcome.problems else "ok" if outcome.fired else "not fired"
    count = f"{len(outcome.fired)}/{len(outcome.faults)} fired"
    head = f"seed {outcome.seed:<6} {outcome.setting.strategy:<9} {verdict:<9} {count}"
    text = f"{head}, drivers {outcome.drivers}, {outcome.seconds:5.1f} s"
    if verdict != "wrong":
        return "\n    resumed: ".join([text, *outcome.reasons])
    fired = [f"fired: {fault}: {proof}" for fault, proof in outcome.fired]
    not_fired = [f"not fired: {fault}" for fault in _not_fired(outcome)]
    return "\n    ".join([text, str(outcome.setting.fields), *fired, *not_fired, *outcome.problems])


def _not_fired(outcome: Outcome) -> list[PlannedFault]:
    fired = [fault for fault, _ in outcome.fired]
    return [fault for fault in outcome.faults if fault not in fired]


def table(outcomes: list[Outcome]) -> str:
    """Return a Markdown table of fired faults by kind and strategy."""
    lines = [f"| fault | {' | '.join(ALL)} | all |", "|---|" + "---|" * (len(ALL) + 1)]
    fired = Counter((fault.kind, o.setting.strategy) for o in outcomes for fault, _ in o.fired)
    for kind, label in FAULT_LABELS.items():
        counts = [fired[kind, strategy] for strategy in ALL]
        lines.append(f"| {label} | {' | '.join(map(str, [*counts, sum(counts)]))} |")
    for label, numbers in (
        ("all faults", fired),
        ("runs", Counter(("", o.setting.strategy) for o in outcomes)),
        ("wrong", Counter(("", o.setting.strategy) for o in outcomes if o.problems)),
    ):
        counts = [
            sum(n for (_, name), n in numbers.items() if name == strategy) for strategy in ALL
        ]
        lines.append(f"| {label} | {' | '.join(map(str, [*counts, sum(counts)]))} |")
    not_fired = sum(len(_not_fired(outcome)) for outcome in outcomes)
    return "\n".join([*lines, "", f"{not_fired} faults did not fire, and are not counted."])


def exit_code(outcomes: list[Outcome]) -> int:
    """Return the exit code: 1 if a trial is wrong, or if no fault fired."""
    wrong = any(outcome.problems for outcome in outcomes)
    return int(wrong or not any(outcome.fired for outcome in outcomes))


def main() -> int:
    """Run trials until the time is over; return the exit code."""
    parser = argparse.ArgumentParser(description="Random faults in memory.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--trials", type=int, default=10**6, help="maximum number of runs")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the first trial; later trials count up"
    )
    parser.add_argument("--folder", help="for the files of runs; default: a new one in /tmp")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="memory-"))
    print(f"first seed {args.seed}; files of wrong trials are in {folder}", flush=True)
    retrying_calls.RETRY_PAUSE_S = 0.005
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + args.minutes * 60
    with InMemoryRay():  # late threads must not call the real Ray
        soak = Soak(folder)
        while len(outcomes) < args.trials and time.monotonic() < deadline:
            outcomes.append(soak.trial(args.seed + len(outcomes)))
            print(line(outcomes[-1]), flush=True)
    print("\n" + table(outcomes))
    return exit_code(outcomes)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # do not wait for threads of killed processes
