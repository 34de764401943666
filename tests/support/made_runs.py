"""Synthetic run directories."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distplat.strategies.algorithms.pipeline_schedule import build
from distplat.strategies.algorithms.simulate import Costs, simulate

JOB = "name: digits\nstrategy:\n  name: ring\nscaling:\n  num_workers: 2\n"


def step_line(number: int, of: int = 10, **changes: Any) -> dict[str, Any]:
    """Return a line of metrics.jsonl."""
    seconds = {"data": 0.01, "compute": 0.06, "exchange": 0.02, "update": 0.01}
    line = {"kind": "step", "step": number, "epoch": 0, "loss": 2.0 - number / 10, "samples": 8}
    return line | {"seconds": seconds, "of": of, "figures": {}} | changes


def evaluation_line(after: int, **metrics: float) -> dict[str, Any]:
    return {"kind": "evaluation", "step": after, "samples": 5, "metrics": metrics}


FAILURE = {
    "kind": "failure",
    "attempt": 1,
    "step": 3,
    "cause": "worker-1 was lost: the process died",
    "replaced": ["worker-1"],
    "wait_s": 0.0,
}
RECOVERY = {"kind": "recovery", "attempt": 1, "seconds": 2.5}
RESIZED = {
    "kind": "resized",
    "attempt": 2,
    "step": 4,
    "before": 2,
    "workers": 3,
    "seconds": 0.25,
}

SAVED = {
    "kind": "checkpoint",
    "step": 4,
    "path": "checkpoints/step-000004",
    "size": 2_500_000,
    "seconds": 0.25,
}

FACTS: dict[str, Any] = {
    "status": "SUCCEEDED",
    "name": "lin",
    "strategy": "ring",
    "num_workers": 2,
    "steps": 3,
    "seconds": 1.5,
    "metrics": {"loss": 0.5, "eval_accuracy": None},
    "samples_per_s": 10.0,
    "time_split": {"compute": 1.0},
    "figures": {"sent_bytes": 4e6},
    "checkpoints": [2],
    "restarts": [],
    "resizes": [],
    "run_directory": "/runs/lin-1",
    "stopped": None,
    "best_checkpoint": None,
    "url": None,
    "model": None,
}
"""Facts that a driver writes to the log of a remote job."""


def write_run(
    home: Path,
    lines: Sequence[dict[str, Any]] = (),
    *,
    name: str = "run",
    job: str | None = JOB,
    result: dict[str, Any] | None = None,
    trace: dict[str, Any] | None = None,
) -> Path:
    """Write a run directory."""
    path = home / name
    path.mkdir(parents=True)
    if job is not None:
        (path / "job.yaml").write_text(job)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if result is not None:
        (path / "result.json").write_text(json.dumps(result))
    if trace is not None:
        (path / "pipeline_trace.json").write_text(json.dumps(trace))
    return path


def make_trace(
    schedule: str = "1f1b",
    stages: int = 2,
    micro_batches: int = 4,
    *,
    replicas: int = 1,
    late_s: float = 0.0,
    reduce_s: float = 0.0,
) -> dict[str, Any]:
    """
    Return the trace of a step in which each stage takes 1 s forward and 2 s backward.

    Args:
        schedule: name of the schedule.
        stages: number of stages.
        micro_batches: number of micro-batches.
        replicas: number of replicas, each 0.5 s later than the one before.
        late_s: duration of each message.
        reduce_s: duration of each stage's reduction.
    """
    spans = simulate(build(schedule, stages, micro_batches), Costs(1, 1, 1, late_s)).spans
    events = []
    for replica in range(replicas):
        for stage, row in enumerate(spans):
            labels = {"rank": replica * stages + stage, "replica": replica, "stage": stage}
            for span in row:
                events.append(
                    labels
                    | {"tensor": 0, "kind": str(span.action.kind), "chunk": span.action.chunk}
                    | {"micro_batch": span.action.micro_batch}
                    | {"start_s": span.start + replica / 2, "end_s": span.end + replica / 2}
                )
            end = row[-1].end + replica / 2
            events.append(
                labels
                | {"tensor": 0, "kind": "reduce", "chunk": -1, "micro_batch": -1}
                | {"start_s": end, "end_s": end + reduce_s}
            )
    facts = {"step": 5, "stages": stages, "schedule": schedule, "micro_batches": micro_batches}
    return facts | {"events": events}
