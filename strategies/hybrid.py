"""
Hybrid: a model too large for one worker, cut into stages and slices, and replicas of the whole.

    data 2, pipeline 2          stage 0      stage 1
                  replica 0     rank 0  ──▶  rank 1     activations there, gradients back
                  replica 1     rank 2  ──▶  rank 3
                                   │            │
                              all-reduce   all-reduce   gradients of one stage, over its replicas

With `data_strategy: ps-sync` servers of each stage sum its gradients and make its updates.
Pipelines as in GPipe (Huang et al. 2019) and PipeDream (Narayanan et al. 2019), slices as in
Megatron-LM (Shoeybi et al. 2019), all three together as in Narayanan et al. 2021.
"""

from dataclasses import replace
from typing import ClassVar

from distplat.platform.errors import Problem
from distplat.platform.spec import Job
from distplat.strategies.catalog import register
from distplat.strategies.pipeline.hybrid_options import HybridOptions, complete, problems
from distplat.strategies.strategy_spec import WIRES, GroupSpec, Options, Roles, Strategy


@register("hybrid")
class Hybrid(Strategy[HybridOptions]):
    """Cut the model over the workers of a group, and reduce gradients over the groups."""

    summary = "pipeline stages and tensor slices inside a worker group, data parallel across groups"
    options_type: ClassVar[type[Options]] = HybridOptions
    worker: ClassVar[str | type] = "distplat.strategies.pipeline.rank:HybridWorker"
    has_checkpoints = True
    gathers = True
    scales_loss = True
    averages = True

    @classmethod
    def complete(cls, job: Job) -> Job:
        """
        Choose sizes that the job does not give.

        Its accumulated parts are micro-batches here, and activations are those of whole stages.
        """
        options = complete(job.strategy.options, job.scaling.world)
        parts = job.gradient_accumulation
        if parts > 1 and "micro_batches" not in options:
            options["micro_batches"], parts = parts, 1
        if job.activation_checkpointing is not None:
            options.setdefault("recompute", True)
        strategy = job.strategy.model_copy(update={"options": options})
        return job.model_copy(update={"strategy": strategy, "gradient_accumulation": parts})

    def detail(self) -> str:
        """Give the three sizes."""
        chosen = self.options
        return f"pipeline {chosen.pipeline} x tensor {chosen.tensor} x data {chosen.data}"

    def roles(self, job: Job) -> Roles:
        """Ask for one group of all workers, placed replica by replica; if wanted, for servers."""
        chosen = self.options
        spec = GroupSpec(chosen.backend, chosen.timeout_s, chosen.debug, "strategy.timeout_s")
        grid = chosen.grid
        roles = Roles(collective=spec, group_size=grid.group_size, parts=grid.parts())
        if chosen.data_strategy == "ring":
            return roles
        return replace(
            roles,
            servers=chosen.num_servers * len(roles.parts),
            server_resources=chosen.resources_per_server,
            replication=chosen.replication,
            wire=WIRES[chosen.wire],
        )

    def micro_batches(self, job: Job) -> int:
        """Give the option's number."""
        return self.options.micro(job)

    def problems(self, job: Job) -> list[Problem]:
        """Refuse sizes that do not fit, and options that would have no effect."""
        return problems(self.options, job)

    def survives_worker_loss(self) -> bool:
        """Say whether every part of the model has a peer, which may take its place."""
        return self.options.data > 1
