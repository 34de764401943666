"""
`distplat verify`: plain references in a child process, then runs of the engine on a local Ray.

The comparison itself is in `strategies/verification/`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load, load_file
from torch import Tensor

import distplat
from distplat.actors import checkpointing
from distplat.actors.hash_seed import NAME, chosen
from distplat.actors.launch import local_ray
from distplat.actors.result import Result
from distplat.actors.task_check import task_check
from distplat.actors.task_loading import load_task_class
from distplat.actors.trainer import Trainer
from distplat.actors.training import saved_model
from distplat.actors.user_errors import error_of_process
from distplat.platform.apply_log import FILE_NAME, log_flaws, read_logs, staleness_counts
from distplat.platform.checkpoints import FOLDER
from distplat.platform.errors import (
    DeadlineExceeded,
    Problem,
    SpecError,
    StorageError,
    UserCodeError,
)
from distplat.platform.lr_schedules import (
    NamedSchedule,
    OneCycleLR,
    ReduceLROnPlateau,
    Schedule,
)
from distplat.platform.progress import UNBOUNDED
from distplat.platform.run_directory import TASK_FILE
from distplat.platform.run_record import read_run
from distplat.platform.shard_map import ShardPlan
from distplat.platform.spec import CheckpointConfig, Evaluation, Job, Scaling, StrategySpec
from distplat.platform.tensor_file import TASK_PREFIX
from distplat.platform.total_memory import check_whole_file
from distplat.strategies.catalog import load_job, make_strategy
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.loop.replay import replay
from distplat.strategies.loop.session import make_task, prepare
from distplat.strategies.pipeline.hybrid_options import HybridOptions
from distplat.strategies.strategy_spec import Roles
from distplat.strategies.verification.child import ANSWER, REQUEST, ChildRequest, ReferenceResult
from distplat.strategies.verification.recipes import Trained
from distplat.strategies.verification.switched import Switches, task_fields
from distplat.strategies.verification.verdicts import (
    NOT_COMPARED,
    REFUSED,
    EngineRun,
    Row,
    inexact_reason,
    judge,
    refused,
    watch_losses,
)

DEFAULT = ("ring", "ps-sync", "hybrid")
"""Strategies that are verified in addition to the job's own."""


@dataclass(frozen=True)
class VerifyRequest:
    """Arguments of `distplat verify`."""

    job: Job
    folder: Path
    """Folder of the task's module."""
    strategies: tuple[str, ...] = ()
    """Strategy names; empty: the job's own, and those of `DEFAULT` that support the job."""
    steps: int = 20
    workers: int = 2
    strategy_file: Path | None = None


def verify(request: VerifyRequest, on_progress: Callable[[str], object]) -> Iterator[Row]:
    """
    Verify a job, one strategy after the other.

    Args:
        request: job and options.
        on_progress: called with a line about each phase.

    Raises:
        SpecError: the job is invalid.
        UserCodeError: the task fails without distplat, too.
    """
    names = request.strategies or tuple(dict.fromkeys([request.job.strategy.name, *DEFAULT]))
    jobs = {name: job_for(request, name) for name in names}
    exact = {n: j for n, j in jobs.items() if isinstance(j, Job) and not inexact_reason(j)}
    with TemporaryDirectory(prefix="distplat-verify-") as temporary:
        folder = Path(temporary)
        runner = _TrainerEngine(request, folder)
        for line in _check_task(request):
            on_progress(line)
        on_progress("references: a plain loop")
        reference_error: UserCodeError | None = None
        references: dict[str, ReferenceResult] = {}
        try:
            references = dict(
                zip(exact, _references(request, [*exact.values()], folder), strict=True)
            )
        except UserCodeError as error:
            reference_error = error
        with _quiet_ray([job for job in jobs.values() if isinstance(job, Job)]):
            if reference_error is not None:
                for short in exact.values():
                    runner(short, Switches())  # fails as well, with a better message
                raise reference_error
            for name, job in jobs.items():
                on_progress(f"{name}: runs")
                yield from _rows(name, job, references.get(name), request, runner)


def _check_task(request: VerifyRequest) -> list[str]:
    """Check the task's class itself, because the runs use a subclass of it."""
    job = request.job
    if job.own_loop:
        text = "verify compares a task with plain loops; a train function is such a loop itself"
        raise SpecError(Problem(("task",), text))
    with task_check(job, str(request.folder), shown=False) as check:
        return check.result(job.failure.start_timeout_s)


@contextmanager
def _quiet_ray(jobs: Sequence[Job]) -> Iterator[None]:
    """Connect to a Ray that fits each of the jobs; keep stdout for the result."""
    largest = max(jobs, key=lambda job: job.scaling.num_workers, default=None)
    skipped = logging.getLogger(checkpointing.__name__)
    level = skipped.level
    skipped.setLevel(logging.ERROR)  # skipped checkpoints are expected here
    try:
        with (
            local_ray(largest.scaling, logs=False) if largest else nullcontext(),
            redirect_stdout(sys.stderr),
        ):
            yield
    finally:
        skipped.setLevel(level)


