"""Fields of a job for the model that its task makes, and for its embedding tables."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from distplat.platform.fields import Flag, Folder, NonNegative, Pair, Positive, Resources, Spec


class Compile(Spec):
    """What `torch.compile` is told, by its own names."""

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "default"
    )
    """How much time is given to make the code quick."""
    backend: str = "inductor"
    """Compiler, by the name under which torch knows it."""
    fullgraph: Flag = False
    """Fail where the model cannot be compiled as a whole; else it falls back, with a warning."""
    dynamic: Flag | None = None
    """Code for batches of any size; None: once a second size has come."""

    def arguments(self) -> dict[str, Any]:
        """Give the arguments of `torch.compile`; it takes no mode but for its own compiler."""
        arguments = self.model_dump()
        return arguments if self.mode != "default" else {**arguments, "mode": None}


def compile_of(value: object) -> object:
    """Take `true` for all defaults, and `false` for nothing."""
    if isinstance(value, bool):
        return {} if value else None
    return value


class EMA(Spec):
    """An exponential moving average of the weights, as `torch.optim.swa_utils` makes it."""

    decay: float = Field(0.999, ge=0, lt=1)
    """How much of the average stays in an update; the weights after it make up the rest."""
    warmup: Flag = False
    """Begin with a smaller decay: after t updates `min(decay, (1 + t) / (10 + t))`."""

    def decay_after(self, updates: int) -> float:
        """Give the decay of the update that follows `updates` updates."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay


def _listed(value: object) -> object:
    """Take one path for a list of one."""
    return (value,) if isinstance(value, str) else value


class InitialWeights(Spec):
    """Weights that a run begins from, instead of those that the task's model() has made."""

    path: Annotated[tuple[Folder, ...], BeforeValidator(_listed), Field(min_length=1)]
    """A file `.safetensors` or `.pt`, or a directory or URL with one, such as a Hugging Face
    checkpoint or a run directory; relative to the task's folder. Every worker reads it. Or a list
    of them, such as a base and adapters: of a name that several have the last one counts."""
    strict: Flag = True
    """Their names must be the model's; else what one side lacks is passed over, and told."""


def initial_weights_of(value: object) -> object:
    """Take a path for all defaults."""
    return {"path": value} if isinstance(value, str | list | tuple) else value


class RowOptimizer(Spec):
    """Fields that all have. Rows that a step does not use stay as they are, state included."""

    name: str
    """A class of `torch.optim` as it treats sparse gradients, or `RowWiseAdagrad`."""
    lr: Positive
    """Learning rate before the factor of `lr_schedule`."""


class RowSGD(RowOptimizer):
    """Stochastic gradient descent; no state."""

    name: Literal["SGD"]


class RowAdagrad(RowOptimizer):
    """Adagrad, Duchi et al. 2011; as much state as the rows."""

    name: Literal["Adagrad"]
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10


class RowWiseAdagrad(RowOptimizer):
    """Adagrad with one number of state per row: the mean over the row (as in FBGEMM)."""

    name: Literal["RowWiseAdagrad"]
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10


class RowSparseAdam(RowOptimizer):
    """Adam on the rows of a step alone; twice as much state as the rows."""

    name: Literal["SparseAdam"]
    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-8


AnyRowOptimizer = Annotated[
    RowSGD | RowAdagrad | RowWiseAdagrad | RowSparseAdam, Field(discriminator="name")
]


class Embeddings(Spec):
    """The servers of the embedding tables, for models that have some."""

    servers: int = Field(1, ge=1, le=256, strict=True)
    """Server nodes that share the rows of every table."""
    optimizer: AnyRowOptimizer
    """How rows are updated, on the servers."""
    replication: int = Field(1, ge=1, le=2, strict=True)
    """2: each server's rows have a backup, which takes over when their server is lost."""
    partition: Literal["hash", "range"] = "hash"
    """Who keeps a row: `hash` spreads busy ids, `range` cuts 0..num_embeddings evenly."""
    asynchronous: Flag = False
    """Apply each worker's gradients when they come; then runs do not repeat bit for bit."""
    resources_per_server: Resources = Field(default_factory=lambda: {"CPU": 0.0})
    """Ray resources of one server node; by default none, for it works while workers wait."""
