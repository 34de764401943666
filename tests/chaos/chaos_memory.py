"""
A thousand faults in memory: one job after the other, each with several faults at drawn moments.

    chaos_memory.py --minutes 10            the next seeds, for so long
    chaos_memory.py --seed 17 --trials 1    that one again

All of distplat is the real one: driver, controller, workers, servers, checkpoints on the disk. Ray
alone is not (`tests/support/ray_in_memory.py`): processes are threads, so a job takes a second.

Exits with 1 if a run went wrong, or if no fault of any fired: of a single run all may have had no
occasion.
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
    KINDS,
    STEPS,
    SYNCHRONOUS,
    Deed,
    Injector,
    Moments,
    Setting,
    draw_deeds,
)
from chaos_trial import hash_of, quietly
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
"""Trials of a job, one after the other: what comes of it without a fault is made once."""
LIMIT_S = 240.0
"""A run that takes longer hangs."""
DRIVERS = 6
"""So often a run is begun or resumed at most."""
TRAINED = "nothing is left to train"
"""Of a checkpoint after the last step: its model is the trained one."""
WORTH_RESUMING = (
    "controller",
    "without a step between",
    "in a row could not be written",
    "`failure.start_timeout_s` changes",  # who stands still before its first answer is not replaced
    "SHA-256 is",  # what the run began from was damaged, and there was no other checkpoint yet
)
"""In errors that end a run for which a trial may be the reason; then the user resumes."""


@dataclass
class Outcome:
    """What came of a trial."""

    seed: int
    setting: Setting
    deeds: tuple[Deed, ...]
    fired: list[tuple[Deed, str]]
    problems: list[str]
    seconds: float
    drivers: int
    """How often a driver was started."""
    reasons: list[str]
    """Why a run ended, though nobody ended it, and was resumed."""


@dataclass
class Finished:
    """What a run without a fault leaves."""

    model: str
    """Hash."""
    tables: str
    """Hashes of all that is left."""
    losses: dict[int, float]
    metrics: dict[int, dict[str, float]]
    seen: Moments


@dataclass
class Soak:
    """
    Makes trials.

    Args:
        folder: for what runs leave.
    """

    folder: Path
    _undisturbed: dict[str, Finished] = field(default_factory=dict)

    def trial(self, seed: int) -> Outcome:
        """Make the trial that a seed names."""
        began = time.monotonic()
        setting = setting_of(seed // PER_JOB)
        expected = self.undisturbed(setting)
        deeds = draw_deeds(setting, Random(f"deeds {seed}"), expected.seen)
        run = OneRun(setting, self.folder / f"seed-{seed}", deeds, seed)
        run.make()
        if not run.problems:
            run.compare(expected)
        if not run.problems:
            shutil.rmtree(run.folder)
        lasted = time.monotonic() - began
        fired = run.injector.fired
        ends = run.drivers, run.reasons
        return Outcome(seed, setting, deeds, fired, run.problems, lasted, *ends)

    def undisturbed(self, setting: Setting) -> Finished:
        """Give what comes of the job without a fault; made once."""
        key = json.dumps([setting.fields, setting.nodes], sort_keys=True)
        if key not in self._undisturbed:
            run = OneRun(setting, self.folder / "undisturbed", ())
            run.make()
            if run.problems:
                raise RuntimeError(f"the run without a fault went wrong: {run.problems}")
            losses, metrics = run.told()
            seen, hashes = run.injector.seen, (run.model_hash(), run.tables_hash())
            self._undisturbed[key] = Finished(*hashes, losses, metrics, seen)
        return self._undisturbed[key]


class OneRun:
    """
    A run, and those that resume it.

    Args:
        setting: the job.
        folder: for what it leaves.
        deeds: the faults.
        seed: of the trial.
    """

    def __init__(
        self, setting: Setting, folder: Path, deeds: tuple[Deed, ...], seed: int = 0
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.setting, self.folder = setting, folder
        self.storage = folder / "runs-0"
        self.ray = InMemoryRay(setting.nodes)
        self.injector = Injector(self.ray, self.storage, deeds, seed)
        self.problems: list[str] = []
        self.drivers = 0
        self.reasons: list[str] = []  #: why a run ended, and was resumed
        self.trained: Path | None = None  #: the last checkpoint, where the run ended after it

    def make(self) -> None:
        """Run it to its end; where driver or controller is lost, be the user who resumes it."""
        with ExitStack() as around, _LogFile(self.folder / "log.txt"):
            around.enter_context(self.ray)
            add_rule(self.ray.cluster, self.injector.rule)
            around.enter_context(mock.patch.object(chaos_memory_task, "heard", self.injector.reach))
            for name in ("make", "write", "sync", "rename", "remove"):
                on_disk = self.injector.on_disk(name)
                around.enter_context(mock.patch.object(Disk, name, on_disk))
            while self._drive():
                pass

    def _drive(self) -> bool:
        """Start a driver, and wait for its end; say whether another one is to resume the run."""
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
            everybody = dict(enumerate(threading.enumerate()))
            (self.folder / "stacks.txt").write_text("\n".join(stacks_of(everybody)))
            self.problems.append(f"it is still at it after {LIMIT_S:g} s")
            return False
        if not raised:
            return False
        with self.injector.ending:  # what was on the disk then is to be there
            pass
        if TRAINED in str(raised[0]):
            self.trained = max(self.directories()[-1].glob("checkpoints/step-" + "[0-9]" * 6))
            return False
        if self._worth_resuming(raised[0]) and self.drivers < DRIVERS:
            self.ray.kill_process("driver")
            kept, self.injector.kept = self.injector.kept, None
            if kept is not None:
                self.storage = self.injector.storage = kept
            return True
        text = "".join(traceback.format_exception(raised[0]))[-1500:]
        self.problems.append(f"{type(raised[0]).__name__}: {raised[0]}\n{text}")
        return False

    def _worth_resuming(self, error: BaseException) -> bool:
        """Say whether a fault may have been the reason, and a user would go on from there."""
        if not self.injector.fired or isinstance(error, Killed):
            return bool(self.injector.fired)
        self.reasons.append(str(error).splitlines()[0])
        known = any(text in str(error) for text in WORTH_RESUMING)
        # After the last step nothing is trained again: who had the model may be lost with it.
        return known or (isinstance(error, InfrastructureError) and STEPS in self.told()[0])

    def _trainer(self) -> Trainer:
        job = {**self.setting.fields, "storage_path": str(self.storage)}
        job["task"] = f"chaos_memory_task:{self.setting.task}"
        found = self.directories()
        whole = [one for one in found if any(one.glob("checkpoints/step-" + "[0-9]" * 6))]
        more: dict[str, Any] = {"working_dir": str(HERE), "progress": False, "log_to_driver": False}
        return Trainer(job, resume=whole[-1] if whole else None, **more)

    def directories(self) -> list[Path]:
        """Give the run directories, the oldest first."""
        found = [path.parent for path in self.storage.glob("*/job.yaml")]
        return sorted(found, key=lambda path: path.stat().st_mtime)

    def model_hash(self) -> str:
        """Hash the trained model."""
        return hash_of((self.trained or self.directories()[-1]) / "model.safetensors")

    def tables_hash(self) -> str:
        """Hash what else is left: embedding tables, and an average of the model."""
        files = sorted(self.directories()[-1].glob("*.safetensors"))
        return " ".join(f"{path.name} {hash_of(path)}" for path in files)

    def told(self) -> tuple[dict[int, float], dict[int, dict[str, float]]]:
        """
        Give the loss of each step and the metrics of each evaluation, as last told.

        A step that lacks a lost worker's report is told without its samples: no loss is given.
        """
        losses: dict[int, float] = {}
        metrics: dict[int, dict[str, float]] = {}
        for directory in self.directories():
            for line in _lines(directory):
                if line["kind"] == "step":
                    whole = line["samples"] == self.setting.samples
                    losses[line["step"]] = line["loss"] if whole else math.nan
                elif line["kind"] == "evaluation":
                    metrics[line["step"]] = line["metrics"]
        return losses, metrics

    def compare(self, expected: Finished) -> None:
        """Compare what is left with what the run without a fault left."""
        for directory in self.directories():
            steps = [line["step"] for line in _lines(directory) if line["kind"] == "step"]
            if steps != sorted(set(steps)):
                self.problems.append(f"{directory.name}: steps were told as {steps}")
        losses, metrics = self.told()
        if self.setting.strategy in SYNCHRONOUS or self.setting.own_loop:
            self._compare_all(expected, losses, metrics)
        else:
            self._audit()

    def _compare_all(
        self, expected: Finished, losses: dict[int, float], metrics: dict[int, dict[str, float]]
    ) -> None:
        missing = {step for step in expected.losses if step >= self._first()} - losses.keys()
        if missing:
            self.problems.append(f"steps were not told: {sorted(missing)}")
        if any(loss is None for loss in losses.values()):  # in strict JSON NaN is null
            self.problems.append(f"a loss is not finite: {losses}")
        resized = any(deed.kind == "scale" for deed, _ in self.injector.fired)
        lost_debt = self.setting.owes and (self.drivers > 1 or self._failures())
        if resized or lost_debt or not self.setting.repeats:
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
        """Give what is told of failures after which the last run went on."""
        return [line for line in _lines(self.directories()[-1]) if line["kind"] == "failure"]

    def _first(self) -> int:
        """Give the first step that must be told: those before, nobody may have told the driver."""
        if self.trained is not None:
            return STEPS + 1
        last = [line["step"] for line in _lines(self.directories()[-1]) if line["kind"] == "step"]
        return min(last, default=1) if self.drivers > 1 else 1

    def _evaluated(self, expected: Finished) -> list[int]:
        return [step for step in expected.metrics if step >= self._first()]

    def _audit(self) -> None:
        """Every task was applied once at each shard, and the run can be made again from that."""
        directory = self.directories()[-1]
        if not (directory / FILE_NAME).exists():
            return  # a run that was rolled back, or resumed, has none
        world = self.setting.workers
        for log in read_logs(str(directory / FILE_NAME))[0]:
            self.problems += log_flaws(log, world, STEPS)
        if self.problems or "embeddings" in self.setting.fields:
            return  # no log says in which order tables were updated
        code, said = quietly(["replay", str(directory), "--working-dir", str(HERE)])
        if code and not (code == 5 and self._failures()):  # a task that was made by two workers
            self.problems.append(f"`distplat replay`: exit code {code} {said}")


def _lines(directory: Path) -> Iterable[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class _LogFile(logging.FileHandler):
    """Has distplat's own log in a file, in a block."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        form = "%(relativeCreated)d %(threadName)s %(levelname).1s %(message)s"
        self.setFormatter(logging.Formatter(form))

    def __enter__(self) -> None:
        ours = logging.getLogger("distplat")
        ours.handlers, ours.propagate = [self], False
        ours.setLevel(logging.INFO)

    def __exit__(self, *error: object) -> None:
        self.close()


