"""The comparison with a plain loop detects each fault that is injected into the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from drawn_runs import train_and_compare
from drawn_tasks import DrawnRun
from in_memory_engine import engine, task_factory

from distplat.cli.verify import exit_code
from distplat.strategies.loop.compute import WholeModel
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model import optim
from distplat.strategies.model.model_state import ModelState
from distplat.strategies.model.optim import FlatOptimizer
from distplat.strategies.ring_worker import RingWorker
from distplat.strategies.server import dense_store
from distplat.strategies.verification.references import references
from distplat.strategies.verification.verdicts import judge

MOMENTUM = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
ADAM = {"name": "Adam", "lr": 0.02}
DECAY = {"name": "AdamW", "lr": 0.1, "weight_decay": 0.1}
RING = DrawnRun(optimizer=MOMENTUM)
SERVERS = replace(RING, strategy="ps-sync")

Patch = pytest.MonkeyPatch


def lose_earlier_micro_batches(patch: Patch) -> None:
    original = WholeModel.__init__

    def init(self: Any, prepared: Any, last_backward: Any, *args: Any) -> None:
        def forget() -> None:
            self.flat.grads.zero_()
            last_backward()

        original(self, prepared, forget, *args)

    patch.setattr(WholeModel, "__init__", init)


def after_gradients(patch: Patch, fault: Callable[[Any], None]) -> None:
    original = WholeModel.gradients

    def gradients(self: Any, step: int, clock: Any) -> Any:
        share = original(self, step, clock)
        fault(self)
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
    original = FlatOptimizer.step

    def step(self: Any, rates: Any, present: Any = None, **options: Any) -> None:
        self.load({})
        original(self, rates, present, **options)

    patch.setattr(FlatOptimizer, "step", step)


def treat_all_as_present(patch: Patch) -> None:
    original = FlatOptimizer.step

    def step(self: Any, rates: Any, present: Any = None, **options: Any) -> None:
        original(self, rates, **options)

    patch.setattr(FlatOptimizer, "step", step)


def share_step_counts(patch: Patch) -> None:
    original = FlatOptimizer._save_scalar

    def save_scalar(self: Any, name: str, run: Any, value: Any) -> None:
        original(self, name, run, value)
        self._scalars[name][:] = value

    patch.setattr(FlatOptimizer, "_save_scalar", save_scalar)


def fuse_all_dtypes(patch: Patch) -> None:
    patch.setattr(optim, "FUSED_TYPES", {"bfloat16", "float32", "float64"})


def ignore_weights(patch: Patch) -> None:
    patch.setattr(StepControl, "scale", property(lambda self: 1.0))


def skip_buffer_synchronization(patch: Patch) -> None:
    patch.setattr(ModelState, "synchronize", lambda self, step, changed=None: None)


def use_the_next_rate(patch: Patch) -> None:
    original = optim.rate_of
    patch.setattr(optim, "rate_of", lambda job, step, steps: original(job, step + 1, steps))


def omit_a_rank(patch: Patch) -> None:
    original = dense_store.sum_in_order  # type: ignore[attr-defined]
    patch.setattr(dense_store, "sum_in_order", lambda parts, out: original(parts[:-1], out))


def change_frozen_parameters(patch: Patch) -> None:
    original = RingWorker.update

    def update(self: Any, step: int, total: Any) -> None:
        original(self, step, total)
        for parameter in self._flat.model.parameters():
            if not parameter.requires_grad:
                parameter.data.mul_(1.001)

    patch.setattr(RingWorker, "update", update)


FAULTS: dict[str, tuple[Callable[[Patch], None], DrawnRun]] = {
    "earlier micro-batches are lost": (lose_earlier_micro_batches, replace(RING, accumulation=2)),
    "a rank counts twice": (count_a_rank_twice, RING),
    "each rank clips its own part": (clip_on_each_rank, replace(RING, clip_norm=0.05)),
    "momentum starts anew in each step": (forget_momentum, RING),
    "the same, on servers": (forget_momentum, SERVERS),
    "bias corrections start anew": (forget_momentum, replace(RING, optimizer=ADAM)),
    "the learning rate is a step ahead": (
        use_the_next_rate,
        replace(RING, lr_schedule={"name": "linear"}),
    ),
    "a server leaves a rank out": (omit_a_rank, SERVERS),
    "frozen parameters move": (change_frozen_parameters, replace(RING, blocks=("frozen",))),
    "parameters without a gradient decay": (
        treat_all_as_present,
        replace(RING, blocks=("unused",), optimizer=DECAY),
    ),
    "the same, on servers, by momentum": (
        treat_all_as_present,
        replace(SERVERS, blocks=("sometimes",)),
    ),
    "all parameters share one count of steps": (
        share_step_counts,
        replace(RING, blocks=("sometimes",), optimizer=ADAM),
    ),
    "bfloat16 is never updated": (
        fuse_all_dtypes,
        replace(RING, blocks=("narrow",), narrow="bfloat16", optimizer={"name": "SGD", "lr": 1.0}),
    ),
    "weights of the loss are ignored": (ignore_weights, replace(RING, weighted=True)),
    "buffers are each rank's own": (skip_buffer_synchronization, replace(RING, blocks=("counts",))),
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("fault", FAULTS)
def test_injected_fault_is_detected(fault: str, monkeypatch: Patch) -> None:
    inject, drawn = FAULTS[fault]
    assert not train_and_compare(drawn).diverges
    inject(monkeypatch)
    assert train_and_compare(drawn).diverges


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "fault",
    [
        "earlier micro-batches are lost",
        "parameters without a gradient decay",
        "weights of the loss are ignored",
        "buffers are each rank's own",
    ],
)
def test_verify_exits_with_1(fault: str, monkeypatch: Patch) -> None:
    inject, drawn = FAULTS[fault]
    assert verify_exit_code(drawn) == 0
    inject(monkeypatch)
    assert verify_exit_code(drawn) == 1


def verify_exit_code(drawn: DrawnRun) -> int:
    """Return the exit code of `distplat verify`."""
    job, task_class = drawn.job(), drawn.task()
    return exit_code(judge(job, references(job, task_factory(task_class)), engine(task_class)))
