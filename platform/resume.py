"""
Entries of a checkpoint's `state.json`, and whether a job can resume from a checkpoint.

A resumed job may change strategy, workers, servers, learning rate, schedule and length. It must
keep the fields that define the meaning of the tensors and of the position in the data: class of the
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

_UNCHANGEABLE = ("seed", "global_batch_size")


NOT_FINITE = "not_finite"
"""Entry of a rank whose parameters contain NaN or infinity: the name of the first parameter."""
STREAM = "stream"
"""Entry of a run whose data is a stream: the position to continue from."""


FROZEN = "frozen"
"""Entry of a rank: name -> checksum of each parameter that its part leaves out."""


def joined_facts(rank_facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Merge the entries of all ranks: those of rank 0, and the frozen parameters of every rank.

    Args:
        rank_facts: entries of all ranks, in rank order.
    """
    left_out = [facts[FROZEN] for facts in rank_facts if FROZEN in facts]
    names = {name: checksum for entry in left_out for name, checksum in entry.items()}
    return {**rank_facts[0], **({FROZEN: names} if left_out else {})}


FUNCTION = "function"
"""Entry of a train function's checkpoint: its values, without the tensors."""


def state_of(job: Job, run: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the contents of `state.json`, without the step.

    Args:
        job: the run's.
        run: name of the run.
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
    Return why a job cannot resume from a checkpoint; []: it can.

    Workers compare the model itself.
    """
    if job.own_loop or FUNCTION in state:
        return _function_mismatches(state, job)
    problems = []
    for field in _UNCHANGEABLE:
        if state.get(field) != getattr(job, field):
            problems.append(_mismatch((field,), state.get(field), getattr(job, field)))
    for field, value in _data_order(job).items():
        old = state.get("data", {}).get(field)
        if old != value:
            problems.append(_mismatch(("data", field), old, value))
    problems += _optimizer_mismatches(state.get("optimizer", {}), job)
    return problems + _embedding_mismatches(state, job) + _length_mismatch(state, job)


def _function_mismatches(state: Mapping[str, Any], job: Job) -> list[Problem]:
    """Check that the checkpoint is of a train function if the job is, and of a task otherwise."""
    if job.own_loop and FUNCTION in state:
        return []
    made, now = ("a task", "a train function") if job.own_loop else ("a train function", "a task")
    return [Problem(("task",), f"the checkpoint is of {made}, the job of {now}")]


def start_from(job: Job, path: Path, warn: Callable[[str], object]) -> StoredCheckpoint:
    """
    Find the checkpoint to resume from, and check the job against it.

    Args:
        job: the job.
        path: a run directory, or one of its checkpoints.
        warn: called with a message about each damaged checkpoint.

    Raises:
        SpecError: there is no checkpoint, or the job does not match it.
        StorageError: all checkpoints are damaged or foreign, or the disk does not respond.
    """
    limit_s = job.failure.storage_timeout_s
    return _checked(
        job, with_deadline(lambda on_progress: find(path, warn, on_progress), path, limit_s)
    )


def start_from_url(
    job: Job, url: str, folder: Path, warn: Callable[[str], object]
) -> StoredCheckpoint:
    """
    Download the checkpoint to resume from, and check the job against it.

    Args:
        job: the job.
        url: see `remote_storage.fetch`.
        folder: an empty directory for the checkpoint.
        warn: called with a message about each damaged checkpoint.

    Raises:
        SpecError: there is no checkpoint, or the job does not match it.
        StorageError: the download failed or timed out, or all checkpoints are damaged.
    """
    return _checked(job, fetch(url, folder, job.failure.storage_timeout_s, warn))


def check_libraries(job: Job) -> None:
    """
    Check that the libraries for `storage_path` and trackers are installed.

    Raises:
        SpecError: a library is missing; hints how to install it.
    """
    if problems := missing_trackers(job):
        raise SpecError(*problems)
    if is_url(job.storage_path):
        check_url(job.storage_path, "storage_path")


def _checked(job: Job, stored: StoredCheckpoint) -> StoredCheckpoint:
    """
    Return the checkpoint, after checking the job against it.

    Raises:
        SpecError: the job does not match it.
        StorageError: it is damaged or foreign.
    """
    if not _well_formed(stored.state):
        raise StorageError(f"{stored.path / STATE} is damaged, or of no run of distplat")
    if problems := mismatches(stored.state, job):
        raise SpecError(*problems)
    return stored


def _well_formed(state: Mapping[str, Any]) -> bool:
    """Return whether the compared entries have the types that a run of distplat writes."""
    mappings = [state.get(name, {}) for name in ("data", "optimizer", EARLY_STOP)]
    if (tables := state.get("embeddings")) is not None:
        mappings += [tables, tables.get("optimizer") if isinstance(tables, dict) else None]
    numbers = [state.get(name, 0) for name in ("steps_per_epoch", "total_steps")]
    return (
        all(isinstance(entry, dict) for entry in mappings)
        and all(isinstance(number, int) for number in [*numbers, state.get("step")])
        and isinstance(state.get("lr_factor", 0.0), float | int)
        and (tables is None or "name" in tables["optimizer"])
    )


def name_differences(checkpoint_names: set[str], model_names: set[str]) -> list[str]:
    """Return messages about names that only the checkpoint or only the model has."""
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
    """Compare the row optimizers; number of servers and partition may change."""
    old, new = state.get("embeddings"), _embedding_fields(job).get("embeddings")
    if (old is None) != (new is None):
        text = "the checkpoint has no embedding tables, the job has the field"
        if new is None:
            text = "the checkpoint has embedding tables, the job does not have the field"
        return [Problem(("embeddings",), text, "set it as it was, or start without --resume")]
    if old is None or new is None or old["optimizer"]["name"] == new["optimizer"]["name"]:
        return []
    names = old["optimizer"]["name"], new["optimizer"]["name"]
    return [_mismatch(("embeddings", "optimizer", "name"), *names)]


def _state_options(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that determine which state tensors an optimizer has."""
    fields = ("momentum", "amsgrad", "centered")
    options: dict[str, Any] = {f: bool(optimizer[f]) for f in fields if f in optimizer}
    groups = [(group.get("match"), group.get("name")) for group in optimizer.get("groups", ())]
    return options | {"groups": groups if any(name for _, name in groups) else []}


def _mismatch(where: tuple[str, ...], old: Any, new: Any) -> Problem:
    hint = "set it as it was, or start without --resume"
    return Problem(where, f"the checkpoint was made with {old!r}, the job has {new!r}", hint)


def _length_mismatch(state: Mapping[str, Any], job: Job) -> list[Problem]:
    if job.steps is None and job.epochs is None:
        return []  # only a time limit
    field = "steps" if job.steps is not None else "epochs"
    per_epoch = int(state.get("steps_per_epoch", 0))
    steps = job.steps if job.steps is not None else (job.epochs or 0) * per_epoch
    if steps > state["step"]:
        return []
    text = f"the checkpoint is of step {state['step']}, the job has {steps} steps"
    hint = "nothing is left to train: the checkpoint's model.safetensors is the trained model; "
    return [Problem((field,), text, hint + f"to train on, raise `{field}`")]