def line(outcome: Outcome) -> str:
    """Say what came of a trial, and of one that is not well everything."""
    verdict = "wrong" if outcome.problems else "ok" if outcome.fired else "not fired"
    count = f"{len(outcome.fired)}/{len(outcome.deeds)} fired"
    head = f"seed {outcome.seed:<6} {outcome.setting.strategy:<9} {verdict:<9} {count}"
    text = f"{head}, drivers {outcome.drivers}, {outcome.seconds:5.1f} s"
    if verdict != "wrong":
        return "\n    resumed: ".join([text, *outcome.reasons])
    fired = [f"fired: {deed}: {proof}" for deed, proof in outcome.fired]
    missed = [f"not fired: {deed}" for deed in _missed(outcome)]
    return "\n    ".join([text, str(outcome.setting.fields), *fired, *missed, *outcome.problems])


def _missed(outcome: Outcome) -> list[Deed]:
    done = [deed for deed, _ in outcome.fired]
    return [deed for deed in outcome.deeds if deed not in done]


def table(outcomes: list[Outcome]) -> str:
    """Make the table in Markdown: faults that fired, by kind and strategy."""
    lines = [f"| fault | {' | '.join(ALL)} | all |", "|---|" + "---|" * (len(ALL) + 1)]
    fired = Counter((deed.kind, o.setting.strategy) for o in outcomes for deed, _ in o.fired)
    for kind, what in KINDS.items():
        counts = [fired[kind, strategy] for strategy in ALL]
        lines.append(f"| {what} | {' | '.join(map(str, [*counts, sum(counts)]))} |")
    for what, some in (
        ("all faults", fired),
        ("runs", Counter(("", o.setting.strategy) for o in outcomes)),
        ("wrong", Counter(("", o.setting.strategy) for o in outcomes if o.problems)),
    ):
        counts = [sum(n for (_, one), n in some.items() if one == strategy) for strategy in ALL]
        lines.append(f"| {what} | {' | '.join(map(str, [*counts, sum(counts)]))} |")
    missed = sum(len(_missed(one)) for one in outcomes)
    return "\n".join([*lines, "", f"{missed} faults had no occasion, and count nowhere."])


def exit_code(outcomes: list[Outcome]) -> int:
    """Give that of the command: 1 also where no fault has fired."""
    wrong = any(one.problems for one in outcomes)
    return int(wrong or not any(one.fired for one in outcomes))


def main() -> int:
    """Inject faults until the time is over; give the exit code."""
    parser = argparse.ArgumentParser(description="Random faults in memory.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--trials", type=int, default=10**6, help="at most so many runs")
    parser.add_argument("--seed", type=int, default=1, help="of the first; the next ones follow")
    parser.add_argument("--folder", help="for what runs leave; default: a new one in /tmp")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="memory-"))
    print(f"first seed {args.seed}; what runs that go wrong leave is in {folder}", flush=True)
    retrying_calls.RETRY_PAUSE_S = 0.005
    outcomes: list[Outcome] = []
    until = time.monotonic() + args.minutes * 60
    with InMemoryRay():  # who is late to come out must never meet the real one
        soak = Soak(folder)
        while len(outcomes) < args.trials and time.monotonic() < until:
            outcomes.append(soak.trial(args.seed + len(outcomes)))
            print(line(outcomes[-1]), flush=True)
    print("\n" + table(outcomes))
    return exit_code(outcomes)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of the killed may wait for ever, and nobody waits for them
