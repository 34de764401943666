"""What the servers of embedding tables are told, and the names that their clients' calls carry."""

from dataclasses import dataclass

from distplat.platform.spec import Job


@dataclass(frozen=True)
class TableSpec:
    """One embedding table. Equal on all ranks that train one model."""

    name: str
    """Path of its module in the model."""
    rows: int | None
    """Ids go from 0 to `rows` - 1; None: any id that is not negative."""
    width: int
    """Elements of a row, float32."""
    std: float
    """Standard deviation of a row's first values; 0: zeros."""
    whole: bool = False
    """Whether all rows are there from the start; else a row comes with its first gradient."""


@dataclass(frozen=True)
class TablePlan:
    """What a server must know to serve one attempt."""

    job: Job
    run: str
    """Name of the run; pushes of another are refused."""
    attempt: int
    world: int
    """Workers whose pushes make up a step."""
    total_steps: int
    servers: int
    tables: tuple[TableSpec, ...]
    rewinds: bool = False
    """Keep what the last step has changed: a restart may have to make that step again."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0: there are none."""


def file_of(server: int) -> str:
    """Give the name of a server's file in a checkpoint, without its ending."""
    return f"embeddings-{server}"


def plan_of(
    job: Job,
    run: str,
    attempt: int,
    tables: tuple[TableSpec, ...],
    total_steps: int,
    *,
    rewinds: bool,
    checkpoint_every: int = 0,
) -> TablePlan:
    """
    Make the plan of one attempt.

    Args:
        job: has the field `embeddings`.
        run: its name.
        attempt: its number.
        tables: the same on all ranks.
        total_steps: of the run.
        rewinds: whether a step may have to be made again; asynchronous tables keep nothing for
            that, their book knows what is in them.
        checkpoint_every: steps between two checkpoints; 0: there are none.
    """
    assert job.embeddings is not None, "only such jobs have servers of tables"
    servers, world = job.embeddings.servers, job.scaling.world
    rewinds = rewinds and not job.embeddings.asynchronous
    return TablePlan(
        job, run, attempt, world, total_steps, servers, tables, rewinds, checkpoint_every
    )
