"""
Check before the first step that all ranks have the same model, data and code.

Each rank compares its facts with those in the run's store, which the first rank has written. So no
rank waits for another, and a worker that joins later is compared too. Values of the model may
differ, as ranks copy rank 0's; samples may not.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.checkpoint.state_sync import untrained_slots
from distplat.strategies.loop.sample_hash import hash_of
from distplat.strategies.loop.seeding import preserve_rng_state, rng_states, seed_sample
from distplat.strategies.loop.streams import StreamSamples, length_of
from distplat.strategies.model.parameter_layout import dtype_name
from distplat.strategies.model.written_tensors import checksum
from distplat.strategies.ports import RunStore
from distplat.strategies.task import Task

_KEY = "what-ranks-have"
_SAMPLES = 16
_DRAWS = "draws random numbers"
_SHOWN = 4
"""Maximum number of the model's names in a message."""


@dataclass(frozen=True)
class RankFacts:
    """Facts about a rank's model, data and code; plain values, compared between ranks."""

    code: tuple[str, str]
    """File of the task's module, and its hash; empty: the module has no file."""
    model: tuple[tuple[str, str], ...]
    """Names and descriptions of parameters and buffers."""
    samples: int
    """Length of the training data."""
    eval_samples: int
    """Length of the evaluation data; -1: no evaluation data, or no length."""
    hashes: tuple[tuple[int, str], ...]
    """Positions in the training data with hashes of the samples; see `hash_samples`."""
    values: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Names and checksums of buffers and frozen parameters, if ranks do not broadcast them."""
    order: str = ""
    """Hash of the order of the task's `sampler`, if it has one."""
    said: tuple[tuple[str, str], ...] = ()
    """Methods of the task that configure training, such as `lr`, with hashes of their results."""


_FACTS = TypeAdapter(tuple[int, RankFacts])
"""A rank and its facts, as in the run's store."""


def facts_of(
    task: Task,
    model: nn.Module,
    data: Dataset[Any],
    eval_data: Any,
    seed: int,
    *,
    sent: bool = True,
) -> RankFacts:
    """
    Return the facts of this rank.

    Args:
        task: the user's task.
        model: the model as built.
        data: the training samples.
        eval_data: the evaluation samples, or None.
        seed: seed of the job; selects the samples to compare.
        sent: whether rank 0 broadcasts buffers and frozen parameters; if not, they are compared.
    """
    size = _length(data)
    positions = random.Random(seed).sample(range(max(0, size)), min(max(0, size), _SAMPLES))
    if isinstance(data, StreamSamples):  # later samples need reading all before
        positions = [*range(len(data.hashes))]
    hashes = hash_samples(data, sorted(positions))
    values = () if sent else tuple(_checksums(model))
    samples = size, _length(eval_data), tuple(hashes.items())
    return RankFacts(_code(task), _model(model), *samples, values)


def agree(
    mine: RankFacts,
    rank: int,
    run_store: RunStore,
    again: Callable[[Sequence[int]], Mapping[int, str]],
) -> None:
    """
    Compare with the first rank in the store.

    Args:
        mine: facts of this rank.
        rank: this rank.
        run_store: store of the run.
        again: hashes samples again, as samples that differ on each read cannot be compared.

    Raises:
        SpecError: the facts differ; lists the differences with both ranks.
    """
    text = _FACTS.dump_json((rank, mine))
    first, other_facts = _FACTS.validate_json(run_store.first(_KEY, text))
    if other_facts == mine:
        return
    me, other = f"worker-{rank}", f"worker-{first}"
    differences = _differences(mine, other_facts, me, other)
    if not differences:
        differences = _other_samples(mine, other_facts, me, other, again)
    if differences:
        hint = (
            "every worker must build the same model and the whole data, of which it gets its part "
            "later: do not split data by rank, sort the results of glob and listdir, and shuffle "
            "by the global generators or by a seed that all workers share"
        )
        raise SpecError(*(Problem(("task",), text, hint) for text in differences))


