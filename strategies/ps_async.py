"""
Asynchronous parameter server: every worker at its own pace (Dean et al., NIPS 2012).

A worker leases tasks, parts of a step's batch, and pushes the gradient of each; each shard applies
it at once and gives its newest parameters back. Nobody waits for a slow worker, which gets fewer
tasks, at the price of gradients that are old when their turn comes. `staleness` bounds how far
workers run apart (stale synchronous parallel, Ho et al., NIPS 2013); two options correct for what
is left. See docs/parameter_server.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from distplat.platform.consistency import Consistency
from distplat.platform.fields import Flag, NonNegative
from distplat.platform.load import load_figures
from distplat.platform.spec import Job
from distplat.strategies.base import WIRES, Context, Options, Pushed, Roles, Strategy
from distplat.strategies.catalog import strategies
from distplat.strategies.overlap import NO_EARLY_PUSH

if TYPE_CHECKING:
    from distplat.strategies.training.control import StepControl
    from distplat.strategies.training.model_state import ModelState
    from distplat.strategies.training.parts import Part

Bound = Annotated[int, Field(ge=0, strict=True)]


class PsAsyncOptions(Options):
    """Options of `ps-async`."""

    removed: ClassVar[Mapping[str, str]] = {"overlap": NO_EARLY_PUSH}
    num_servers: int = Field(1, ge=1, le=256, strict=True)
    """Server nodes; each keeps an equal part of the parameters."""
    resources_per_server: dict[str, NonNegative] = Field(default_factory=lambda: {"CPU": 0.0})
    """Ray resources of one server node; by default none."""
    staleness: Literal["unbounded"] | Bound = "unbounded"
    """Steps that a leased task may be ahead of the oldest one that is not done."""
    staleness_lr: Flag = False
    """Divide the learning rate by the number of updates that came between pull and push."""
    delay_compensation: NonNegative = 0.0
    """Lambda of DC-ASGD's correction for these updates; 0: none. Try 0.04 to 2."""
    replication: int = Field(1, ge=1, le=2, strict=True)
    """2: each shard has a backup, which takes over when its server is lost."""
    wire: Literal["exact", "fp16", "bf16"] = "exact"
    """Type in which gradients and parameters travel between nodes; on a node nothing travels."""


@strategies.register("ps-async")
class PsAsync(Strategy[PsAsyncOptions]):
    """Push, have it applied, go on with the newest parameters."""

    summary = "asynchronous data parallel: sharded parameter server, workers at their own pace"
    has_parts = True
    options_type = PsAsyncOptions
    _state: ModelState | None = None

    def roles(self, job: Job) -> Roles:
        """Ask for the server group."""
        chosen = self.options
        consistency = Consistency(
            asynchronous=True,
            bound=None if chosen.staleness == "unbounded" else chosen.staleness,
            staleness_lr=chosen.staleness_lr,
            delay_compensation=chosen.delay_compensation,
        )
        return Roles(
            chosen.num_servers,
            chosen.resources_per_server,
            consistency,
            replication=chosen.replication,
            wire=WIRES[chosen.wire],
        )

    def survivors_go_on(self) -> bool:
        """All state is the servers': a worker that was lost takes none with it."""
        return True

    def setup(self, context: Context) -> int:
        """
        Take the servers' parameters.

        Tables may lack a task that the shards have, and the other way round: the run goes on with
        the first step of which one of them lacks something, and who has it drops it.
        """
        from distplat.strategies.training.sync_batch_norm import refuse_sync_batch_norm

        self._context, self._shards, self._flat = context, context.shards, context.flat
        self._pushes = self._stale_sum = 0
        self._last = Pushed()
        flat = context.flat
        self._shards.connect(flat, context.saved)
        why = "which waits for all ranks: here each goes at its own pace"
        refuse_sync_batch_norm(flat.model, why, "use nn.BatchNorm, or `ring` or `ps-sync`")
        self._state = context.state
        self._state.connect(None, served="use `strategy: ring`", shifting=True)
        if self._state.version is not None:
            self._state.restore()  # what it broke off is made once more
        self._state.keep(flat.version)
        tables = context.tables_made
        return flat.version if tables is None else min(flat.version, tables)

    def exchange(self, step: int, local: StepControl) -> StepControl:
        """
        Push; returns when it is applied and the newest parameters are here.

        As it comes, a sample weighs 1/global batch. Times the world that is the mean over this
        rank's samples where the batch is cut evenly; where it is not, every sample counts alike.
        A weighted loss is divided by the weights of this push.

        Args:
            step: the number of the task.
            local: see `Strategy`; the push is decided by itself.
        """
        from distplat.strategies.algorithms.reduce import clip_factor

        assert self._state is not None, "setup() comes first"
        self._state.synchronize(self._pushes)
        flat, job = self._flat, self._context.job
        if job.failure.non_finite != "ignore":
            local = local.looked_at(flat)
        scale = self._context.world * local.scale
        if job.clip_norm is not None:
            scale *= clip_factor(flat.squared_norm() ** 0.5 * scale, job.clip_norm)
        flat.scale_gradients(scale)
        self._last = self._shards.push(self._pushes, local, step)
        return local

    def update(self, step: int, total: StepControl) -> None:
        """Count; the servers have made the update, or left it out."""
        assert self._state is not None, "setup() comes first"
        self._pushes += 1
        if total.skip:
            self._state.leave_out(self._pushes)
        else:
            self._state.keep(self._pushes)
        self._stale_sum += self._last.staleness

    def part(self, version: int) -> Part:
        """Rank 0 gives what the servers keep, and its buffers."""
        from distplat.strategies.training.parts import Part, server_part

        if self._context.rank != 0:
            return Part()
        return server_part(self._context.flat, self._shards, version, may_skip=True)

    def synchronize(self) -> None:
        """Take the newest parameters: at the end, once every task is done, the final ones."""
        self._shards.refresh()

    def figures(self) -> dict[str, float]:
        """Give the staleness of the push just made, its mean so far, and the wait for others."""
        return {
            "staleness": float(self._last.staleness),
            "staleness_mean": self._stale_sum / max(1, self._pushes),
            "waiting_s": self._last.waiting_s,
            **load_figures(self._last.loads),
            "dropped": float(self._last.dropped),
        }
