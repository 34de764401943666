"""Verdicts on one strategy: rows that compare engine runs with their references."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from distplat.platform.errors import DistplatError, SpecError
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy
from distplat.strategies.verification.compare import Comparison, compare, final_state
from distplat.strategies.verification.recipes import Trained
from distplat.strategies.verification.references import (
    MEANING_TOLERANCE,
    References,
    WholeBatch,
    meaning_job,
)
from distplat.strategies.verification.switched import Switches
from distplat.strategies.worker_strategy import WorkerStrategy, worker_class

EQUAL, DIFFERS, MEANING = "equal", "DIFFERS", "differs by meaning"
NOT_COMPARED, REFUSED, FAILED = "not compared", "refused", "failed"


@dataclass(frozen=True)
class Row:
    """One check of one strategy."""

    strategy: str
    check: str
    """`plain loop` (the same parts), `whole batch`, `repeat`, or a check that is not compared."""
    verdict: str
    failed: bool = False
    difference: float | None = None
    floor: float | None = None
    name: str = ""
    """The first tensor that diverges; `(loss)`: the loss."""
    step: int = 0
    """Step of `name`, from 1."""
    reason: str = ""
    error: DistplatError | None = field(default=None, compare=False)
    """Error of a run that was refused or failed."""


@dataclass
class EngineRun:
    """A run of the engine."""

    trained: Trained
    figures: dict[str, float] = field(default_factory=dict)
    """Figures of the last step."""


Engine = Callable[[Job, Switches], EngineRun]
"""Trains a job with the given switches of its task."""


def inexact_reason(job: Job) -> str:
    """Return why a job's runs need not equal a plain loop; empty: they must."""
    strategy, options = make_strategy(job), job.strategy.options
    roles, worker_cls = strategy.roles(job), worker_class(strategy)
    if roles.consistency.asynchronous:
        return "asynchronous"
    if roles.consistency.backup_workers:
        return "drops late gradients (backup_workers)"
    may_differ = worker_cls.synchronize is not WorkerStrategy.synchronize
    if may_differ and not worker_cls.__module__.startswith("distplat."):
        return "its ranks differ between steps"
    for option, exact in (("compression", "none"), ("wire", "exact")):
        if options.get(option, exact) != exact:
            return f"rounds exchanged data ({option}: {options[option]})"
    return ""


def judge(job: Job, references: References, engine: Engine) -> list[Row]:
    """
    Run a job several times and compare the runs with its references.

    Args:
        job: with `steps` set.
        references: of the job.
        engine: runs the job.
    """
    name = job.strategy.name
    if job.checkpoint.enabled:
        checkpoint = job.checkpoint.model_copy(update={"every_steps": references.every})
        job = job.model_copy(update={"checkpoint": checkpoint})
    try:
        run = engine(job, references.switches)
        comparison = compare(
            run.trained, references.plain, references.reversed_, references.trainable
        )
        rows = [_row(name, "plain loop", comparison)]
        rows.append(_repeat(name, run.trained, engine(job, references.switches).trained))
        if references.whole is not None:
            run = engine(meaning_job(job), references.whole.switches)
            rows.append(_meaning(name, run, references.whole, references.trainable))
    except DistplatError as error:
        return [refused(name, error)]
    rows += [Row(name, check, NOT_COMPARED, reason=why) for check, why in references.notes]
    return rows


def watch_losses(job: Job, why: str, engine: Engine) -> list[Row]:
    """Run a job that need not equal a plain loop, and report its loss curve."""
    name = job.strategy.name
    try:
        run = engine(job, Switches())
    except DistplatError as error:
        return [refused(name, error)]
    losses = run.trained.losses
    text = f"{why}; loss {losses[0]:.4g} -> {losses[-1]:.4g}"
    if "staleness_mean" in run.figures:
        text += f", staleness {run.figures['staleness_mean']:.2g} steps on average"
    return [Row(name, "loss curve", NOT_COMPARED, reason=text)]


def refused(name: str, error: DistplatError) -> Row:
    """Return the row of a run that was refused or failed."""
    lines = [line.strip() for line in str(error).splitlines()]
    message = [line for line in lines if line and not line.startswith("hint:")][-1]
    verdict = REFUSED if isinstance(error, SpecError) else FAILED
    return Row(name, "run", verdict, failed=True, reason=message, error=error)


def _meaning(name: str, run: EngineRun, whole: WholeBatch, trainable: list[str]) -> Row:
    least = MEANING_TOLERANCE if whole.switches.double else 0.0
    comparison = compare(run.trained, whole.union, whole.reversed_, trainable, least)
    row = _row(name, "whole batch", comparison)
    if comparison.diverges and whole.differs:
        return replace(row, verdict=MEANING, reason=whole.differs)
    return row


def _row(name: str, check: str, comparison: Comparison) -> Row:
    diverges = comparison.diverges
    numbers = comparison.difference, comparison.floor
    where = (comparison.name, comparison.step) if diverges else ("", 0)
    verdict = DIFFERS if diverges else EQUAL
    return Row(name, check, verdict, diverges, *numbers, *where, comparison.reason)


def _repeat(name: str, first: Trained, second: Trained) -> Row:
    is_same = digest(first) == digest(second)
    why = "" if is_same else "random numbers that the seed does not control, or a varying order"
    return Row(name, "repeat", EQUAL if is_same else DIFFERS, not is_same, reason=why)


def digest(trained: Trained) -> str:
    """Return the hash of a trained model."""
    sha = hashlib.sha256()
    for name, value in sorted(final_state(trained).items()):
        sha.update(name.encode())
        sha.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