def _differences(mine: RankFacts, theirs: RankFacts, me: str, other: str) -> list[str]:
    """Return the differences, except those of samples."""
    differences = []
    if mine.code != theirs.code:
        differences.append(f"{me} runs another {mine.code[0] or 'task'} than {other}")
    for kind in ("samples", "eval_samples"):
        has, had = getattr(mine, kind), getattr(theirs, kind)
        if has != had:
            what = "training samples" if kind == "samples" else "evaluation samples"
            differences.append(f"{me} has {_count(has)} {what}, {other} has {_count(had)}")
    has_model, had_model = dict(mine.model), dict(theirs.model)
    names = [n for n in has_model | had_model if has_model.get(n) != had_model.get(n)]
    for name in names[:_SHOWN]:
        has_it, had_it = (m.get(name, "not there") for m in (has_model, had_model))
        differences.append(f"{name!r} of the model is {has_it} on {me}, {had_it} on {other}")
    if len(names) > _SHOWN:
        differences.append(f"{len(names) - _SHOWN} more parameters and buffers differ")
    has_values, had_values = dict(mine.values), dict(theirs.values)
    for name in [n for n in has_values if has_values[n] != had_values.get(n)][:1]:
        where = f"on {me} than on {other}, and this strategy does not broadcast them"
        differences.append(f"{name!r} of the model has other values {where}")
    if mine.order != theirs.order and not differences:
        differences.append(f"sampler() gives {me} another order of samples than {other}")
    for method, _ in sorted({*mine.said} - {*theirs.said}):
        differences.append(f"{method}() gives {me} something else than {other}")
    if not names and mine.model != theirs.model:
        differences.append(f"{me} has the parameters of the model in another order than {other}")
    return differences


def _other_samples(
    mine: RankFacts,
    theirs: RankFacts,
    me: str,
    other: str,
    again: Callable[[Sequence[int]], Mapping[int, str]],
) -> list[str]:
    had = dict(theirs.hashes)
    differ = [
        (index, digest)
        for index, digest in mine.hashes
        if had.get(index) != digest and _DRAWS not in (had.get(index), digest)
    ]
    repeated = again([index for index, _ in differ])
    # The first read drew nothing, so a draw in the second read is by another thread.
    reproducible = [index for index, digest in differ if repeated.get(index) in (digest, _DRAWS)]
    if not reproducible:
        return []
    shown = ", ".join(map(str, reproducible[:_SHOWN]))
    shown += ", ..." if len(reproducible) > _SHOWN else ""
    return [
        f"{me} has other training samples than {other}: {len(reproducible)} of {len(mine.hashes)} "
        f"that were compared differ, of the numbers {shown}"
    ]


def _checksums(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    for slot in untrained_slots(model):
        if slot.tensor is not None and not slot.tensor.is_meta:
            yield slot.name, checksum(slot.tensor)


def _count(size: int) -> str:
    return "no" if size < 0 else str(size)


def _length(data: Any) -> int:
    size = length_of(data)
    return -1 if size is None else size


def _model(model: nn.Module) -> tuple[tuple[str, str], ...]:
    described = []
    for name, parameter in model.named_parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        described.append((name, f"a {kind} parameter, {_type_of(parameter)}"))
    described += [(name, f"a buffer, {_type_of(buffer)}") for name, buffer in model.named_buffers()]
    return tuple(described)


def _type_of(tensor: Tensor) -> str:
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        return "not initialised"
    return f"{dtype_name(tensor)} {[*tensor.shape]}"


def _code(task: Task) -> tuple[str, str]:
    module = sys.modules.get(type(task).__module__)
    file = getattr(module, "__file__", None)
    try:
        text = Path(file).read_bytes() if file else b""
    except OSError:
        return "", ""
    return (Path(file).name, hashlib.sha256(text).hexdigest()) if file else ("", "")


def hash_samples(data: Dataset[Any], positions: Sequence[int]) -> dict[int, str]:
    """
    Read samples and return their hashes; for a sample that draws random numbers, a marker.

    The seed is unique to this rank, so a sample that draws differs on each rank and cannot be
    compared. The global generators are restored. The hash of a sample that raises is its exception,
    which training on the sample raises again. Samples of a stream have the same seed on all ranks,
    and were hashed by `StreamSamples.survey`.
    """
    if isinstance(data, StreamSamples):
        return {position: data.hashes[position] for position in positions}
    hashes, base = {}, secrets.randbits(63)
    with preserve_rng_state():
        seed_sample(base, 0)
        before = rng_states()
        for number, position in enumerate(positions, start=1):
            try:
                hashes[position] = hash_of(data[position])
            except Exception as error:
                hashes[position] = f"raises {type(error).__name__}"
            if rng_states() != before:
                hashes[position] = _DRAWS
                seed_sample(base, number)  # so that the next sample cannot end in the same state
                before = rng_states()
    return hashes