def _rows(
    name: str,
    job: Job | SpecError,
    reference: ReferenceResult | None,
    request: VerifyRequest,
    runner: _TrainerEngine,
) -> list[Row]:
    requested = name in (*request.strategies, request.job.strategy.name)
    if isinstance(reference, str) and not requested:
        return [Row(name, "run", NOT_COMPARED, reason=reference)]
    if isinstance(job, SpecError):
        rows = [refused(name, job)]
    elif reference is None or isinstance(reference, str):
        rows = watch_losses(job, inexact_reason(job) or str(reference), runner)
    else:
        rows = judge(job, reference, runner)
    rows += not_compared(name, request.job) if isinstance(job, Job) else []
    # A default strategy that refuses the job is not a failure.
    unasked = [row for row in rows if row.verdict == REFUSED and not requested]
    return [Row(name, "run", NOT_COMPARED, reason=row.reason) for row in unasked] or rows


def not_compared(name: str, job: Job) -> list[Row]:
    """Return rows for settings without effect in these runs, which are not evaluated."""
    if not isinstance(job.lr_schedule, ReduceLROnPlateau):
        return []
    why = "rates go by evaluations, which these runs leave out: none is reduced"
    return [Row(name, "lr_schedule", NOT_COMPARED, reason=why)]


def _without_evaluations(job: Job) -> dict[str, Any]:
    """Return the fields that turn off evaluations, and everything that depends on evaluations."""
    schedule: NamedSchedule = job.lr_schedule
    if isinstance(schedule, ReduceLROnPlateau):
        schedule = Schedule(warmup_steps=schedule.warmup_steps)  # equal before the first evaluation
    if isinstance(schedule, OneCycleLR):
        schedule = schedule.model_copy(
            update={"total_steps": None}
        )  # covers the few steps of this run
    return {"evaluation": Evaluation(every_epochs=0), "early_stop": None, "lr_schedule": schedule}


def job_for(request: VerifyRequest, name: str) -> Job | SpecError:
    """Return the short job of a strategy, or why the strategy refuses the job."""
    job, own = request.job, request.job.strategy.name == name
    spec = job.strategy if own else StrategySpec(name=name)
    workers, accumulation = request.workers, job.gradient_accumulation
    if name == "hybrid" and own:
        workers = HybridOptions.model_validate(spec.options).grid.world
    elif name == "hybrid":
        cut = {"pipeline": 2, "cut": "even"}
        if accumulation > 1:
            cut["micro_batches"] = accumulation
        spec, workers, accumulation = StrategySpec(name=name, options=cut), 2, 1
    short = job.model_copy(
        update={
            "strategy": spec,
            "scaling": Scaling(num_workers=workers),
            "gradient_accumulation": accumulation,
            "storage_path": "runs",
            "steps": request.steps,
            "epochs": None,
            "max_time_s": None,
            "checkpoint": CheckpointConfig(every_steps=1, num_to_keep=request.steps + 1),
            **_without_evaluations(job),
            "failure": job.failure.model_copy(update={"max_failures": 0, "max_preemptions": 0}),
        }
    )
    try:
        if problems := short.problems():
            raise SpecError(*problems)
        plain = short.model_copy(update={"checkpoint": CheckpointConfig()})
        strategy = make_strategy(plain)
    except SpecError as error:
        return error
    stepwise = strategy.has_checkpoints and not strategy.roles(short).consistency.asynchronous
    return short if stepwise else plain


class _TrainerEngine:
    """Runs jobs of the user's task; implements `Engine`."""

    def __init__(self, request: VerifyRequest, folder: Path) -> None:
        self._request, self._folder = request, folder

    def __call__(self, job: Job, switches: Switches) -> EngineRun:
        fields = task_fields(job.task or "", job.task_args, switches)
        trainer = Trainer(
            job.model_copy(update=fields),
            working_dir=self._request.folder,
            storage_dir=self._folder,
            strategy_file=self._request.strategy_file,
            progress=False,
        )
        result = trainer.fit()
        try:
            return EngineRun(_trained(result), result.history[-1].figures)
        finally:
            shutil.rmtree(result.path, ignore_errors=True)


def _trained(result: Result) -> Trained:
    assert result.checkpoint is not None, "save_final is on"
    folders = (result.path / FOLDER).glob("step-*")
    states = {int(at.name[5:]): load_file(at / "model.safetensors") for at in folders}
    task_file = result.checkpoint.with_name(TASK_FILE)
    own = load_file(task_file) if task_file.exists() else {}
    task = {TASK_PREFIX + name: value for name, value in own.items()}
    states[len(result.history)] = {**load_file(result.checkpoint), **task}
    history = sorted(result.history, key=lambda step: step.step)
    return Trained(states, [step.loss for step in history])


