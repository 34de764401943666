"""
The references of one strategy's runs: the same parts of each batch, and the whole batch.

Plain torch loops also detect tasks that cannot be compared with the whole batch: a loss or a model
whose result for parts of a batch differs from that for the whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distplat.platform.sampler import ENDLESS
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy
from distplat.strategies.hybrid import Hybrid
from distplat.strategies.loop.containers import tensors_in
from distplat.strategies.loop.gathering import calls
from distplat.strategies.loop.streams import is_stream, length_of
from distplat.strategies.loop.task_settings import order_of
from distplat.strategies.task import Task
from distplat.strategies.verification.compare import compare, is_finite
from distplat.strategies.verification.recipes import (
    Recipe,
    ReferenceSamples,
    Trained,
    recipe_of,
    split_batches,
    whole_batches,
    with_rows,
)
from distplat.strategies.verification.reference import Rank, train
from distplat.strategies.verification.switched import Switches

MEANING_STEPS = 6
"""Steps of the comparison with the whole batch."""
MEANING_TOLERANCE = 1e-9
"""In float64, relative to a tensor's largest element, or absolute if that is below 1."""

_ROOM_BYTES = 1 << 29
"""Memory for the recorded states of one training."""

MakeSwitched = Callable[[Switches], Task]
"""Builds a new task with the given switches."""


@dataclass
class WholeBatch:
    """Reference trained on whole batches."""

    switches: Switches
    """Switches of the task."""
    union: Trained
    reversed_: Trained
    differs: str = ""
    """Why the parts of a batch do not add up to the whole; empty: they do."""
    drawn: bool = False
    """Whether forwards draw random numbers despite the switches."""


@dataclass
class References:
    """References for the runs of one strategy."""

    switches: Switches
    """Switches of the task for `plain` and `reversed_`."""
    plain: Trained
    reversed_: Trained
    trainable: list[str]
    every: int
    """Steps between recorded states; the last step is always recorded."""
    whole: WholeBatch | None = None
    """Reference on whole batches; None: it cannot be computed."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Checks that are not compared, and why."""


def references(job: Job, make: MakeSwitched) -> References:
    """
    Compute the references of a job.

    Args:
        job: names the strategy; with `steps` set.
        make: builds the task.
    """
    if job.embeddings is not None:
        make_task = make
        make = lambda switches: with_rows(make_task(switches), job.seed)  # noqa: E731
    first = Rank(lambda: make(Switches()), job.seed)
    data = first.task.train_data()
    samples = _samples_of(first.task, data, job.seed)
    norms = [module for module in first.model.modules() if isinstance(module, _BatchNorm)]
    merged = any(isinstance(module, nn.SyncBatchNorm) for module in norms)
    every = _every(first, job)
    switches, recipe = Switches(), recipe_of(job, first.task, every)
    schedule, calls_before = split_batches(job, samples, merged=merged), calls()
    plain = train(lambda: make(switches), schedule, recipe)
    if calls() > calls_before and not merged:  # the loss calls `all_gather`
        merged = True
        schedule = split_batches(job, samples, merged=True)
        plain = train(lambda: make(switches), schedule, recipe)
    whole = merged or isinstance(make_strategy(job), Hybrid)
    if plain.draws and whole:  # these runs draw dropout in another order
        switches = Switches(dropout=False)
        plain = train(lambda: make(switches), schedule, recipe)
    reversed_ = train(lambda: make(switches), schedule, recipe, reverse=True)
    trainable = [name for name, p in first.named().items() if p.requires_grad]
    result = References(
        switches, plain, reversed_, sorted({*trainable, *set().union(*plain.used)}), every
    )
    if norms and not merged:
        text = "each worker normalises by its own samples; compared with frozen statistics"
        result.notes.append(("batch norm", text))
    if switches != Switches():
        result.notes.append(
            ("dropout", "drawn in a different order here; compared without dropout")
        )
    short = meaning_job(job)
    _add_whole(result, short, recipe_of(short, first.task, every), make, samples, merged)
    if result.whole is not None and result.whole.drawn:
        result.whole = None
        text = "forward draws random numbers even without dropout"
        result.notes.append(("whole batch", text))
    return result


def _samples_of(task: Task, data: Any, seed: int) -> ReferenceSamples:
    if is_stream(data):
        size = length_of(data)
        return ReferenceSamples(ENDLESS if size is None else size, stream=True)
    order = order_of(task, data, seed)
    return ReferenceSamples(len(data) if order is None else order.size, order)


