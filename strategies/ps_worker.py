"""Base class of the workers of `ps-sync` and `ps-async`: servers compute the averaged weights."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from distplat.strategies.model.ema import with_average
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.ports import Shards
from distplat.strategies.strategy_spec import OptionsT
from distplat.strategies.worker_strategy import Context, WorkerStrategy


class PsWorker(WorkerStrategy[OptionsT]):
    """A worker whose parameters are stored on servers."""

    _context: Context  #: set by `setup`
    _shards: Shards  #: set by `setup`

    @override
    def average(self) -> Tensor:
        """Fetch each shard's average after its newest update."""
        return self._shards.average()

    @override
    def trained(self, flat: FlatModel) -> dict[str, Tensor]:
        """Return the model and its averaged weights; no other worker is needed."""
        if self._context.job.ema is None:
            return flat.state_dict()
        return with_average(flat, self.average())
