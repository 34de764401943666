"""
The references of one strategy's runs: the same parts one after the other, and the whole batch.

What cannot be compared with the whole batch is found here too, by plain torch alone: a loss or a
model that gives something else for parts of a batch than for all of it.
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
"""Steps that are compared with the whole batch."""
MEANING_TOLERANCE = 1e-9
"""In float64, relative to a tensor's largest element, or absolute where that is below 1."""

_ROOM_BYTES = 1 << 29
"""For the states of one training."""

MakeSwitched = Callable[[Switches], Task]
"""Makes the task anew, with such switches."""


@dataclass
class WholeBatch:
    """The whole batch."""

    switches: Switches
    """With which it was computed."""
    union: Trained
    reversed_: Trained
    differs: str = ""
    """Why parts of a batch do not come to the whole; empty: they do."""
    drawn: bool = False
    """Whether forwards draw random numbers all the same."""


@dataclass
class References:
    """What the runs of one strategy are compared with."""

    switches: Switches
    """With which the same parts were computed."""
    plain: Trained
    reversed_: Trained
    trainable: list[str]
    every: int
    """States are those after so many steps, and after the last."""
    whole: WholeBatch | None = None
    """The whole batch; None: it cannot be computed."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """What is not compared: what, and why."""


def references(job: Job, make: MakeSwitched) -> References:
    """
    Compute the references of a job.

    Args:
        job: names the strategy; its field `steps` is set.
        make: makes the task.
    """
    if job.embeddings is not None:
        without = make
        make = lambda switches: with_rows(without(switches), job.seed)  # noqa: E731
    first = Rank(lambda: make(Switches()), job.seed)
    data = first.task.train_data()
    samples = _samples_of(first.task, data, job.seed)
    norms = [module for module in first.model.modules() if isinstance(module, _BatchNorm)]
    merged = any(isinstance(module, nn.SyncBatchNorm) for module in norms)
    every = _every(first, job)
    switches, recipe = Switches(), recipe_of(job, first.task, every)
    schedule, asked = split_batches(job, samples, merged=merged), calls()
    plain = train(lambda: make(switches), schedule, recipe)
    if calls() > asked and not merged:  # a loss gathers what all ranks have
        merged = True
        schedule = split_batches(job, samples, merged=True)
        plain = train(lambda: make(switches), schedule, recipe)
    whole = merged or isinstance(make_strategy(job), Hybrid)
    if plain.draws and whole:  # dropout is drawn in another way there
        switches = Switches(dropout=False)
        plain = train(lambda: make(switches), schedule, recipe)
    reversed_ = train(lambda: make(switches), schedule, recipe, reverse=True)
    trainable = [name for name, p in first.named().items() if p.requires_grad]
    found = References(
        switches, plain, reversed_, sorted({*trainable, *set().union(*plain.used)}), every
    )
    if norms and not merged:
        text = "each worker normalises by its own samples; compared with it frozen"
        found.notes.append(("batch norm", text))
    if switches != Switches():
        found.notes.append(("dropout", "drawn in another way here; compared without it"))
    short = meaning_job(job)
    _add_whole(found, short, recipe_of(short, first.task, every), make, samples, merged)
    if found.whole is not None and found.whole.drawn:
        found.whole = None
        text = "forward draws random numbers, with dropout off too"
        found.notes.append(("whole batch", text))
    return found


def _samples_of(task: Task, data: Any, seed: int) -> ReferenceSamples:
    if is_stream(data):
        size = length_of(data)
        return ReferenceSamples(ENDLESS if size is None else size, stream=True)
    order = order_of(task, data, seed)
    return ReferenceSamples(len(data) if order is None else order.size, order)


def _every(rank: Rank, job: Job) -> int:
    """Say after how many steps a state is kept, so that there is room for all of them."""
    size = sum(value.nbytes for value in rank.snapshot().values())
    return max(1, math.ceil((job.steps or 0) * size / _ROOM_BYTES))


def meaning_job(job: Job) -> Job:
    """Give the job whose run is compared with the whole batch."""
    return job.model_copy(update={"steps": MEANING_STEPS, "precision": "fp32"})


def _add_whole(
    references: References,
    job: Job,
    recipe: Recipe,
    make: MakeSwitched,
    every: ReferenceSamples,
    merged: bool,
) -> None:
    """Compute the whole batch: in float64 and with a last batch of one sample, if that works."""
    batch = job.global_batch_size
    ragged = None
    own = every.order is not None or every.stream
    if every.size > batch and not job.data.drop_last and not merged and not own:
        ragged = min(2, (every.size - 1) // batch) * batch + 1
    for double in (True, False) if job.embeddings is None else (False,):  # rows are float32
        for samples in dict.fromkeys((ragged, None)):
            switches = Switches(double, dropout=False, frozen_norm=True, samples=samples)
            with contextlib.suppress(Exception):
                whole = _whole(references, job, recipe, make, switches, every, merged)
                if not whole.differs or samples is None:
                    references.whole = whole
                    return
    references.notes.append(("whole batch", "the task cannot be computed on one"))


def _whole(
    references: References,
    job: Job,
    recipe: Recipe,
    make: MakeSwitched,
    switches: Switches,
    every: ReferenceSamples,
    merged: bool,
) -> WholeBatch:
    samples = every if switches.samples is None else ReferenceSamples(switches.samples)
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
    "the loss of a batch is not the mean of its parts' losses. Where it is a mean over something "
    "else than samples, return (sum, weight); where samples look at each other (in-batch "
    "negatives), gather those of all workers with distplat.all_gather(), without accumulation"
)
_MODEL = (
    "the model gives a sample another output when the batch is cut: it looks over the batch, or "
    "counts its calls"
)


def _recorded(make: MakeSwitched, switches: Switches, into: list[Tensor]) -> Callable[[], Task]:
    """Have a task keep what its model gives of each batch."""

    def note(*given: Any) -> None:
        if not into[-1].numel():  # the first call in this batch
            into[-1] = _first_tensor(given[2]).detach()

    def made() -> Task:
        task: Any = make(switches)
        model, collate = task.model, task.collate

        def watched() -> nn.Module:
            built: nn.Module = model()
            built.register_forward_hook(note)
            return built

        def begun(samples: list[Any]) -> Any:
            into.append(torch.zeros(0))
            return collate(samples)

        task.model, task.collate = watched, begun
        return task  # type: ignore[no-any-return]

    return made


def _first_tensor(tree: Any) -> Tensor:
    """Give the first tensor by sample: a model may give its loss, too."""
    own = getattr(tree, "__dict__", None)  # outputs may be an object of any class
    return next((one for one in tensors_in((tree, own)) if one.ndim), torch.zeros(0))


def _same(whole: Tensor, split: list[Tensor]) -> bool:
    """Say whether outputs of parts, put together, are those of the whole batch."""
    together = torch.cat([value.flatten() for value in split])
    expected = whole.flatten()
    return together.shape == expected.shape and torch.allclose(together, expected, 1e-6, 1e-9)
