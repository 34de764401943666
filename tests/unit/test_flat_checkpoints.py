"""Checkpoints of flat vectors: dtypes, and unused, frozen and task parameters."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from jobs import job_of
from torch import nn

from distplat.platform.errors import ProtocolError
from distplat.platform.tensor_slices import assemble_tensors, group_by_file
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart
from distplat.strategies.checkpoint.parts import as_array, model_part, optimizer_part
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.optim import FlatOptimizer
from distplat.strategies.model.optimizer_state import USED

UNUSED = "b.weight"


class Net(nn.Module):
    """Parameters of several dtypes and sizes; one layer is frozen, one parameter is empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(5, 7), nn.Linear(3, 2).double()
        self.c, self.d = nn.Linear(4, 4).bfloat16(), nn.Linear(2, 3).half()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0, 2))
        self.scale = nn.Parameter(torch.tensor(2.0))


def make_model(mixed: bool) -> FlatModel:
    net = Net() if mixed else Net().float()
    extra = {"task.log_var": nn.Parameter(torch.full((3,), 0.5))}
    return FlatModel(net, extra, unfreezes=True)


def optimizers(flat: FlatModel, cuts: int) -> list[tuple[tuple[int, int], FlatOptimizer]]:
    job = job_of(optimizer={"name": "NAdam", "lr": 0.01}, steps=9)
    size = -(-flat.size // cuts // 16) * 16
    bounds = [min(size * n, flat.size) for n in range(cuts)] + [flat.size]
    runs = list(itertools.pairwise(bounds))
    result = []
    for start, stop in runs:
        vectors = flat.params[start:stop], flat.grads[start:stop]
        result.append(FlatOptimizer(job.optimizer, *vectors, flat.layout.cut(start, stop)))
    return list(zip(runs, result, strict=True))


def train(flat: FlatModel, shards: list[Any], first: int, stop: int) -> None:
    for step in range(first, stop):
        flat.begin_step()
        flat.present[:] = [slot.name != UNUSED or step == 5 for slot in flat.slots]
        flat.present[-2:] = False  # the parameters at the end: the empty one and the task's
        for index in np.flatnonzero(flat.present):
            view = flat.slots[index].view(flat.grads)
            generator = torch.Generator().manual_seed(100 * step + int(index))
            view.copy_(torch.randn(view.shape, generator=generator))
        for _, optimizer in shards:
            optimizer.step([0.01], flat.present)


def saved_state(parts: list[CheckpointPart], step: int) -> SavedState:
    bundles = [([as_array(t.clone()) for t in part.tensors], part.entries) for part in parts]
    files = group_by_file(assemble_tensors(bundles))
    return SavedState({"step": step}, lambda name: files.get(name, {}))


def parts_of(flat: FlatModel, shards: list[Any]) -> list[CheckpointPart]:
    return [model_part(flat)] + [
        optimizer_part(flat, optimizer.state(), start) for (start, _), optimizer in shards
    ]


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 2)])
def test_resume_with_other_shards_matches_an_uninterrupted_run(
    mixed: bool, before: int, after: int
) -> None:
    whole = make_model(mixed)
    train(whole, optimizers(whole, 1), 0, 7)
    first = make_model(mixed)
    shards = optimizers(first, before)
    train(first, shards, 0, 4)
    first.model.get_parameter("frozen.bias").fill_(4.0)  # as a forward pass may
    state = saved_state(parts_of(first, shards), 4)

    second = make_model(mixed)
    second.params.zero_()
    state.load_model(second)
    assert second.version == 4
    assert second.model.get_parameter("frozen.bias").eq(4.0).all()
    assert second.slots[-1].view(second.params).eq(4.0).all()
    new_shards = optimizers(second, after)
    for run, optimizer in new_shards:
        optimizer.load(state.optimizer(second, *run))
    train(second, new_shards, 4, 7)
    for slot in whole.slots[:-2]:
        assert torch.equal(slot.view(whole.params), slot.view(second.params)), slot.name


def test_names_and_shapes_of_tensors() -> None:
    flat = make_model(True)
    shards = optimizers(flat, 3)
    train(flat, shards, 0, 2)
    state = saved_state(parts_of(flat, shards), 2)
    model, optimizer = state._load("model"), state._load("optimizer")
    assert {name: whole.shape for name, whole in model.items()} == {
        name: tuple(value.shape) for name, value in flat.state_dict().items()
    }
    assert model["task.log_var"].dtype == "float32" and model["c.weight"].dtype == "bfloat16"
    trained = [slot.name for slot in flat.slots[:-2] if slot.name != UNUSED]
    keys = ("exp_avg", "exp_avg_sq", "step", "mu_product")
    assert {*optimizer} == {f"{key}/{name}" for key in keys for name in trained}
    assert optimizer["step/a.weight"].shape == ()
    assert not state.optimizer(flat)[USED][flat.trained_slots.index(slot_of(flat, UNUSED))]


def slot_of(flat: FlatModel, name: str) -> Any:
    return next(slot for slot in flat.slots if slot.name == name)


def test_shards_at_different_steps_make_no_checkpoint() -> None:
    """
    Two asynchronous shards hold parts of a parameter. One has applied its first gradient, the other
    is a step behind.
    """
    flat = make_model(False)
    shards = optimizers(flat, 5)
    train(flat, shards, 0, 1)
    parts = parts_of(flat, shards)
    keys = [{e.key for e in part.entries} for part in parts[1:]]
    [(name, late)] = [
        (name, index + 1)
        for index in range(4)
        for name in keys[index] & keys[index + 1]
        if name.startswith("optimizer/exp_avg/")
    ][:1]
    entries = tuple(e for e in parts[late].entries if e.key != name)
    parts[late] = CheckpointPart(parts[late].tensors, entries)
    with pytest.raises(ProtocolError, match=name):
        saved_state(parts, 1)
