"""
Whether all ranks train the same: model, data and code, told apart by name before the first step.

A rank writes down what it has and puts it into the run's store, where the first to come has put its
own; each compares with that. So nobody waits for anybody, and a worker that comes later is compared
too. Values of a model may differ, for ranks take over rank 0's; its samples may not.
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
"""Names of a model that a message has at most."""


@dataclass(frozen=True)
class RankFacts:
    """What a rank trains; plain values, to be compared with another's."""

    code: tuple[str, str]
    """File of the task's module, and a hash of it; empty where there is none."""
    model: tuple[tuple[str, str], ...]
    """Names of parameters and buffers, and what each is."""
    samples: int
    """Length of the training data."""
    eval_samples: int
    """Length of the evaluation data; -1: there is none, or it has no length."""
    hashes: tuple[tuple[int, str], ...]
    """Positions in the training data, and a hash of each sample; see `hash_samples`."""
    values: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Names and checksums of buffers and frozen parameters, where ranks do not send them."""
    order: str = ""
    """Fingerprint of the order that the task's `sampler` gives, if it has one."""
    said: tuple[tuple[str, str], ...] = ()
    """Methods of the task's that say how it is trained, and a fingerprint of what each gives."""


_FACTS = TypeAdapter(tuple[int, RankFacts])
"""A rank, and what it has: what is in the run's store."""


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
    Write down what this rank has.

    Args:
        task: the user's.
        model: as it was built.
        data: the training samples.
        eval_data: the evaluation samples, or None.
        seed: of the job; says which samples are compared.
        sent: whether ranks take over rank 0's buffers and frozen parameters; else these count.
    """
    size = _length(data)
    positions = random.Random(seed).sample(range(max(0, size)), min(max(0, size), _SAMPLES))
    if isinstance(data, StreamSamples):  # others would have to be read up to there
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
    Compare with the first rank that came.

    Args:
        mine: what this rank has.
        rank: this one.
        run_store: the run's.
        again: hashes samples once more; what is another one each time says nothing.

    Raises:
        SpecError: it has something else; says what, and which of the two has what.
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
            "later: cut no data by rank, sort what glob and listdir give, and shuffle by the "
            "global generators or by a seed that all workers have"
        )
        raise SpecError(*(Problem(("task",), text, hint) for text in differences))


def _differences(mine: RankFacts, theirs: RankFacts, me: str, other: str) -> list[str]:
    """Say what differs but for the samples themselves."""
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
        where = f"on {me} than on {other}, and under this strategy nobody sends them"
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
        (number, one)
        for number, one in mine.hashes
        if had.get(number) != one and _DRAWS not in (had.get(number), one)
    ]
    repeated = again([number for number, _ in differ])
    # It drew nothing at first: what draws now is another thread of this process.
    sure = [number for number, one in differ if repeated.get(number) in (one, _DRAWS)]
    if not sure:
        return []
    numbers = ", ".join(map(str, sure[:_SHOWN])) + (", ..." if len(sure) > _SHOWN else "")
    return [
        f"{me} has other training samples than {other}: {len(sure)} of {len(mine.hashes)} that "
        f"were compared differ, of the numbers {numbers}"
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
        described.append((name, f"a {kind} parameter, {_kind(parameter)}"))
    described += [(name, f"a buffer, {_kind(buffer)}") for name, buffer in model.named_buffers()]
    return tuple(described)


def _kind(tensor: Tensor) -> str:
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
    Read samples and give a hash of each; of one that draws random numbers, that it does.

    Reading draws numbers that no other rank and no step of the training draws. So a sample that
    draws is another one on each rank, and cannot be compared. The global generators are put back.
    What a sample raises is raised when it is trained on; here it is its hash. The samples of a
    stream are seeded alike on all ranks, and were read when it was made.
    """
    if isinstance(data, StreamSamples):
        return {position: data.hashes[position] for position in positions}
    hashes, own = {}, secrets.randbits(63)
    with preserve_rng_state():
        seed_sample(own, 0)
        before = rng_states()
        for number, position in enumerate(positions, start=1):
            try:
                hashes[position] = hash_of(data[position])
            except Exception as error:
                hashes[position] = f"raises {type(error).__name__}"
            if rng_states() != before:
                hashes[position] = _DRAWS
                seed_sample(own, number)  # the next one may leave them as this one has
                before = rng_states()
    return hashes
