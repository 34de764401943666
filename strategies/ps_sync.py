"""
Synchronous parameter server: data parallel around a server group (Li et al., OSDI 2014).

Server nodes keep the parameters and the optimizer's state, cut into shards of equal size. In each
step every worker pushes its gradients; when all of them are in, every shard sums them in rank
order, updates, and serves the new version. Workers never talk to each other.
"""

from pydantic import Field

from distplat.platform.fields import NonNegative
from distplat.platform.spec import Job
from distplat.strategies.base import Context, Options, Roles, Strategy
from distplat.strategies.catalog import strategies


class PsSyncOptions(Options):
    """Options of `ps-sync`."""

    num_servers: int = Field(1, ge=1, le=256, strict=True)
    """Server nodes; each keeps an equal part of the parameters."""
    resources_per_server: dict[str, NonNegative] = Field(default_factory=lambda: {"CPU": 0.0})
    """Ray resources of one server node; by default none, for it works while workers wait."""


@strategies.register("ps-sync")
class PsSync(Strategy[PsSyncOptions]):
    """Push gradients to all shards, commit, go on with the new version."""

    summary = "synchronous data parallel: sharded parameter server, updates on the server nodes"
    options_type = PsSyncOptions

    def roles(self, job: Job) -> Roles:
        """Ask for the server group."""
        return Roles(
            servers=self.options.num_servers, server_resources=self.options.resources_per_server
        )

    def setup(self, context: Context) -> int:
        """Move the model's buffers to where the servers reach them; take their parameters."""
        self.shards = context.shards
        self.shards.connect(context.flat)
        return 0

    def exchange(self, step: int) -> None:
        """Push; returns when every shard has every rank's gradients of this step."""
        self.norm = self.shards.push(step)

    def update(self, step: int) -> None:
        """Commit: only now may a shard go on to the next version (I3)."""
        self.shards.commit(step, self.norm)
