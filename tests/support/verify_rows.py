"""Results of `distplat verify` for a random job."""

from __future__ import annotations

from in_memory_engine import engine, make

from distplat.platform.spec import Job
from distplat.strategies.task import Task
from distplat.strategies.verification.references import references
from distplat.strategies.verification.verdicts import Row, judge


def rows(kind: type[Task], drawn: Job) -> dict[str, Row]:
    """Return the rows of the report, by check."""
    found = judge(drawn, references(drawn, make(kind)), engine(kind))
    return {row.check: row for row in found}
