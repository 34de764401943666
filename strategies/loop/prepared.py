"""A worker's task, model and data: built before ranks connect, kept over all attempts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset

from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.checkpoint.checkpoint_types import Holding
from distplat.strategies.checkpoint.frozen_base import FrozenBase
from distplat.strategies.loop.agreement import RankFacts
from distplat.strategies.loop.losses import LossScale, TermWeights
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.model_state import ModelState
from distplat.strategies.model.parameter_layout import first_non_finite
from distplat.strategies.model.task_optimizer import ResettableOptimizers
from distplat.strategies.sparse.lookups import Lookups
from distplat.strategies.strategy_spec import Roles
from distplat.strategies.task import Task


@dataclass
class Prepared:
    """A worker's task, model and data."""

    job: Job
    task: Task
    model: torch.nn.Module | None
    """The full model until the strategy shards it; None: sharded, or never sharded."""
    data: Dataset[Any]
    eval_data: Dataset[Any] | None
    sampler: Sampler
    total_steps: int
    device: str
    roles: Roles
    """Roles of the strategy."""
    part: FlatModel | None = None
    """Parameters that this worker trains; None: the strategy has not sharded the model yet."""
    lookups: Lookups | None = None
    """Lookups in embedding tables; None: the model has no tables on servers."""
    state: ModelState | None = None
    """Buffers and frozen parameters of `part`; None before `join`."""
    facts: RankFacts | None = None
    """Fingerprints of model, data and code, compared between ranks; see `describe`."""
    made: ResettableOptimizers = ()
    """Optimizers that the task built; empty: the job names the optimizer."""
    weights: TermWeights | None = None
    """Weights of a loss with several terms, in the present attempt; None: one term."""
    loss_scale: LossScale | None = None
    """Loss scale of a run in float16; None: another precision."""
    frozen: FrozenBase | None = None
    """Frozen parameters that are not saved with `trained_only`; None: everything is saved."""
    initial: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Values of the job's `initial_weights`, while the model is on the `meta` device."""
    holding: Holding | None = None
    """Which shard of the model `part` is; None: the full model."""
    warnings: list[str] = field(default_factory=list)
    """Warnings that rank 0 logs."""

    @property
    def flat(self) -> FlatModel:
        """Parameters that this worker trains; set once the strategy has sharded the model."""
        assert self.part is not None, "join() comes first: the strategy shards the model"
        return self.part

    def not_finite(self) -> str | None:
        """Return the name of the first parameter with NaN or infinity; None: all are finite."""
        flat = self.flat
        slot = first_non_finite(flat.params, flat.segments, flat.layout.pieces)
        return None if slot is None else flat.name(slot)
