"""
A child process for references, which imports the user's modules afresh and with a known seed.

    python -m distplat.strategies.verification.child FOLDER

reads FOLDER/request.json and writes FOLDER/references.pt.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distplat.platform.spec import Job
from distplat.strategies.catalog import load_strategy_file, make_strategy
from distplat.strategies.hybrid import Hybrid
from distplat.strategies.task import Task, model_call_method
from distplat.strategies.verification.recipes import seed_all
from distplat.strategies.verification.reference import Rank
from distplat.strategies.verification.references import References, references
from distplat.strategies.verification.switched import Switched, Switches

REQUEST, ANSWER = "request.json", "references.pt"


@dataclass(frozen=True)
class ChildRequest:
    """A request to the child process."""

    jobs: list[dict[str, Any]]
    """One job for each strategy."""
    entry: str
    """The user's task, `module:Class`."""
    task_args: dict[str, Any]
    folder: str
    """Folder of the task's module."""
    strategy_file: str | None = None


ReferenceResult = References | str
"""The references of a job, or the reason why its strategy cannot cut the model."""


def answer(request: ChildRequest) -> list[ReferenceResult]:
    """Compute the references of all jobs."""
    sys.path.insert(0, request.folder)
    if request.strategy_file is not None:
        load_strategy_file(Path(request.strategy_file))

    def make(switches: Switches) -> Task:
        cls: Any = Switched  # the constructor returns an object of another class
        task: Task = cls(request.entry, request.task_args, asdict(switches))
        return task

    results: list[ReferenceResult] = []
    for fields in request.jobs:
        job = Job.model_validate(fields)
        seed_all(job.seed)
        is_hybrid = isinstance(make_strategy(job), Hybrid)
        reason = _uncut_reason(job, make(Switches())) if is_hybrid else ""
        results.append(reason or references(job, make))
    return results


def _uncut_reason(job: Job, task: Task) -> str:
    """Return why a pipeline cannot cut the model; empty: it can."""
    if (own := model_call_method(task)) is not None:
        return f"the task calls the model itself, in {own}()"
    try:
        stages = task.stages(Rank(lambda: task, job.seed).model)
    except NotImplementedError as error:
        return str(error)
    return "" if len(stages) > 1 else "the model has one layer"


def main() -> None:
    """Answer the request in the folder given on the command line."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    request = ChildRequest(**json.loads((folder / REQUEST).read_text()))
    torch.save(answer(request), folder / ANSWER)


if __name__ == "__main__":
    main()
