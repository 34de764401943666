"""What a worker runs of `hybrid`: its part of the model, as one rank of the grid."""

from __future__ import annotations

from torch import Tensor, nn

from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart, Holding
from distplat.strategies.collective import Collective
from distplat.strategies.loop.compute import Compute
from distplat.strategies.loop.control import StepControl
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.meta import on_meta
from distplat.strategies.model.sync_batch_norm import refuse_sync_batch_norm
from distplat.strategies.pipeline.hybrid_options import HybridOptions
from distplat.strategies.pipeline.limits import refuse_weights
from distplat.strategies.pipeline.rank import PipelineRank
from distplat.strategies.task import Task
from distplat.strategies.worker_strategy import Context, WorkerStrategy


class HybridWorker(WorkerStrategy[HybridOptions]):
    """Compute a part of the model, and sum its gradients over the replicas."""

    cuts_model = True
    _rank: PipelineRank | None = None

    def build_model(self, task: Task) -> nn.Module:
        """Build the model, without values if the job says so."""
        refuse_weights(task)
        return task.model() if self.options.init == "build" else on_meta(task.model)

    def cut_model(
        self, prepared: Prepared, rank: int, collective: Collective | None
    ) -> tuple[FlatModel, Holding]:
        """Agree with the others where the model is cut, and take this rank's part."""
        assert collective is not None, "roles() asked for a group"
        if self._rank is None:
            if self.options.data > 1 and prepared.model is not None:
                why = "which `hybrid` does not compute over its replicas"
                refuse_sync_batch_norm(prepared.model, why, "use nn.BatchNorm, or `data: 1`")
            self._rank = PipelineRank(self.options, prepared, rank)
        return self._rank.take_part(collective), self._rank.holding

    def setup(self, context: Context) -> int:
        """Meet the other stages and the peers; take over what peers have that are further."""
        version = self._here.connect(context)
        self.replayed = self._here.replayed
        return version

    def compute(self, prepared: Prepared, context: Context) -> Compute:
        """Give this rank's part of the pipeline."""
        return self._here.pipeline

    def exchange(self, step: int, local: StepControl) -> StepControl:
        """Sum the gradients over the peers, and see that all ranks have come so far."""
        return self._here.exchange(step, local)

    def update(self, step: int, total: StepControl) -> None:
        """Update this rank's part."""
        self._here.update(step, total)

    def checkpoint(self, version: int) -> CheckpointPart:
        """Give each part of the model from its first replica."""
        return self._here.checkpoint(version)

    def figures(self) -> dict[str, float]:
        """Give the figures of pipeline and exchange."""
        return self._here.figures()

    def trained(self, flat: FlatModel) -> dict[str, Tensor]:
        """Give this rank's part of the model; of slices, the first gives all."""
        return self._here.trained()

    @property
    def _here(self) -> PipelineRank:
        assert self._rank is not None, "cut_model() comes first"
        return self._rank
