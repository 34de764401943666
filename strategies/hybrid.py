"""
Hybrid: pipeline and tensor parallelism within a worker group, data parallelism across groups.

    data 2, pipeline 2          stage 0      stage 1
                  replica 0     rank 0  ──▶  rank 1     activations forward, gradients back
                  replica 1     rank 2  ──▶  rank 3
                                   │            │
                              all-reduce   all-reduce   gradients of a stage, over its replicas

With `data_strategy: ps-sync` each stage has servers that sum its gradients and apply its updates.
Pipelines as in GPipe (Huang et al. 2019) and PipeDream (Narayanan et al. 2019), tensor slices as in
Megatron-LM (Shoeybi et al. 2019), and their combination as in Narayanan et al. 2021.
"""

from dataclasses import replace
from typing import ClassVar

from typing_extensions import override

from distplat.platform.errors import Problem
from distplat.platform.spec import Job
from distplat.strategies.catalog import register
from distplat.strategies.pipeline.hybrid_options import HybridOptions, complete, problems
from distplat.strategies.strategy_spec import WIRES, GroupSpec, Options, Roles, Strategy


@register("hybrid")
class Hybrid(Strategy[HybridOptions]):
    """Split the model over the workers of a group, and reduce gradients over the groups."""

    summary = "pipeline stages and tensor slices inside a worker group, data parallel across groups"
    options_type: ClassVar[type[Options]] = HybridOptions
    worker: ClassVar[str | type] = "distplat.strategies.pipeline.rank:HybridWorker"
    has_checkpoints = True
    gathers = True
    scales_loss = True
    averages = True

    @classmethod
    @override
    def complete(cls, job: Job) -> Job:
        """
        Fill in the sizes that the job does not set.

        `gradient_accumulation` becomes the number of micro-batches, and `activation_checkpointing`
        becomes recomputation of whole stages.
        """
        options = complete(job.strategy.options, job.scaling.world)
        accumulation = job.gradient_accumulation
        if accumulation > 1 and "micro_batches" not in options:
            options["micro_batches"], accumulation = accumulation, 1
        if job.activation_checkpointing is not None:
            options.setdefault("recompute", True)
        strategy = job.strategy.model_copy(update={"options": options})
        return job.model_copy(update={"strategy": strategy, "gradient_accumulation": accumulation})

    @override
    def detail(self) -> str:
        """Return the sizes of the three dimensions."""
        options = self.options
        return f"pipeline {options.pipeline} x tensor {options.tensor} x data {options.data}"

    @override
    def roles(self, job: Job) -> Roles:
        """Return a group of all workers, placed replica by replica, and `ps-sync`'s servers."""
        options = self.options
        spec = GroupSpec(options.backend, options.timeout_s, options.debug, "strategy.timeout_s")
        grid = options.grid
        roles = Roles(collective=spec, group_size=grid.group_size, parts=grid.parts())
        if options.data_strategy == "ring":
            return roles
        return replace(
            roles,
            servers=options.num_servers * len(roles.parts),
            server_resources=options.resources_per_server,
            replication=options.replication,
            wire=WIRES[options.wire],
        )

    @override
    def micro_batches(self, job: Job) -> int:
        """Return the value of the option."""
        return self.options.micro(job)

    @override
    def problems(self, job: Job) -> list[Problem]:
        """Reject sizes that do not fit, and options without effect."""
        return problems(self.options, job)

    @override
    def survives_worker_loss(self) -> bool:
        """
        Return whether every part of the model has data-parallel peers, from which it can be
        restored.
        """
        return self.options.data > 1
