"""Faults that were planted into the engine: the comparison with a plain loop finds each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from drawn_tasks import Drawn
from test_property_training import met

from distplat.strategies.ring import Ring
from distplat.strategies.training import optim, shard
from distplat.strategies.training.compute import WholeModel
from distplat.strategies.training.control import StepControl

MOMENTUM = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
ADAM = {"name": "Adam", "lr": 0.02}
RING = Drawn(optimizer=MOMENTUM)
SERVERS = replace(RING, strategy="ps-sync")

Patch = pytest.MonkeyPatch


def lose_earlier_micro_batches(patch: Patch) -> None:
    def last_backward(self: Any, step: int) -> None:
        self.flat.grads.zero_()
        self.strategy.last_backward(step)

    patch.setattr(WholeModel, "_last_backward", last_backward)


def after_gradients(patch: Patch, do: Callable[[Any], None]) -> None:
    original = WholeModel.gradients

    def gradients(self: Any, step: int, clock: Any) -> Any:
        share = original(self, step, clock)
        do(self)
        return share

    patch.setattr(WholeModel, "gradients", gradients)


def count_a_rank_twice(patch: Patch) -> None:
    after_gradients(patch, lambda work: work.flat.grads.mul_(2.0 if work.rank == 0 else 1.0))


def clip_on_each_rank(patch: Patch) -> None:
    def clip(work: Any) -> None:
        norm = float(work.flat.grads.norm())
        work.flat.grads.mul_(min(1.0, work.job.clip_norm / (norm + 1e-6)))

    after_gradients(patch, clip)


def forget_momentum(patch: Patch) -> None:
    original = optim.FlatOptimizer.step

    def step(self: optim.FlatOptimizer, lr: float, present: optim.Presence = None) -> None:
        self.load({})
        original(self, lr, present)

    patch.setattr(optim.FlatOptimizer, "step", step)


def take_the_next_rate(patch: Patch) -> None:
    original = optim.factor  # type: ignore[attr-defined]
    patch.setattr(
        optim, "factor", lambda schedule, step, steps: original(schedule, step + 1, steps)
    )


def leave_a_rank_out(patch: Patch) -> None:
    original = shard.sum_in_order  # type: ignore[attr-defined]
    patch.setattr(shard, "sum_in_order", lambda parts, out: original(parts[:-1], out))


def move_frozen_parameters(patch: Patch) -> None:
    original = Ring.update

    def update(self: Any, step: int, total: StepControl) -> None:
        original(self, step, total)
        for parameter in self._flat.model.parameters():
            if not parameter.requires_grad:
                parameter.data.mul_(1.001)

    patch.setattr(Ring, "update", update)


FAULTS: dict[str, tuple[Callable[[Patch], None], Drawn]] = {
    "only the last micro-batch counts": (
        lose_earlier_micro_batches,
        replace(RING, accumulation=2),
    ),
    "a rank counts twice": (count_a_rank_twice, RING),
    "each rank clips its own part": (clip_on_each_rank, replace(RING, clip_norm=0.05)),
    "momentum starts anew in each step": (forget_momentum, RING),
    "the same, on servers": (forget_momentum, SERVERS),
    "bias corrections start anew": (forget_momentum, replace(RING, optimizer=ADAM)),
    "the learning rate is a step ahead": (
        take_the_next_rate,
        replace(RING, lr_schedule={"name": "linear"}),
    ),
    "a server leaves a rank out": (leave_a_rank_out, SERVERS),
    "frozen parameters move": (move_frozen_parameters, replace(RING, blocks=("frozen",))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: Patch) -> None:
    plant, drawn = FAULTS[fault]
    assert not met(drawn).parts
    plant(monkeypatch)
    assert met(drawn).parts
