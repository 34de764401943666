"""Warnings of what is no error in a model or a job and probably not meant; rank 0 logs them."""

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from distplat.platform.optimizers import Muon
from distplat.platform.progress import UNBOUNDED
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.loop.checks import quoted
from distplat.strategies.loop.loaders import held_generators
from distplat.strategies.loop.sample_hash import hash_of
from distplat.strategies.loop.seeding import preserve_rng_state, seed_sample
from distplat.strategies.loop.streams import StreamSamples
from distplat.strategies.model.module_hooks import hooks_warning
from distplat.strategies.sparse.modules import dense_parameters

_STEPS, _FACTOR = "total_steps", "lr_factor"
"""Facts of a checkpoint, see `schedule_facts`."""
_SMALL = 0.1
"""Below it the largest factor of a task's `lr` is more probably a rate."""


def size_warning(job: Job, sampler: Sampler) -> str:
    """Say what a job asks for that its data is too small for; empty: nothing."""
    if sampler.size < sampler.world:
        idle = sampler.world - sampler.size
        return (
            f"the training data has {sampler.size} samples for {sampler.world} parts of a batch: "
            f"{idle} of them are empty in every step"
        )
    if sampler.size < job.global_batch_size:
        return (
            f"the training data has {sampler.size} samples, fewer than global_batch_size "
            f"{job.global_batch_size}: every step is made of all of them"
        )
    return ""


def factors_warning(job: Job) -> str:
    """Say that a task's `lr` seems to give rates instead of factors; empty: it does not."""
    own = job.task_schedule
    most = max(own.factors, default=1.0) if own is not None else 1.0
    if most >= _SMALL:
        return ""
    return (
        f"lr() gives factors of the optimizer's lr, and the largest is {most:g}: no rate is above "
        f"{most:g} x {max(job.optimizer.rates()):g}"
    )


def schedule_facts(job: Job, step: int, steps: int) -> dict[str, float]:
    """
    Give facts of a checkpoint by which a longer run sees that it has another learning rate.

    Args:
        job: the run, with what the task's `lr` gave.
        step: of the checkpoint.
        steps: of the run.
    """
    if job.plateau is not None:
        return {_STEPS: steps}
    return {_STEPS: steps, _FACTOR: job.lr_schedule.rate(1.0, step - 1, steps)}


def length_warning(job: Job, steps: int, state: Mapping[str, Any]) -> str:
    """
    Say that a resumed run does not go on along the curve of its learning rate; empty: it does.

    Args:
        job: the run, with what the task's `lr` gave.
        steps: of the run.
        state: what the checkpoint's `state.json` holds.
    """
    step, had, factor = state["step"], state.get(_STEPS, steps), state.get(_FACTOR)
    if had == steps or factor is None or job.plateau is not None:
        return ""
    now = job.lr_schedule.rate(1.0, step - 1, steps)
    if math.isclose(now, factor, rel_tol=1e-6, abs_tol=1e-12):
        return ""
    own_rate = job.lr_schedule.rate(2.0, step - 1, steps) == now  # in place of each `lr`
    is_rate = "a rate of" if own_rate else "lr x"
    length, old = [f"{n} steps" if n < UNBOUNDED else "no number of steps" for n in (steps, had)]
    return (
        f"the learning rate follows the length of the run: that of the checkpoint had {old}, "
        f"and {is_rate} {factor:.4g} in its step {step}; in this one, of {length}, that step "
        f"would have had {is_rate} {now:.4g}, and it goes on from there. To have no break, set the "
        "length from the beginning, or a schedule that depends on it in its last steps alone (wsd)"
    )


def parts_warning(job: Job, model: nn.Module) -> str:
    """Say that a parameter's hook sees parts of a batch; empty: none does."""
    if job.scaling.world == 1 and job.gradient_accumulation == 1:
        return ""
    part = "each worker's part of the batch, or of a micro-batch, before they are added up"
    warning = hooks_warning(model, part)
    return f"{warning}. `clip_norm` is of the whole" if warning else ""


def modes_warning(model: nn.Module) -> str:
    """Say which parts of a model a step puts in training mode that had been taken out of it."""
    still = [(name, one) for name, one in model.named_modules() if not one.training]
    if not model.training:  # all of it, as Hugging Face's from_pretrained() gives a model
        return ""
    model.train()
    changed = [name for name, one in still if one.training]
    for _, one in still:
        one.training = False
    outer = [name for name in changed if name.rpartition(".")[0] not in changed]
    if not outer:  # a train() of the model's own sees to it
        return ""
    return (
        f"model() gives {quoted(outer)} in evaluation mode, and each step begins with "
        "model.train(), which has dropout drop and batch norms take the batch's statistics: where "
        "that is not meant, give the model a train(mode) that leaves this part in eval()"
    )


def matrices_warning(job: Job, model: nn.Module) -> str:
    """Say that Muon has the table of an embedding; empty: it has none."""
    kinds = job.optimizer.group_classes()
    if Muon not in kinds:
        return ""
    embeddings = [one for one in model.modules() if isinstance(one, nn.Embedding | nn.EmbeddingBag)]
    tables = {id(one.weight) for one in embeddings if one.weight.requires_grad}
    names = [
        name
        for name, one in dense_parameters(model)
        if id(one) in tables and kinds[job.optimizer.group_of(name)] is Muon
    ]
    if not names:
        return ""
    return (
        f"Muon updates {quoted(names)}, rows of an embedding: its authors have it for the matrices "
        "of hidden layers, and AdamW for embeddings and heads. Give them a group with a name, such "
        f"as {{match: {names[0]!r}, name: AdamW, lr: 3e-4}}"
    )


def reading_warning(data: Dataset[Any], positions: Sequence[int]) -> str:
    """
    Say that a sample is another one each time that it is read; empty: it is not.

    It is read twice with the same random numbers, which no step of the training draws. A data set
    with a generator of its own, of which there is another warning, would go on with other numbers.

    Args:
        data: the training samples.
        positions: of samples; the first one is read.
    """
    if not positions or isinstance(data, StreamSamples) or held_generators(data):
        return ""
    base, position = secrets.randbits(63), positions[0]
    with preserve_rng_state():
        try:
            seed_sample(base, 0)
            first = data[position]
            before = hash_of(first)
            seed_sample(base, 0)
            again = hash_of(data[position])
        except Exception:  # it is raised when it is trained on
            return ""
    if before == again == hash_of(first):
        return ""
    stored = before != hash_of(first)  # the second reading wrote into what the first one gave
    other = "" if stored else "or draws from a generator that nobody seeds, "
    return (
        f"train_data(): sample {position} is another one when it is read again: reading changes "
        f"what the data set stores, as `x -= mean` does with a stored x, {other}so the result "
        "depends on how often each worker and loader has read it. Compute on a copy: `x = x - mean`"
    )


def model_warnings(job: Job, model: nn.Module) -> list[str]:
    """Give what is no error in a model and probably not meant, as `job_warnings` does."""
    warnings = parts_warning(job, model), modes_warning(model), matrices_warning(job, model)
    return [*filter(None, warnings)]


def job_warnings(job: Job, sampler: Sampler) -> list[str]:
    """Give what is no error and probably not meant; rank 0 says it for all."""
    return [*filter(None, [size_warning(job, sampler), factors_warning(job)])]
