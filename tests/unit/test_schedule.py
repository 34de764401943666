"""Pipeline schedules: the drawings in their docstrings, properties from the papers, limits."""

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
"""Start time and action of each cell, per stage."""


def drawing(function: Callable[..., PipelineSchedule]) -> Rows:
    """Parse the lines of a docstring that contain only cells."""
    rows: Rows = []
    for line in (inspect.getdoc(function) or "").splitlines():
        cells = line.split()
        if cells and all(cell == "." or CELL.fullmatch(cell) for cell in cells):
            rows.append([(time, action(cell)) for time, cell in enumerate(cells) if cell != "."])
    return rows


DRAWINGS: list[tuple[Callable[..., PipelineSchedule], PipelineSchedule]] = [
    (gpipe, gpipe(4, 4)),
    (one_f_one_b, one_f_one_b(4, 6)),
    (interleaved, interleaved(2, 4, 2)),
    (zero_bubble_h1, zero_bubble_h1(3, 5)),
]


@pytest.mark.parametrize(("function", "schedule"), DRAWINGS, ids=[s.name for _, s in DRAWINGS])
def test_schedule_matches_its_drawing(
    function: Callable[..., PipelineSchedule], schedule: PipelineSchedule
) -> None:
    """Order and times, with every action one unit long."""
    unit = schedule.chunks
    weight = unit if schedule.splits_backward else 0
    spans = simulate(schedule, Costs(unit, unit, weight)).spans
    assert drawing(function) == [[(s.start, s.action) for s in row] for row in spans]


@settings(deadline=None)
@given(schedules())
def test_each_action_occurs_once_after_its_inputs(schedule: PipelineSchedule) -> None:
    kinds = [ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.WEIGHT][
        : 3 if schedule.splits_backward else 2
    ]
    expected = {
        Action(kind, i, chunk)
        for kind in kinds
        for i in range(schedule.micro_batches)
        for chunk in range(schedule.chunks)
    }
    for order in schedule.actions:
        assert len(order) == len(expected) and set(order) == expected
        index = {action_: number for number, action_ in enumerate(order)}
        for action_ in expected:
            chain = [index[Action(kind, action_.micro_batch, action_.chunk)] for kind in kinds]
            assert chain == sorted(chain)


@settings(deadline=None)
@given(schedules())
def test_gradients_accumulate_in_order_of_micro_batches(schedule: PipelineSchedule) -> None:
    accumulating = ActionKind.WEIGHT if schedule.splits_backward else ActionKind.BACKWARD
    for order in schedule.actions:
        for chunk in range(schedule.chunks):
            micro_batches = [
                a.micro_batch for a in order if a.kind is accumulating and a.chunk == chunk
            ]
            assert micro_batches == list(range(schedule.micro_batches))


@given(st.integers(1, 8), st.integers(1, 32))
def test_peak_activations(p: int, m: int) -> None:
    assert gpipe(p, m).peak_activations() == [m] * p
    assert one_f_one_b(p, m).peak_activations() == [min(p - s, m) for s in range(p)]
    assert zero_bubble_h1(p, m).peak_activations() == [min(p, m)] * p


@pytest.mark.parametrize(("stage", "warm_up"), [(0, 10), (1, 8), (2, 6), (3, 4)])
def test_interleaved_has_warm_up_of_megatron(stage: int, warm_up: int) -> None:
    """2 (p - s - 1) + (v - 1) p forwards, then F and B alternate."""
    order = interleaved(4, 8, 2).actions[stage]
    first_backward = next(
        index for index, action_ in enumerate(order) if action_.kind is ActionKind.BACKWARD
    )
    assert first_backward == warm_up + 1


def test_interleaved_runs_micro_batches_in_groups() -> None:
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
def test_build_accepts_every_name(name: str) -> None:
    assert build(name, 2, 4).name == name


def test_build_with_chunks() -> None:
    assert build("interleaved", 2, 4).chunks == 2
    assert build("interleaved", 2, 4, 4).chunks == 4
    assert build("1f1b", 2, 4, 1).chunks == 1


def test_unknown_name_suggests_similar_name() -> None:
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
def test_invalid_sizes_suggest_valid_sizes(
    name: str, sizes: tuple[int, int, int | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, *sizes)
