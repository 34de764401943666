"""Pipeline schedules: the drawings above their code, what their sources say, their limits."""

import inspect
from collections.abc import Callable

import pytest
from drawn_schedules import CELL, action, schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from distplat.platform.errors import SpecError
from distplat.strategies.algorithms.pipeline_schedule import (
    NAMES,
    Action,
    ActionKind,
    PipelineSchedule,
    build,
    gpipe,
    interleaved,
    one_f_one_b,
    zero_bubble_h1,
)
from distplat.strategies.algorithms.simulate import Costs, simulate

Rows = list[list[tuple[int, Action]]]
"""Of each stage, when which action starts."""


def drawing(function: Callable[..., PipelineSchedule]) -> Rows:
    """Read the rows of a docstring that have nothing but cells."""
    rows: Rows = []
    for line in (inspect.getdoc(function) or "").splitlines():
        cells = line.split()
        if cells and all(cell == "." or CELL.fullmatch(cell) for cell in cells):
            rows.append([(at, action(cell)) for at, cell in enumerate(cells) if cell != "."])
    return rows


DRAWN: list[tuple[Callable[..., PipelineSchedule], PipelineSchedule]] = [
    (gpipe, gpipe(4, 4)),
    (one_f_one_b, one_f_one_b(4, 6)),
    (interleaved, interleaved(2, 4, 2)),
    (zero_bubble_h1, zero_bubble_h1(3, 5)),
]


@pytest.mark.parametrize(("function", "schedule"), DRAWN, ids=[s.name for _, s in DRAWN])
def test_the_drawing_is_what_the_code_does(
    function: Callable[..., PipelineSchedule], schedule: PipelineSchedule
) -> None:
    """Order and times, with every action one unit long."""
    unit = schedule.chunks
    weight = unit if schedule.splits_backward else 0
    spans = simulate(schedule, Costs(unit, unit, weight)).spans
    assert drawing(function) == [[(s.start, s.action) for s in row] for row in spans]


@settings(deadline=None)
@given(schedules())
def test_every_action_once_and_after_what_it_needs(schedule: PipelineSchedule) -> None:
    kinds = [ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.WEIGHT][
        : 3 if schedule.splits_backward else 2
    ]
    every = {
        Action(kind, i, chunk)
        for kind in kinds
        for i in range(schedule.micro_batches)
        for chunk in range(schedule.chunks)
    }
    for order in schedule.actions:
        assert len(order) == len(every) and set(order) == every
        at = {one: number for number, one in enumerate(order)}
        for one in every:
            chain = [at[Action(kind, one.micro_batch, one.chunk)] for kind in kinds]
            assert chain == sorted(chain)


@settings(deadline=None)
@given(schedules())
def test_gradients_are_added_in_the_order_of_the_micro_batches(schedule: PipelineSchedule) -> None:
    adds = ActionKind.WEIGHT if schedule.splits_backward else ActionKind.BACKWARD
    for order in schedule.actions:
        for chunk in range(schedule.chunks):
            added = [a.micro_batch for a in order if a.kind is adds and a.chunk == chunk]
            assert added == list(range(schedule.micro_batches))


@given(st.integers(1, 8), st.integers(1, 32))
def test_peak_activations(p: int, m: int) -> None:
    assert gpipe(p, m).peak_activations() == [m] * p
    assert one_f_one_b(p, m).peak_activations() == [min(p - s, m) for s in range(p)]
    assert zero_bubble_h1(p, m).peak_activations() == [min(p, m)] * p


@pytest.mark.parametrize(("stage", "ahead"), [(0, 10), (1, 8), (2, 6), (3, 4)])
def test_interleaved_has_the_warm_up_of_megatron(stage: int, ahead: int) -> None:
    """2 (p - s - 1) + (v - 1) p, then F and B in turn."""
    order = interleaved(4, 8, 2).actions[stage]
    first_backward = next(k for k, one in enumerate(order) if one.kind is ActionKind.BACKWARD)
    assert first_backward == ahead + 1


def test_interleaved_micro_batches_go_in_groups_through_the_chunks() -> None:
    forwards = [a for a in interleaved(2, 4, 3).actions[0] if a.kind is ActionKind.FORWARD]
    assert " ".join(map(str, forwards)) == "F0 F1 F0' F1' F0'' F1'' F2 F3 F2' F3' F2'' F3''"


def test_chunks_are_numbered_along_the_model() -> None:
    schedule = interleaved(2, 2, 2)
    virtual_stages = [
        schedule.virtual_stage(s, Action(ActionKind.FORWARD, 0, c))
        for c in range(2)
        for s in range(2)
    ]
    assert virtual_stages == list(range(schedule.depth)) == [0, 1, 2, 3]
    assert [schedule.stage_of(virtual_stage) for virtual_stage in virtual_stages] == [0, 1, 0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_build_knows_every_name(name: str) -> None:
    assert build(name, 2, 4).name == name


def test_build_takes_chunks() -> None:
    assert build("interleaved", 2, 4).chunks == 2
    assert build("interleaved", 2, 4, 4).chunks == 4
    assert build("1f1b", 2, 4, 1).chunks == 1


def test_an_unknown_name_has_a_near_one() -> None:
    with pytest.raises(SpecError, match=r"did you mean '1f1b'.* allowed: 1f1b, gpipe, inter"):
        build("1f1", 2, 4)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("gpipe", (0, 4, None), "at least one stage and one micro-batch"),
        ("1f1b", (4, 0, None), "at least one stage and one micro-batch"),
        ("interleaved", (4, 10, 2), "multiples of its 4 stages, got 10: use 8 or 12, or 1f1b"),
        ("interleaved", (4, 3, 2), "got 3: use 4, or 1f1b"),
        ("interleaved", (4, 8, 1), "2 or more virtual stages, got 1; 1f1b has one"),
        ("gpipe", (4, 8, 2), "one virtual stage per stage, got 2: use interleaved"),
    ],
)
def test_what_cannot_be_says_what_can(
    name: str, sizes: tuple[int, int, int | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, *sizes)