def _references(
    verify_request: VerifyRequest, jobs: Sequence[Job], folder: Path
) -> list[ReferenceResult]:
    """
    Compute the references of jobs in a child process.

    Raises:
        UserCodeError: the child failed; has its traceback.
        DeadlineExceeded: the child took too long.
    """
    if not jobs:
        return []
    job, strategy_file = verify_request.job, verify_request.strategy_file
    file = str(strategy_file.resolve()) if strategy_file is not None else None
    fields = [short.model_dump(mode="json") for short in jobs]
    request = ChildRequest(fields, job.task or "", job.task_args, str(verify_request.folder), file)
    (folder / REQUEST).write_text(json.dumps(asdict(request)))
    home = str(Path(distplat.__file__).parent.parent.absolute())
    paths = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    limit = job.failure.start_timeout_s + 10 * verify_request.steps * job.failure.step_timeout_s
    try:
        process = subprocess.run(
            [sys.executable, "-m", "distplat.strategies.verification.child", str(folder)],
            cwd=verify_request.folder,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", NAME: chosen()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(
            "the references", ("their process",), limit, "step_timeout_s"
        ) from None
    if process.returncode:
        raise error_of_process(process.stderr)
    results: list[ReferenceResult] = torch.load(folder / ANSWER, weights_only=False)
    return results


@dataclass(frozen=True)
class Replayed:
    """Result of a replay."""

    run: str
    updates: int
    """Number of updates of each shard."""
    shards: int
    staleness: list[Counter[int]]
    """By rank: number of gradients per staleness, over all shards."""
    differing: str | None
    """First tensor that is not bit-equal to the run's model; None: all tensors are."""
    difference: float
    """Maximum absolute difference of an element."""


def _check_replayable(job: Job, roles: Roles, log: Path) -> None:
    if not roles.consistency.asynchronous:
        text = f"only asynchronous runs have a log; run `{job.strategy.name}` again instead"
        raise SpecError(Problem(("strategy",), text))
    if job.embeddings is not None:
        text = "the log does not say in which order embedding tables were updated"
        raise SpecError(Problem(("embeddings",), text))
    if job.task is None:
        raise SpecError(Problem(("task",), "the run was given a class in Python, not by name"))
    if not log.exists():
        text = "a run that failed, or that was resumed from a checkpoint, keeps no log"
        raise StorageError(f"there is no {log}: {text}")


def replay_run(directory: Path, working_dir: Path) -> Replayed:
    """
    Repeat a run in this process, with the updates in logged order.

    Args:
        directory: the run directory.
        working_dir: folder of the task's module.

    Raises:
        SpecError: the run was not asynchronous, has embedding tables, or has no named task.
        StorageError: files of the run are missing, damaged or inconsistent.
        UserCodeError: the task cannot be loaded.
    """
    job = load_job(directory / "job.yaml")
    roles = make_strategy(job).roles(job)
    _check_replayable(job, roles, directory / FILE_NAME)
    logs, facts = read_logs(str(directory / FILE_NAME))

    def prepare_rank() -> Prepared:
        device = "cuda" if job.scaling.use_gpu else "cpu"
        task = make_task(job, lambda: load_task_class(job.task or "", str(working_dir)))
        return prepare(job, task, device)

    first = prepare_rank()
    world, steps = job.scaling.world, first.total_steps
    logged_steps, result = steps, read_run(directory, steps=False).result or {}
    if logs and (steps == UNBOUNDED or "stopped" in result):
        logged_steps = -(-len(logs[0]) // world)  # all tasks of a started step were applied
    flaws = [flaw for log in logs for flaw in log_flaws(log, world, logged_steps)]
    if flaws or len(logs) != roles.servers:
        raise StorageError(f"{directory / FILE_NAME}: {(flaws or ['shards are missing'])[0]}")
    plan = ShardPlan(first.job, "replay", 0, world, steps, len(logs), roles.consistency)
    threads = torch.get_num_threads()  # a run in the driver's process does not change it
    if job.scaling.num_workers:
        threads = max(1, int(job.scaling.resources()["CPU"]))
    model = replay(plan, logs, prepare_rank, threads)
    name, difference = _compare(
        load(saved_model(model.state_dict())), directory / "model.safetensors"
    )
    counts = staleness_counts(logs, world)
    return Replayed(facts.get("run", ""), len(logs[0]), len(logs), counts, name, difference)


def _compare(tensors: dict[str, Tensor], path: Path) -> tuple[str | None, float]:
    check_whole_file(path)
    try:
        expected = load_file(path)
    except Exception as error:  # SafetensorError or OSError
        raise StorageError(f"cannot read {path}: {error}") from None
    if tensors.keys() != expected.keys():
        raise StorageError(f"{path} is not of this job: it has other tensors")
    differing, largest = None, 0.0
    for name, tensor in expected.items():
        if not torch.equal(_bits(tensor), _bits(tensors[name])):
            differing = differing or name
            gap = (tensor.double() - tensors[name].double()).abs()
            largest = max(largest, float(gap.max()))
    return differing, largest


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
