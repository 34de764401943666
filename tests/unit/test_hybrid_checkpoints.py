"""Checkpoints of cut models: any grid resumes from any other, the same grid bit-identically."""

from functools import cache
from typing import Any

import pytest
import torch
from comparison import distance
from hybrid_models import (
    GPT_PLAN,
    INCEPTION_PLAN,
    Gpt,
    NormedInception,
    grid_of,
    hybrid_job,
    merge_parts,
)
from local_run import LocalRun, train
from torch import Tensor

from distplat.platform.spec import Job
from distplat.platform.tensor_slices import assemble_tensors, group_by_file
from distplat.strategies.checkpoint.checkpoint_types import ALL
from distplat.strategies.checkpoint.parts import model_part
from distplat.strategies.loop.snapshot_publisher import part_copy
from distplat.strategies.task import Task

HALF, STEPS = 2, 4
PS_SYNC = {"data_strategy": "ps-sync", "num_servers": 2}
ADAM = {"name": "AdamW", "lr": 0.01}

GRIDS: dict[str, tuple[dict[str, Any], int]] = {
    "1x2x2": grid_of(1, 2, 2, tensor_plan=GPT_PLAN),
    "2x2x1": grid_of(2, 2, 1, tensor_plan=GPT_PLAN),
    "2x1x2": grid_of(2, 1, 2),
    "1x2x2 ps-sync": grid_of(1, 2, 2, tensor_plan=GPT_PLAN, **PS_SYNC),
    "2x1x2 ps-sync": grid_of(2, 1, 2, **PS_SYNC),
    "ring": ({"name": "ring"}, 2),
    "ps-sync": ({"name": "ps-sync", "num_servers": 2}, 2),
    "one process": ({"name": "ring"}, 1),
}


def job(grid: str, **overrides: Any) -> Job:
    options, workers = GRIDS[grid]
    fields: dict[str, Any] = {"steps": STEPS, "checkpoint": {"every_steps": HALF}, **overrides}
    return hybrid_job(options, workers, **fields)


@cache
def uninterrupted(grid: str) -> LocalRun:
    return train(job(grid), Gpt)


def model_of(run: LocalRun) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in merge_parts(run).items()}


@pytest.mark.sweep(16)
@pytest.mark.parametrize("to", GRIDS)
@pytest.mark.parametrize("origin", ["1x2x2", "2x2x1", "1x2x2 ps-sync", "2x1x2 ps-sync"])
def test_any_grid_resumes_from_any_other(origin: str, to: str) -> None:
    """With SGD and momentum: the checkpoint must contain the momentum of the whole model."""
    saved = uninterrupted(origin).checkpoints[HALF]
    resumed = train(job(to), Gpt, saved=saved)
    expected = model_of(uninterrupted(origin))
    assert distance(model_of(resumed), expected) < 1e-6
    if to == origin:
        found = model_of(resumed)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    # The last checkpoint contains the whole model, whichever grid wrote it.
    last = resumed.checkpoints[STEPS]._load("model")
    assert {name: merge_parts.shape for name, merge_parts in last.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }


@pytest.mark.parametrize("grid", ["1x2x2", "2x2x1", "2x1x2", "1x2x2 ps-sync", "ring"])
def test_published_parts_form_the_whole_model(grid: str) -> None:
    """`distplat.weights` assembles it from the ranks of one group, here at the last version."""
    run = uninterrupted(grid)
    group_ranks = range(run.roles.group_size)
    assert len(group_ranks) == (GRIDS[grid][0].get("pipeline", 1) * GRIDS[grid][0].get("tensor", 1))
    copies = [
        part_copy(model_part(p.flat, p.holding or ALL))
        for p in (run.ranks[rank].prepared for rank in group_ranks)
    ]
    found, expected = group_by_file(assemble_tensors(copies))["model"], model_of(run)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].data.tobytes() == tensor.contiguous().numpy().tobytes()


SAME_GRID: list[tuple[type[Task], tuple[dict[str, Any], int]]] = [
    (NormedInception, grid_of(1, 2, 2, tensor_plan=INCEPTION_PLAN)),
    (NormedInception, grid_of(2, 2, 1, tensor_plan=INCEPTION_PLAN)),
    (NormedInception, grid_of(1, 2, 2, tensor_plan=INCEPTION_PLAN, **PS_SYNC)),
    (Gpt, grid_of(2, 2, 1, tensor_plan=GPT_PLAN, **PS_SYNC)),
]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("task_type", "grid"), SAME_GRID, ids=str)
def test_same_grid_resumes_bit_identically(
    task_type: type[Task], grid: tuple[dict[str, Any], int]
) -> None:
    """Covers AdamW's moments and step, and running statistics of a branch on one rank."""
    fields: dict[str, Any] = {
        "steps": STEPS,
        "checkpoint": {"every_steps": HALF},
        "optimizer": ADAM,
    }
    spec = hybrid_job(*grid, clip_norm=0.5, **fields)
    run = train(spec, task_type)
    resumed = train(spec, task_type, saved=run.checkpoints[HALF])
    expected, found = model_of(run), model_of(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    fresh = train(hybrid_job(*grid, clip_norm=0.5, **{**fields, "steps": HALF}), task_type)
    assert distance(model_of(fresh), expected) > 1e-3, "the second half changes the model"
