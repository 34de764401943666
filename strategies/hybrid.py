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

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distplat.platform.errors import Problem
from distplat.platform.fields import Count, Flag, NonNegative, Positive, Seconds
from distplat.platform.grid import Grid
from distplat.platform.spec import Job
from distplat.strategies.base import (
    WIRES,
    Collective,
    Context,
    GroupSpec,
    Options,
    Roles,
    Strategy,
)
from distplat.strategies.catalog import strategies

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distplat.platform.pieces import Place
    from distplat.platform.pipeline_trace import TraceReport
    from distplat.strategies.pipeline.rank import Rank
    from distplat.strategies.task import Task
    from distplat.strategies.training.compute import Compute, Share
    from distplat.strategies.training.control import StepControl
    from distplat.strategies.training.flat import FlatModel
    from distplat.strategies.training.parts import Part
    from distplat.strategies.training.session import Prepared

Backend = Literal["auto", "shm", "gloo", "nccl", "hierarchical"]
_PER_STAGE = 4
"""Micro-batches for each stage where the job does not say: a bubble of a fifth, at most."""


class HybridOptions(Options):
    """Options of `hybrid`."""

    gone: ClassVar[Mapping[str, str]] = {
        "pack_weights": "it is gone, and so are packed weights: remove it",
    }

    pipeline: Count = Field(1, le=1024)
    """Stages: pieces of the model that follow each other, a worker each (or `tensor` workers)."""
    tensor: Count = Field(1, le=1024)
    """Workers that share the layers of one stage."""
    data: Count = Field(1, le=1024)
    """Replicas of the whole, each with a part of every batch."""
    data_strategy: Literal["ring", "ps-sync"] = "ring"
    """How replicas come together: `ring` reduces each stage's gradients over them; `ps-sync` pushes
    them to server nodes, of which each stage and slice has its own."""
    num_servers: Count = Field(1, le=256)
    """Server nodes of each stage and slice; with `data_strategy: ps-sync`."""
    resources_per_server: dict[str, NonNegative] = Field(default_factory=lambda: {"CPU": 0.0})
    """Ray resources of one server node; by default none, for it works while workers wait."""
    replication: Count = Field(1, le=2)
    """2: each shard has a backup, which takes over when its server is lost."""
    wire: Literal["exact", "fp16", "bf16"] = "exact"
    """Type that travels between workers and servers of two nodes; on a node nothing travels."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "zb-h1"] = "1f1b"
    """In which order a stage computes its micro-batches: docs/schedules.md."""
    micro_batches: Count | None = Field(None, le=4096)
    """Parts of a replica's batch; None: four for each stage, as far as the batch goes."""
    virtual: Count | None = Field(None, le=64)
    """Pieces of the model per stage; `interleaved` only, where None is 2."""
    cut: str | tuple[str, ...] = "auto"
    """`auto`: by the layers' measured time; `even`: as many layers each; or a list of the layers
    with which pieces begin, the first apart."""
    memory_limit_mb: Positive | None = None
    """What a stage may hold by estimate, in MiB; with `cut: auto`."""
    init: Literal["build", "meta"] = "build"
    """`meta`: no process ever holds the whole model; needs modules with `reset_parameters`."""
    recompute: Flag = False
    """Keep a stage's input only, and compute its activations again in backward."""
    tensor_plan: dict[str, str] = Field(default_factory=dict)
    """How layers are sliced, by patterns of their names, such as "blocks.*.mlp.1": colwise."""
    backend: Backend = "auto"
    """Transport; `auto`: by where the workers are, and the log says why."""
    timeout_s: Seconds = Field(60.0)
    """Deadline of one operation; the error names the ranks that did not come."""
    debug: Flag = False
    """Compare every operation between the ranks; by default only the first ones."""
    overlap: Flag = True
    """Reduce gradients over the replicas while the pipeline still drains."""
    bucket_mb: Positive = Field(8.0, le=1024)
    """Size of a bucket of gradients in MiB; with `data` > 1."""
    trace_step: Count = 5
    """Step, from 1, of which `pipeline_trace.json` tells; the last one of shorter runs."""

    @property
    def grid(self) -> Grid:
        """Who is where."""
        return Grid(self.pipeline, self.tensor, self.data)

    @property
    def chunks(self) -> int:
        """Pieces of the model per stage."""
        return (self.virtual or 2) if self.schedule == "interleaved" else 1

    @property
    def places(self) -> int:
        """Pieces of the whole model."""
        return self.pipeline * self.chunks

    def micro(self, job: Job) -> int:
        """Micro-batches of a replica's part of a full batch."""
        if self.micro_batches is not None:
            return self.micro_batches
        wanted = _PER_STAGE * self.pipeline if self.pipeline > 1 else 1
        most = max(1, min(wanted, job.global_batch_size // self.data))
        if self.schedule == "interleaved":
            most = max(self.pipeline, most // self.pipeline * self.pipeline)
        return most


@strategies.register("hybrid")
class Hybrid(Strategy[HybridOptions]):
    """Cut the model over the workers of a group, and reduce gradients over the groups."""

    summary = "pipeline stages and tensor slices inside a worker group, data parallel across groups"
    options_type: ClassVar[type[HybridOptions]] = HybridOptions
    cuts_model: ClassVar[bool] = True
    has_parts: ClassVar[bool] = True
    _rank: Rank | None = None

    def roles(self, job: Job) -> Roles:
        """Ask for one group of all workers, placed replica by replica; if wanted, for servers."""
        chosen = self.options
        spec = GroupSpec(chosen.backend, chosen.timeout_s, chosen.debug)
        roles = Roles(collective=spec, group_size=chosen.grid.group_size)
        if chosen.data_strategy == "ring":
            return roles
        parts = chosen.grid.parts()
        return replace(
            roles,
            servers=chosen.num_servers * len(parts),
            server_resources=chosen.resources_per_server,
            replication=chosen.replication,
            wire=WIRES[chosen.wire],
            parts=parts,
        )

    def problems(self, job: Job) -> list[Problem]:
        """Refuse sizes that do not fit, and options that would have no effect."""
        from distplat.strategies.pipeline.options import problems

        return problems(self.options, job)

    def survivors_go_on(self) -> bool:
        """Say whether every part of the model has a twin, which may take its place."""
        return self.options.data > 1

    def replicas(self, job: Job) -> int:
        """See `Strategy`."""
        return self.options.data

    def holders(self, job: Job) -> tuple[tuple[int, ...], ...]:
        """See `Strategy`."""
        return self.options.grid.parts()

    def build(self, task: Task) -> nn.Module:
        """Build the model, without values if the job says so."""
        if self.options.init == "build":
            return task.model()
        from distplat.strategies.training.meta import on_meta  # torch: in workers only

        return on_meta(task.model)

    def own_part(self, prepared: Prepared, rank: int, collective: Collective | None) -> FlatModel:
        """Agree with the others where the model is cut, and take this rank's part."""
        from distplat.strategies.pipeline.rank import Rank  # torch: in workers only
        from distplat.strategies.training.sync_batch_norm import refuse_sync_batch_norm

        assert collective is not None, "roles() asked for a group"
        if self._rank is None:
            if self.options.data > 1 and prepared.model is not None:
                why = "which `hybrid` does not compute over its replicas"
                refuse_sync_batch_norm(prepared.model, why, "use nn.BatchNorm, or `data: 1`")
            self._rank = Rank(self.options, prepared, rank)
        return self._rank.take_part(collective)

    def places(self, flat: FlatModel) -> dict[str, Place]:
        """Say which slice of each tensor is here."""
        return dict(self._here.holding.places)

    def showing(self, job: Job) -> tuple[int, ...]:
        """See `Strategy`; the first replica does."""
        return self.options.grid.group(0)

    def shown(self, flat: FlatModel) -> Part:
        """See `Strategy`."""
        from distplat.strategies.training.parts import model_part  # torch: in workers only

        return model_part(flat, self._here.holding)

    def part(self, version: int) -> Part:
        """Give each part of the model from its first replica."""
        return self._here.checkpoint(version)

    def setup(self, context: Context) -> int:
        """Meet the other stages and the twins; take over what twins have that are further."""
        return self._here.connect(context)

    def caught_up(self) -> Share | None:
        """See `Strategy`."""
        return self._here.caught_up

    def compute(self, prepared: Prepared, context: Context) -> Compute:
        """Give this rank's part of the pipeline."""
        return self._here.pipeline

    def exchange(self, step: int, local: StepControl) -> StepControl:
        """Sum the gradients over the twins, and see that all ranks have come so far."""
        return self._here.exchange(step, local)

    def update(self, step: int, total: StepControl) -> None:
        """Update this rank's part."""
        self._here.update(step, total)

    def gather(self, data: bytes) -> list[bytes]:
        """Give every rank what all brought."""
        from distplat.strategies.training.words import gather_bytes

        return gather_bytes(data, self._here.everybody, self._here.device)

    def figures(self) -> dict[str, float]:
        """Give the figures of pipeline and exchange."""
        return self._here.figures()

    def trace(self, step: int) -> TraceReport | None:
        """Tell when what was done, in the step that the job names."""
        return self._here.trace(step)

    def trained(self, flat: FlatModel) -> dict[str, Tensor]:
        """Give this rank's part of the model; of slices, the first gives all."""
        return self._here.trained()

    @property
    def _here(self) -> Rank:
        assert self._rank is not None, "own_part() comes first"
        return self._rank
