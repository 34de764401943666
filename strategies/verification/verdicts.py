"""What is said of one strategy: runs of the engine against their references, row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from distplat.platform.errors import DistplatError, SpecError
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy
from distplat.strategies.verification.compare import Comparison, compare, last
from distplat.strategies.verification.recipes import Trained
from distplat.strategies.verification.references import (
    MEANING_TOLERANCE,
    References,
    WholeBatch,
    meaning_job,
)
from distplat.strategies.verification.switched import Switches
from distplat.strategies.worker_strategy import WorkerStrategy, worker_class

EQUAL, PARTS, MEANING = "equal", "PARTS", "differs by meaning"
NOT_COMPARED, REFUSED, FAILED = "not compared", "refused", "failed"


@dataclass(frozen=True)
class Row:
    """One check of one strategy."""

    strategy: str
    check: str
    """`plain loop` (the same parts), `whole batch`, `repeat`, or what is not compared."""
    verdict: str
    failed: bool = False
    difference: float | None = None
    floor: float | None = None
    name: str = ""
    """The first tensor that parts; `(loss)`: the loss."""
    step: int = 0
    """In which step, from 1."""
    reason: str = ""
    error: DistplatError | None = field(default=None, compare=False)
    """Why a run was refused."""


@dataclass
class EngineRun:
    """A run of the engine."""

    trained: Trained
    figures: dict[str, float] = field(default_factory=dict)
    """The last step's."""


Engine = Callable[[Job, Switches], EngineRun]
"""Trains a job with such switches in its task."""


def inexact_reason(job: Job) -> str:
    """Say why a job's runs are not to equal a plain loop; empty: they are."""
    strategy, options = make_strategy(job), job.strategy.options
    roles, kind = strategy.roles(job), worker_class(strategy)
    if roles.consistency.asynchronous:
        return "asynchronous"
    if roles.consistency.backup_workers:
        return "leaves late gradients out (backup_workers)"
    apart = kind.synchronize is not WorkerStrategy.synchronize
    if apart and not kind.__module__.startswith("distplat."):
        return "its ranks differ between steps"
    for option, exact in (("compression", "none"), ("wire", "exact")):
        if options.get(option, exact) != exact:
            return f"rounds what travels ({option}: {options[option]})"
    return ""


def judge(job: Job, known: References, engine: Engine) -> list[Row]:
    """
    Run a job as often as needed, and compare.

    Args:
        job: its field `steps` is set.
        known: its references.
        engine: runs it.
    """
    name = job.strategy.name
    if job.checkpoint.enabled:
        kept = job.checkpoint.model_copy(update={"every_steps": known.every})
        job = job.model_copy(update={"checkpoint": kept})
    try:
        run = engine(job, known.switches)
        comparison = compare(run.trained, known.plain, known.reversed_, known.trainable)
        rows = [_row(name, "plain loop", comparison)]
        rows.append(_repeat(name, run.trained, engine(job, known.switches).trained))
        if known.whole is not None:
            run = engine(meaning_job(job), known.whole.switches)
            rows.append(_meaning(name, run, known.whole, known.trainable))
    except DistplatError as error:
        return [refused(name, error)]
    rows += [Row(name, what, NOT_COMPARED, reason=why) for what, why in known.notes]
    return rows


def watch_losses(job: Job, why: str, engine: Engine) -> list[Row]:
    """Run a job that equals no plain loop, and tell what its loss did."""
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
    """Say that a run was refused, or ended before its time."""
    lines = [line.strip() for line in str(error).splitlines()]
    last = [line for line in lines if line and not line.startswith("hint:")][-1]
    verdict = REFUSED if isinstance(error, SpecError) else FAILED
    return Row(name, "run", verdict, failed=True, reason=last, error=error)


def _meaning(name: str, run: EngineRun, whole: WholeBatch, trainable: list[str]) -> Row:
    least = MEANING_TOLERANCE if whole.switches.double else 0.0
    comparison = compare(run.trained, whole.union, whole.reversed_, trainable, least)
    row = _row(name, "whole batch", comparison)
    if comparison.diverges and whole.differs:
        return replace(row, verdict=MEANING, reason=whole.differs)
    return row


def _row(name: str, check: str, met: Comparison) -> Row:
    verdict = PARTS if met.diverges else EQUAL
    numbers = met.difference, met.floor
    where = (met.name, met.step) if met.diverges else ("", 0)
    return Row(name, check, verdict, met.diverges, *numbers, *where, met.reason)


def _repeat(name: str, first: Trained, second: Trained) -> Row:
    same = digest(first) == digest(second)
    why = "" if same else "random numbers that the seed does not reach, or an order that changes"
    return Row(name, "repeat", EQUAL if same else PARTS, not same, reason=why)


def digest(trained: Trained) -> str:
    """Give the hash of a trained model."""
    sha = hashlib.sha256()
    for name, value in sorted(last(trained).items()):
        sha.update(name.encode())
        sha.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
