"""Which lists a stage follows: a schedule's, or another for what the schedule does not take."""

from collections.abc import Callable
from functools import lru_cache

from distplat.strategies.algorithms.schedule import Action, Kind, Schedule, build
from distplat.strategies.algorithms.schedule_messages import Plan, with_communication


@lru_cache(maxsize=16)  # an epoch's last batch may have fewer micro-batches than the others
def training_plan(name: str, stages: int, micro_batches: int, chunks: int) -> Plan:
    """
    Give the plan of a step.

    `interleaved` takes multiples of its stages only; a short batch goes through all chunks forward,
    then through all backward.
    """
    if name == "interleaved" and micro_batches % stages:
        return with_communication(flushed(stages, micro_batches, chunks))
    return with_communication(build(name, stages, micro_batches, chunks))


def flushed(stages: int, micro_batches: int, chunks: int) -> Schedule:
    """
    Give GPipe's order over several chunks; any number of micro-batches.

        F0 F1 F2 .  F0' F1' F2' .  .   B0' B1' B2' .  B0 B1 B2
        .  F0 F1 F2 .   F0' F1' F2' B0' B1' B2' .  B0 B1 B2 .
    """
    every = [(chunk, i) for chunk in range(chunks) for i in range(micro_batches)]
    back = [(chunk, i) for chunk in reversed(range(chunks)) for i in range(micro_batches)]
    order = (
        *(Action(Kind.FORWARD, i, chunk) for chunk, i in every),
        *(Action(Kind.BACKWARD, i, chunk) for chunk, i in back),
    )
    return Schedule("flushed", micro_batches, chunks, False, (order,) * stages)


@lru_cache(maxsize=16)
def evaluation_plan(stages: int, micro_batches: int, chunks: int) -> Plan:
    """Give the plan of forwards alone; in groups of as many as there are stages, to hold few."""
    order = [
        Action(Kind.FORWARD, i, chunk)
        for start in range(0, micro_batches, stages)
        for chunk in range(chunks)
        for i in range(start, min(start + stages, micro_batches))
    ]
    schedule = Schedule("evaluation", micro_batches, chunks, False, (tuple(order),) * stages)
    return with_communication(schedule)


PlanOf = Callable[[int], Plan]
"""The plan for a number of micro-batches."""
