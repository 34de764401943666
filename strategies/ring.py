"""
Ring all-reduce: data parallel without a centre (Patarasu & Yuan 2009; Gibiansky 2017).

Every worker holds the whole model and optimizer. Gradients are summed around a ring in which each
rank sends 2(N-1)/N of their size whatever N is; then every rank makes the same update.
"""

from typing import Literal

from pydantic import Field

from distplat.platform.fields import Seconds
from distplat.platform.spec import Job
from distplat.strategies.base import Context, Options, Roles, Strategy
from distplat.strategies.catalog import strategies


class RingOptions(Options):
    """Options of `ring`."""

    backend: Literal["gloo"] = "gloo"
    """Transport of the collective group."""
    timeout_s: Seconds = Field(60.0)
    """Deadline of one all-reduce; the error names the ranks that did not come."""


@strategies.register("ring")
class Ring(Strategy[RingOptions]):
    """Sum gradients over all workers, then update everywhere alike."""

    summary = "synchronous data parallel: ring all-reduce between workers, no server"
    options_type = RingOptions

    def roles(self, job: Job) -> Roles:
        """Ask for one group of all workers."""
        return Roles(collective=self.options.backend, collective_timeout_s=self.options.timeout_s)

    def setup(self, context: Context) -> None:
        """Start all ranks from rank 0's parameters, whatever their own initialisation gave."""
        self.flat, self.collective = context.flat, context.collective
        self.collective.broadcast(self.flat.params)
        self.optimizer = context.local_optimizer()

    def exchange(self, step: int) -> None:
        """Sum the gradients; each rank's are already weighted by its share of the batch."""
        self.collective.all_reduce(self.flat.grads)

    def update(self, step: int) -> None:
        """Make the same update on every rank."""
        self.optimizer.step(step)
