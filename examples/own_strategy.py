"""
A strategy of your own in one file: local SGD (Stich 2019, arXiv:1805.09767).

Every worker steps alone; once in `period` steps all weights are replaced by their mean, so the
network is used 1/period as often as with `ring`. Use it as it is:

    distplat submit examples/digits/job.yaml --strategy-file examples/own_strategy.py \
        --strategy local-sgd --set strategy.period=4

With period 1 and SGD without momentum it is the same as `ring`, for the mean of the updated
weights is the weights updated by the mean gradient; a test holds that.
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
    """What a worker runs: average weights, not gradients."""

    def setup(self, context: Context) -> int:
        """Start from rank 0's weights, with an optimizer of this rank's own."""
        self.flat, self.collective = context.flat, context.collective
        self.collective.broadcast(self.flat.params)
        self.optimizer = context.local_optimizer()
        return 0

    def exchange(self, step: int, local: StepControl) -> StepControl:
        """Keep the gradient here, as the mean of this rank's samples; stop only where all meet."""
        self.flat.grads.mul_(self.collective.world)
        local = local.looked_at(self.flat)
        if self._meets(step):
            return replace(
                local, stop=sum_heads(local, self.collective, self.flat.params.device).stop
            )
        return replace(local, stop=StopOrder.NONE)

    def update(self, step: int, total: StepControl) -> None:
        """Step alone; now and then meet."""
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
    """What the driver knows: the options, and that workers need a group."""

    summary = "local SGD: workers step alone, weights are averaged every `period` steps"
    options_type = LocalSgdOptions
    worker = LocalSgdWorker

    def roles(self, job: Job) -> Roles:
        """Ask for a group of all workers."""
        return Roles(collective=GroupSpec())
