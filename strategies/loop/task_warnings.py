"""Warnings about valid but probably unintended properties of a job or model; rank 0 logs them."""

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
"""Keys of `schedule_facts` in a checkpoint."""
_SMALL = 0.1
"""If the largest factor of a task's `lr` is below, it is probably a rate."""


def size_warning(job: Job, sampler: Sampler) -> str:
    """Return a warning that the data is too small for the batch; empty: none."""
    if sampler.size < sampler.world:
        idle = sampler.world - sampler.size
        return (
            f"the training data has {sampler.size} samples for {sampler.world} parts of a batch: "
            f"{idle} of them are empty in every step"
        )
    if sampler.size < job.global_batch_size:
        return (
            f"the training data has {sampler.size} samples, fewer than global_batch_size "
            f"{job.global_batch_size}: every step has all samples"
        )
    return ""


def factors_warning(job: Job) -> str:
    """Return a warning that a task's `lr` seems to return rates, not factors; empty: none."""
    schedule = job.task_schedule
    largest = max(schedule.factors, default=1.0) if schedule is not None else 1.0
    if largest >= _SMALL:
        return ""
    return (
        f"lr() gives factors of the optimizer's lr, and the largest is {largest:g}: no rate is "
        f"above {largest:g} x {max(job.optimizer.rates()):g}"
    )


def schedule_facts(job: Job, step: int, steps: int) -> dict[str, float]:
    """
    Return facts for a checkpoint by which a resumed run detects a change of the learning rate.

    Args:
        job: the job, with the factors of the task's `lr`.
        step: step of the checkpoint.
        steps: number of steps in the run.
    """
    if job.plateau is not None:
        return {_STEPS: steps}
    return {_STEPS: steps, _FACTOR: job.lr_schedule.rate(1.0, step - 1, steps)}


def length_warning(job: Job, steps: int, state: Mapping[str, Any]) -> str:
    """
    Return a warning that the learning rate of a resumed run jumps; empty: none.

    Args:
        job: the job, with the factors of the task's `lr`.
        steps: number of steps in the run.
        state: content of the checkpoint's `state.json`.
    """
    step, had, factor = state["step"], state.get(_STEPS, steps), state.get(_FACTOR)
    if had == steps or factor is None or job.plateau is not None:
        return ""
    current = job.lr_schedule.rate(1.0, step - 1, steps)
    if math.isclose(current, factor, rel_tol=1e-6, abs_tol=1e-12):
        return ""
    absolute = job.lr_schedule.rate(2.0, step - 1, steps) == current  # does not scale `lr`
    unit = "a rate of" if absolute else "lr x"
    length, old = [f"{n} steps" if n < UNBOUNDED else "no number of steps" for n in (steps, had)]
    return (
        f"the learning rate depends on the length of the run: the checkpoint's run had {old}, "
        f"and {unit} {factor:.4g} in its step {step}; in this run, of {length}, that step "
        f"would have had {unit} {current:.4g}, and the rate continues from there. To avoid the "
        "jump, set the final length from the start, or a schedule that depends on it only in its "
        "last steps (wsd)"
    )


def parts_warning(job: Job, model: nn.Module) -> str:
    """Return a warning that a parameter's hook gets gradients of parts of a batch; empty: none."""
    if job.scaling.world == 1 and job.gradient_accumulation == 1:
        return ""
    part = "each worker's part of the batch, or of a micro-batch, before they are added up"
    warning = hooks_warning(model, part)
    return f"{warning}. `clip_norm` clips the sum" if warning else ""


def modes_warning(model: nn.Module) -> str:
    """Return a warning that `model.train()` sets parts in evaluation mode to training mode."""
    in_eval = [(name, module) for name, module in model.named_modules() if not module.training]
    if not model.training:  # the whole model, as Hugging Face's from_pretrained() returns it
        return ""
    model.train()
    changed = [name for name, module in in_eval if module.training]
    for _, module in in_eval:
        module.training = False
    outer = [name for name in changed if name.rpartition(".")[0] not in changed]
    if not outer:  # the model's own train() keeps these parts in evaluation mode
        return ""
    return (
        f"model() gives {quoted(outer)} in evaluation mode, and each step starts with "
        "model.train(), which enables dropout and batch statistics of batch norms: if this is not "
        "intended, give the model a train(mode) that leaves this part in eval()"
    )


def matrices_warning(job: Job, model: nn.Module) -> str:
    """Return a warning that Muon updates an embedding's weight; empty: none."""
    classes = job.optimizer.group_classes()
    if Muon not in classes:
        return ""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    tables = {id(module.weight) for module in embeddings if module.weight.requires_grad}
    names = [
        name
        for name, parameter in dense_parameters(model)
        if id(parameter) in tables and classes[job.optimizer.group_of(name)] is Muon
    ]
    if not names:
        return ""
    return (
        f"Muon updates {quoted(names)}, rows of an embedding: its authors use it for the matrices "
        "of hidden layers, and AdamW for embeddings and heads. Give them a group with a name, such "
        f"as {{match: {names[0]!r}, name: AdamW, lr: 3e-4}}"
    )


def reading_warning(data: Dataset[Any], positions: Sequence[int]) -> str:
    """
    Return a warning that a sample differs each time it is read; empty: none.

    Reads one sample twice with the same seed, which no training step uses. A data set with its own
    generator is skipped, as it has another warning and would draw other numbers.

    Args:
        data: the training samples.
        positions: indices of samples; the first one is read.
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
        except Exception:  # raised again when the sample is trained on
            return ""
    if before == again == hash_of(first):
        return ""
    stored = before != hash_of(first)  # the second read wrote into the first sample
    other = "" if stored else "or draws from a generator without a seed, "
    return (
        f"train_data(): sample {position} differs when it is read again: reading changes "
        f"the stored data, as `x -= mean` does with a stored x, {other}so the result "
        "depends on how often each worker and loader has read it. Compute on a copy: `x = x - mean`"
    )


def model_warnings(job: Job, model: nn.Module) -> list[str]:
    """Return the warnings about a model."""
    warnings = parts_warning(job, model), modes_warning(model), matrices_warning(job, model)
    return [*filter(None, warnings)]


def job_warnings(job: Job, sampler: Sampler) -> list[str]:
    """Return the warnings about a job and its data."""
    return [*filter(None, [size_warning(job, sampler), factors_warning(job)])]