def _every(rank: Rank, job: Job) -> int:
    """Return the steps between recorded states that fit all of them into memory."""
    size = sum(value.nbytes for value in rank.snapshot().values())
    return max(1, math.ceil((job.steps or 0) * size / _ROOM_BYTES))


def meaning_job(job: Job) -> Job:
    """Return the job whose run is compared with the whole batch."""
    return job.model_copy(update={"steps": MEANING_STEPS, "precision": "fp32"})


def _add_whole(
    references: References,
    job: Job,
    recipe: Recipe,
    make: MakeSwitched,
    samples: ReferenceSamples,
    merged: bool,
) -> None:
    """Train on whole batches: in float64 and with a last batch of one sample, if possible."""
    batch = job.global_batch_size
    ragged = None
    has_own_order = samples.order is not None or samples.stream
    if samples.size > batch and not job.data.drop_last and not merged and not has_own_order:
        ragged = min(2, (samples.size - 1) // batch) * batch + 1
    for double in (True, False) if job.embeddings is None else (False,):  # rows are float32
        for limit in dict.fromkeys((ragged, None)):
            switches = Switches(double, dropout=False, frozen_norm=True, samples=limit)
            with contextlib.suppress(Exception):
                whole = _train_whole(references, job, recipe, make, switches, samples, merged)
                if not whole.differs or limit is None:
                    references.whole = whole
                    return
    references.notes.append(("whole batch", "the task cannot be computed on whole batches"))


def _train_whole(
    references: References,
    job: Job,
    recipe: Recipe,
    make: MakeSwitched,
    switches: Switches,
    samples: ReferenceSamples,
    merged: bool,
) -> WholeBatch:
    if switches.samples is not None:
        samples = ReferenceSamples(switches.samples)
    schedule = split_batches(job, samples, merged=merged)
    outputs: list[list[Tensor]] = [[], []]
    whole = train(_recorded(make, switches, outputs[0]), whole_batches(job, samples), recipe)
    split = train(_recorded(make, switches, outputs[1]), schedule, recipe)
    backwards = train(lambda: make(switches), whole_batches(job, samples), recipe, reverse=True)
    if whole.draws:
        return WholeBatch(switches, whole, backwards, drawn=True)
    least = MEANING_TOLERANCE if switches.double else 0.0
    comparison = compare(split, whole, backwards, references.trainable, least)
    if not comparison.diverges or not is_finite(whole):
        return WholeBatch(switches, whole, backwards)
    before = [sum(map(len, ranks)) for ranks in schedule[: comparison.step]]
    split_outputs = outputs[1][sum(before[:-1]) : sum(before)]
    same = _same(outputs[0][comparison.step - 1], split_outputs)
    return WholeBatch(switches, whole, backwards, _LOSS if same else _MODEL)


_LOSS = (
    "the loss of a batch is not the mean of its parts' losses. If it is a mean over something "
    "other than samples, return (sum, weight); if it compares samples with each other (in-batch "
    "negatives), gather those of all workers with distplat.all_gather(), without accumulation"
)
_MODEL = (
    "the model's output for a sample changes when the batch is split: it depends on the rest of "
    "the batch, or on the number of calls"
)


def _recorded(make: MakeSwitched, switches: Switches, into: list[Tensor]) -> Callable[[], Task]:
    """Patch a task to record its model's output for each batch."""

    def record(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if not into[-1].numel():  # the first call in this batch
            into[-1] = _first_tensor(outputs).detach()

    def make_recorded() -> Task:
        task: Any = make(switches)
        model, collate = task.model, task.collate

        def recorded_model() -> nn.Module:
            built: nn.Module = model()
            built.register_forward_hook(record)
            return built

        def recorded_collate(samples: list[Any]) -> Any:
            into.append(torch.zeros(0))
            return collate(samples)

        task.model, task.collate = recorded_model, recorded_collate
        return task  # type: ignore[no-any-return]

    return make_recorded


def _first_tensor(tree: Any) -> Tensor:
    """Return the first tensor that is not a scalar: outputs may include the loss."""
    attributes = getattr(tree, "__dict__", None)  # outputs may be an object of any class
    tensors = tensors_in((tree, attributes))
    return next((tensor for tensor in tensors if tensor.ndim), torch.zeros(0))


def _same(whole: Tensor, split: list[Tensor]) -> bool:
    """Return whether the concatenated outputs of parts are those of the whole batch."""
    outputs = torch.cat([value.flatten() for value in split])
    expected = whole.flatten()
    return outputs.shape == expected.shape and torch.allclose(outputs, expected, 1e-6, 1e-9)
