"""Pipeline schedules drawn by hypothesis, and actions parsed from text."""

import re

from hypothesis import strategies as st

from distplat.strategies.algorithms.pipeline_schedule import (
    NAMES,
    Action,
    ActionKind,
    PipelineSchedule,
    build,
    interleaved,
)

CELL = re.compile(r"(?P<kind>[FBW])(?P<micro_batch>\d+)(?P<chunk>'*)")


def action(cell: str) -> Action:
    """Parse an action, such as `F3'`: forward of micro-batch 3, chunk 1."""
    found = CELL.fullmatch(cell)
    assert found, cell
    return Action(ActionKind(found["kind"]), int(found["micro_batch"]), len(found["chunk"]))


def schedules(
    max_stages: int = 8, max_micro_batches: int = 32
) -> st.SearchStrategy[PipelineSchedule]:
    """Return a hypothesis strategy of all schedules, with supported sizes."""

    def make(name: str, stages: int, micro_batches: int, chunks: int) -> PipelineSchedule:
        if name != "interleaved":
            return build(name, stages, micro_batches)
        rounded = max(1, micro_batches // stages) * stages
        return interleaved(stages, rounded, chunks)

    return st.builds(
        make,
        st.sampled_from(NAMES),
        st.integers(1, max_stages),
        st.integers(1, max_micro_batches),
        st.integers(2, 4),
    )
