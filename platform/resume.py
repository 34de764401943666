"""
What a checkpoint says of its run, and whether a job may go on from it.

What may change in the job file: strategy, workers, servers, learning rate, schedule, length. What
must stay is what gives the tensors and the position in the data their meaning: the kind of
optimizer, batch size, seed, order of the data.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distplat.platform.checkpoints import STATE, StoredCheckpoint, find
from distplat.platform.disk import with_deadline
from distplat.platform.errors import Problem, SpecError, StorageError, nearest
from distplat.platform.evaluations import EARLY_STOP
from distplat.platform.remote_storage import check_url, fetch, is_url
from distplat.platform.spec import Job
from distplat.platform.trackers import missing_trackers

_SAME = ("seed", "global_batch_size")


NOT_FINITE = "not_finite"
"""Fact of a rank whose parameters hold NaN or infinity: the name of the first."""
STREAM = "stream"
"""Fact of a run whose data is a stream: where it is read on."""


FROZEN = "frozen"
"""Fact of a rank: what its part of a checkpoint leaves out, by name, and the checksum of each."""


def joined_facts(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Give the facts of a checkpoint: those of rank 0, and what any rank leaves out of its part.

    Args:
        every: of all ranks, in rank order.
    """
    left_out = [facts[FROZEN] for facts in every if FROZEN in facts]
    names = {name: sums for one in left_out for name, sums in one.items()}
    return {**every[0], **({FROZEN: names} if left_out else {})}


FUNCTION = "function"
"""Fact of a train function's checkpoint: what it gave, without the tensors."""


