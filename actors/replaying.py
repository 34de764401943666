"""Make the asynchronous run of a run directory again, and compare the models."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, load_file
from torch import Tensor

from distplat.actors.task_loading import load_task_class
from distplat.actors.training import saved_model
from distplat.platform.apply_log import FILE_NAME, flaws, read_logs, staleness_counts
from distplat.platform.errors import Problem, SpecError, StorageError
from distplat.platform.shard_map import ShardPlan
from distplat.strategies.catalog import load_job, make_strategy
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.loop.session import make_task, prepare
from distplat.strategies.training.replay import replay


@dataclass(frozen=True)
class Replayed:
    """What came of it."""

    run: str
    updates: int
    """Of each shard."""
    shards: int
    staleness: list[Counter[int]]
    """By rank: how often a gradient had which staleness, over all shards."""
    differing: str | None
    """The first tensor that has other bits than the run's model; None: none has."""
    difference: float
    """The largest difference of an element."""


def replay_run(directory: Path, working_dir: Path) -> Replayed:
    """
    Make a run again in this process.

    Args:
        directory: the run directory.
        working_dir: folder of the task's module.

    Raises:
        SpecError: the run was not asynchronous, has embedding tables, or no task by name.
        StorageError: files of it are missing or damaged, or do not belong together.
        UserCodeError: the task cannot be loaded.
    """
    job = load_job(directory / "job.yaml")
    roles = make_strategy(job).roles(job)
    if not roles.consistency.asynchronous:
        text = f"only asynchronous runs have a log; run `{job.strategy.name}` again instead"
        raise SpecError(Problem(("strategy",), text))
    if job.embeddings is not None:
        text = "the log does not say in which order embedding tables were updated"
        raise SpecError(Problem(("embeddings",), text))
    if job.task is None:
        raise SpecError(Problem(("task",), "the run was given a class in Python, not by name"))
    if not (directory / FILE_NAME).exists():
        text = "a run that failed, or that went on from a checkpoint, keeps no log"
        raise StorageError(f"there is no {directory / FILE_NAME}: {text}")
    logs, facts = read_logs(str(directory / FILE_NAME))
    entry = job.task

    def prepare_rank() -> Prepared:
        device = "cuda" if job.scaling.use_gpu else "cpu"
        task = make_task(job, lambda: load_task_class(entry, str(working_dir)))
        return prepare(job, task, device)

    first = prepare_rank()
    world, steps = job.scaling.world, first.total_steps
    found = [flaw for log in logs for flaw in flaws(log, world, steps)]
    if found or len(logs) != roles.servers:
        raise StorageError(f"{directory / FILE_NAME}: {(found or ['shards are missing'])[0]}")
    plan = ShardPlan(first.job, "replay", 0, world, steps, len(logs), roles.consistency)
    threads = max(1, int(job.scaling.resources()["CPU"]))
    model = replay(plan, logs, prepare_rank, threads)
    name, difference = _compare(
        load(saved_model(model.state_dict())), directory / "model.safetensors"
    )
    counts = staleness_counts(logs, world)
    return Replayed(facts.get("run", ""), len(logs[0]), len(logs), counts, name, difference)


def _compare(found: dict[str, Tensor], path: Path) -> tuple[str | None, float]:
    try:
        expected = load_file(path)
    except Exception as error:  # safetensors has an error of its own, and raises OSError
        raise StorageError(f"cannot read {path}: {error}") from None
    if found.keys() != expected.keys():
        raise StorageError(f"{path} is not of this job: it has other tensors")
    differing, largest = None, 0.0
    for name, tensor in expected.items():
        if not torch.equal(_bits(tensor), _bits(found[name])):
            differing = differing or name
            gap = (tensor.double() - found[name].double()).abs()
            largest = max(largest, float(gap.max()))
    return differing, largest


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
