"""
Asynchronous parameter server: workers do not wait for each other (Dean et al., NIPS 2012).

A worker leases tasks, which are parts of a step's batch, and pushes the gradient of each task. Each
shard applies the gradient immediately and returns its newest parameters. No worker waits for a slow
one, which gets fewer tasks. The price is staleness: a gradient may be applied to newer parameters
than it was computed from. `staleness` bounds how far workers drift apart (stale synchronous
parallel, Ho et al., NIPS 2013), and two options compensate for the remaining staleness. See
docs/parameter_server.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from distplat.platform.errors import Problem
from distplat.platform.fields import Flag, NonNegative
from distplat.platform.spec import Consistency, Job
from distplat.strategies.catalog import register
from distplat.strategies.strategy_spec import GroupSpec, Roles, ServerOptions, Strategy

Bound = Annotated[int, Field(ge=0, strict=True)]


class PsAsyncOptions(ServerOptions):
    """Options of `ps-async`."""

    staleness: Literal["unbounded"] | Bound = "unbounded"
    """Steps by which a leased task may be ahead of the oldest unfinished task."""
    staleness_lr: Flag = False
    """Divide the learning rate by the number of updates between pull and push."""
    delay_compensation: NonNegative = 0.0
    """Lambda of DC-ASGD's compensation for these updates; 0: none. Try 0.04 to 2."""


@register("ps-async")
class PsAsync(Strategy[PsAsyncOptions]):
    """Push gradients that servers apply immediately, and continue with the newest parameters."""

    summary = "asynchronous data parallel: sharded parameter server, workers at their own pace"
    worker: ClassVar[str | type] = "distplat.strategies.ps_async_worker:PsAsyncWorker"
    has_checkpoints = True
    scales_loss = True
    averages = True
    options_type = PsAsyncOptions

    @override
    def roles(self, job: Job) -> Roles:
        """Return the server group, and for a train function a collective group."""
        options = self.options
        consistency = Consistency(
            asynchronous=True,
            bound=None if options.staleness == "unbounded" else options.staleness,
            staleness_lr=options.staleness_lr,
            delay_compensation=options.delay_compensation,
            own_loop=job.own_loop,
        )
        limit_s, setting = job.failure.step_timeout_s, "failure.step_timeout_s"
        group = GroupSpec(timeout_s=limit_s, setting=setting) if job.own_loop else None
        return options.roles(consistency, collective=group)

    @override
    def own_loop_problems(self, job: Job) -> list[Problem]:
        """Reject `replication`: a train function restarts on all workers when a server is lost."""
        if self.options.replication == 1:
            return []
        text = "is for tasks: all workers of a train function restart when a server is lost"
        return [Problem(("strategy", "replication"), text, "remove it")]

    @override
    def survives_worker_loss(self) -> bool:
        """Return True: the servers hold all state."""
        return True