def state_of(job: Job, run: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """
    Give what `state.json` holds beside the step.

    Args:
        job: the run's.
        run: its name.
        facts: see `joined_facts`: `samples`, `steps_per_epoch`, `epoch`, `versions`, `tables`,
            `STREAM`, `FROZEN`.
    """
    return {
        "run": run,
        "strategy": job.strategy.name,
        "num_workers": job.scaling.num_workers,
        "seed": job.seed,
        "global_batch_size": job.global_batch_size,
        "data": _data_order(job),
        "optimizer": job.optimizer.model_dump(mode="json"),
        **_embedding_fields(job),
        **facts,
    }


def mismatches(state: Mapping[str, Any], job: Job) -> list[Problem]:
    """
    Say why a job cannot go on from a checkpoint; empty: it can.

    The model itself is compared in the workers, which have one.
    """
    if job.own_loop or FUNCTION in state:
        return _function_mismatches(state, job)
    problems = []
    for field in _SAME:
        if state.get(field) != getattr(job, field):
            problems.append(_mismatch((field,), state.get(field), getattr(job, field)))
    for field, value in _data_order(job).items():
        had = state.get("data", {}).get(field)
        if had != value:
            problems.append(_mismatch(("data", field), had, value))
    problems += _optimizer_mismatches(state.get("optimizer", {}), job)
    return problems + _embedding_mismatches(state, job) + _length_mismatch(state, job)


def _function_mismatches(state: Mapping[str, Any], job: Job) -> list[Problem]:
    """Compare for a train function: what it kept is its own, a task's checkpoint it cannot read."""
    if job.own_loop and FUNCTION in state:
        return []
    made, now = ("a task", "a train function") if job.own_loop else ("a train function", "a task")
    return [Problem(("task",), f"the checkpoint is of {made}, the job of {now}")]


def start_from(job: Job, path: Path, warn: Callable[[str], object]) -> StoredCheckpoint:
    """
    Find the checkpoint that a job is to go on from, and compare the two.

    Args:
        job: the job.
        path: a run directory, or one of its checkpoints.
        warn: is told of each that is damaged.

    Raises:
        SpecError: there is none, or the job does not go with it.
        StorageError: all are damaged, it was made by something else, or the disk does not answer.
    """
    limit_s = job.failure.storage_timeout_s
    return compared(
        job, with_deadline(lambda on_progress: find(path, warn, on_progress), path, limit_s)
    )


def start_from_url(
    job: Job, url: str, folder: Path, warn: Callable[[str], object]
) -> StoredCheckpoint:
    """
    Bring the checkpoint that a job is to go on from, and compare the two.

    Args:
        job: the job.
        url: see `remote_storage.fetch`.
        folder: an empty one; the checkpoint is put into it.
        warn: is told of each that is damaged.

    Raises:
        SpecError: there is none, or the job does not go with it.
        StorageError: it cannot be brought in time, or all are damaged.
    """
    return compared(job, fetch(url, folder, job.failure.storage_timeout_s, warn))


def check_libraries(job: Job) -> None:
    """
    Look whether the libraries are installed that `storage_path` and trackers need.

    Raises:
        SpecError: one is not; says how to get it.
    """
    if problems := missing_trackers(job):
        raise SpecError(*problems)
    if is_url(job.storage_path):
        check_url(job.storage_path, "storage_path")


def compared(job: Job, stored: StoredCheckpoint) -> StoredCheckpoint:
    """
    Give a checkpoint that the job may go on from.

    Raises:
        SpecError: the job does not go with it.
        StorageError: it was made by something else.
    """
    if not _well_formed(stored.state):
        raise StorageError(f"{stored.path / STATE} is damaged, or of no run of distplat")
    if problems := mismatches(stored.state, job):
        raise SpecError(*problems)
    return stored


def _well_formed(state: Mapping[str, Any]) -> bool:
    """Say whether what is compared with a job has the types that a run of ours writes."""
    mappings = [state.get(name, {}) for name in ("data", "optimizer", EARLY_STOP)]
    if (tables := state.get("embeddings")) is not None:
        mappings += [tables, tables.get("optimizer") if isinstance(tables, dict) else None]
    numbers = [state.get(name, 0) for name in ("steps_per_epoch", "total_steps")]
    return (
        all(isinstance(one, dict) for one in mappings)
        and all(isinstance(one, int) for one in [*numbers, state.get("step")])
        and isinstance(state.get("lr_factor", 0.0), float | int)
        and (tables is None or "name" in tables["optimizer"])
    )


def name_differences(checkpoint_names: set[str], model_names: set[str]) -> list[str]:
    """Say which of a checkpoint's names a model lacks, and the other way round."""
    lines = []
    for name in sorted(model_names - checkpoint_names)[:5]:
        near = nearest(name, sorted(checkpoint_names - model_names))
        lines.append(f"no {name!r} in the checkpoint" + (f", but {near!r}" if near else ""))
    lines += [f"no {name!r} in the model" for name in sorted(checkpoint_names - model_names)[:5]]
    return lines


def _data_order(job: Job) -> dict[str, Any]:
    return {"shuffle": job.data.shuffle, "drop_last": job.data.drop_last}


def _optimizer_mismatches(old: Mapping[str, Any], job: Job) -> list[Problem]:
    new = job.optimizer.model_dump(mode="json")
    if old.get("name") != new["name"]:
        return [_mismatch(("optimizer", "name"), old.get("name"), new["name"])]
    return [
        _mismatch(("optimizer", field), old.get(field), new[field])
        for field, value in _state_options(new).items()
        if _state_options(old).get(field) != value
    ]


def _embedding_fields(job: Job) -> dict[str, Any]:
    chosen = job.embeddings
    return {} if chosen is None else {"embeddings": chosen.model_dump(mode="json")}


def _embedding_mismatches(state: Mapping[str, Any], job: Job) -> list[Problem]:
    """Compare the rows' optimizers; number of servers and partition may change."""
    old, new = state.get("embeddings"), _embedding_fields(job).get("embeddings")
    if (old is None) != (new is None):
        text = "the checkpoint has no embedding tables, the job has the field"
        if new is None:
            text = "the checkpoint has embedding tables, the job has not the field"
        return [Problem(("embeddings",), text, "set it as it was, or start without --resume")]
    if old is None or new is None or old["optimizer"]["name"] == new["optimizer"]["name"]:
        return []
    names = old["optimizer"]["name"], new["optimizer"]["name"]
    return [_mismatch(("embeddings", "optimizer", "name"), *names)]


def _state_options(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Give what decides which tensors an optimizer remembers."""
    fields = ("momentum", "amsgrad", "centered")
    options: dict[str, Any] = {f: bool(optimizer[f]) for f in fields if f in optimizer}
    groups = [(group.get("match"), group.get("name")) for group in optimizer.get("groups", ())]
    return options | {"groups": groups if any(name for _, name in groups) else []}


def _mismatch(where: tuple[str, ...], had: Any, has: Any) -> Problem:
    hint = "set it as it was, or start without --resume"
    return Problem(where, f"the checkpoint was made with {had!r}, the job has {has!r}", hint)


def _length_mismatch(state: Mapping[str, Any], job: Job) -> list[Problem]:
    if job.steps is None and job.epochs is None:
        return []  # its time alone ends it
    field = "steps" if job.steps is not None else "epochs"
    per_epoch = int(state.get("steps_per_epoch", 0))
    steps = job.steps if job.steps is not None else (job.epochs or 0) * per_epoch
    if steps > state["step"]:
        return []
    text = f"the checkpoint has {state['step']} steps behind it, the job asks for {steps} in all"
    hint = "nothing is left to train: the checkpoint's model.safetensors is the trained model; "
    return [Problem((field,), text, hint + f"to train on, raise `{field}`")]
