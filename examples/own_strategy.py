"""
A custom strategy in one file: local SGD (Stich 2019, arXiv:1805.09767).

Every worker updates its own weights; once in `period` steps all weights are replaced by their mean,
so that workers communicate 1/period as often as with `ring`. Usage:

    distplat submit examples/digits/job.yaml --strategy-file examples/own_strategy.py \
        --strategy local-sgd --set strategy.period=4

With period 1 and SGD without momentum the strategy equals `ring`, since the mean of the updated
weights is equal to the weights updated by the mean gradient; a test checks this.
"""

from dataclasses import replace

from pydantic import Field

from distplat.strategy import (
    Context,
    GroupSpec,
    Job,
    Options,
    ReduceOp,
    Roles,
    StepControl,
    StopOrder,
    Strategy,
    WorkerStrategy,
    register,
    sum_heads,
)


class LocalSgdOptions(Options):
    """Options of `local-sgd`."""

    period: int = Field(8, ge=1, strict=True)
    """Steps between two averages."""


class LocalSgdWorker(WorkerStrategy[LocalSgdOptions]):
    """The worker's half: average weights instead of gradients."""

    def setup(self, context: Context) -> int:
        """Start from rank 0's weights, with a separate optimizer on each rank."""
        self.flat, self.collective = context.flat, context.collective
        self.collective.broadcast(self.flat.params)
        self.optimizer = context.local_optimizer()
        return 0

    def exchange(self, step: int, local: StepControl) -> StepControl:
        """Scale the local gradient to a mean; stop only in steps that synchronize all ranks."""
        self.flat.grads.mul_(self.collective.world)
        local = local.looked_at(self.flat)
        if self._meets(step):
            return replace(
                local, stop=sum_heads(local, self.collective, self.flat.params.device).stop
            )
        return replace(local, stop=StopOrder.NONE)

    def update(self, step: int, total: StepControl) -> None:
        """Update the local weights; average them at the end of each period."""
        if not total.skip:
            self.optimizer.step(step, total.present, total.scale)
        if self._meets(step):
            self.synchronize()

    def _meets(self, step: int) -> bool:
        return (step + 1) % self.options.period == 0

    def synchronize(self) -> None:
        """Replace the weights by their mean over all ranks."""
        self.collective.all_reduce(self.flat.params, ReduceOp.AVG)


@register("local-sgd")
class LocalSgd(Strategy[LocalSgdOptions]):
    """The driver's half: the options, and a group of all workers."""

    summary = "local SGD: workers update separately, weights are averaged every `period` steps"
    options_type = LocalSgdOptions
    worker = LocalSgdWorker

    def roles(self, job: Job) -> Roles:
        """Request a group of all workers."""
        return Roles(collective=GroupSpec())
