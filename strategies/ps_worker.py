"""What workers of `ps-sync` and `ps-async` have in common: servers keep the average."""

from __future__ import annotations

from torch import Tensor

from distplat.strategies.model.ema import with_average
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.ports import Shards
from distplat.strategies.strategy_spec import OptionsT
from distplat.strategies.worker_strategy import Context, WorkerStrategy


class PsWorker(WorkerStrategy[OptionsT]):
    """A worker whose parameters are on servers."""

    _context: Context  #: there after `setup`
    _shards: Shards  #: as well

    def average(self) -> Tensor:
        """Fetch what each shard has after its newest update; a step costs workers nothing."""
        return self._shards.average()

    def trained(self, flat: FlatModel) -> dict[str, Tensor]:
        """Give the model and the average of its weights, which no other worker is needed for."""
        if self._context.job.ema is None:
            return flat.state_dict()
        return with_average(flat, self.average())
