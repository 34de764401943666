"""Results of `distplat verify` for a random job."""

from __future__ import annotations

from in_memory_engine import engine, task_factory

from distplat.platform.spec import Job
from distplat.strategies.task import Task
from distplat.strategies.verification.references import references
from distplat.strategies.verification.verdicts import Row, judge


def rows(task_type: type[Task], job: Job) -> dict[str, Row]:
    """Verify in memory; return the rows of the report by check."""
    report = judge(job, references(job, task_factory(task_type)), engine(task_type))
    return {row.check: row for row in report}
