"""
Asynchronous parameter server: every worker at its own pace (Dean et al., NIPS 2012).

A worker leases tasks, parts of a step's batch, and pushes the gradient of each; each shard applies
it at once and gives its newest parameters back. Nobody waits for a slow worker, which gets fewer
tasks, at the price of gradients that are old when their turn comes. `staleness` bounds how far
workers run apart (stale synchronous parallel, Ho et al., NIPS 2013); two options correct for what
is left. See docs/parameter_server.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from distplat.platform.errors import Problem
from distplat.platform.fields import Flag, NonNegative
from distplat.platform.spec import Consistency, Job
from distplat.strategies.catalog import register
from distplat.strategies.strategy_spec import GroupSpec, Roles, ServerOptions, Strategy

Bound = Annotated[int, Field(ge=0, strict=True)]


class PsAsyncOptions(ServerOptions):
    """Options of `ps-async`."""

    staleness: Literal["unbounded"] | Bound = "unbounded"
    """Steps that a leased task may be ahead of the oldest one that is not done."""
    staleness_lr: Flag = False
    """Divide the learning rate by the number of updates that came between pull and push."""
    delay_compensation: NonNegative = 0.0
    """Lambda of DC-ASGD's correction for these updates; 0: none. Try 0.04 to 2."""


@register("ps-async")
class PsAsync(Strategy[PsAsyncOptions]):
    """Push, have it applied, go on with the newest parameters."""

    summary = "asynchronous data parallel: sharded parameter server, workers at their own pace"
    worker: ClassVar[str | type] = "distplat.strategies.ps_async_worker:PsAsyncWorker"
    has_checkpoints = True
    scales_loss = True
    averages = True
    options_type = PsAsyncOptions

    def roles(self, job: Job) -> Roles:
        """Ask for the server group."""
        chosen = self.options
        consistency = Consistency(
            asynchronous=True,
            bound=None if chosen.staleness == "unbounded" else chosen.staleness,
            staleness_lr=chosen.staleness_lr,
            delay_compensation=chosen.delay_compensation,
            own_loop=job.own_loop,
        )
        limit_s, setting = job.failure.step_timeout_s, "failure.step_timeout_s"
        group = GroupSpec(timeout_s=limit_s, setting=setting) if job.own_loop else None
        return chosen.roles(consistency, collective=group)

    def own_loop_problems(self, job: Job) -> list[Problem]:
        """Refuse backups: all of a train function begin anew when a server is lost."""
        if self.options.replication == 1:
            return []
        text = "is for tasks: all workers of a train function begin anew when a server is lost"
        return [Problem(("strategy", "replication"), text, "remove it")]

    def survives_worker_loss(self) -> bool:
        """All state is the servers': a worker that was lost takes none with it."""
        return True
