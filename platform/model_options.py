"""Fields of a job for the task's model and its embedding tables."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from distplat.platform.fields import Flag, Folder, NonNegative, Pair, Positive, Resources, Spec


class Compile(Spec):
    """Arguments of `torch.compile`, with the same names."""

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "default"
    )
    """Trade-off between compile time and speed."""
    backend: str = "inductor"
    """Compiler backend, by its name in torch."""
    fullgraph: Flag = False
    """Fail if the model cannot be compiled as a whole; else fall back, with a warning."""
    dynamic: Flag | None = None
    """Compile for batches of any size; None: after a second size occurs."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `torch.compile`; the default mode is passed as None."""
        arguments = self.model_dump()
        return arguments if self.mode != "default" else {**arguments, "mode": None}


def compile_of(value: object) -> object:
    """Accept `true` for all defaults, and `false` for none."""
    if isinstance(value, bool):
        return {} if value else None
    return value


class EMA(Spec):
    """An exponential moving average of the weights, as in `torch.optim.swa_utils`."""

    decay: float = Field(0.999, ge=0, lt=1)
    """Weight of the previous average in each update."""
    warmup: Flag = False
    """Start with a smaller decay: after t updates `min(decay, (1 + t) / (10 + t))`."""

    def decay_after(self, updates: int) -> float:
        """Return the decay of the next update, after `updates` updates."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay


def _as_tuple(value: object) -> object:
    """Accept a single path as a list of one."""
    return (value,) if isinstance(value, str) else value


class InitialWeights(Spec):
    """Weights to start from, instead of those of the task's model()."""

    path: Annotated[tuple[Folder, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    """A `.safetensors` or `.pt` file, or a directory or URL with one, such as a Hugging Face
    checkpoint or a run directory; relative to the task's directory. Every worker reads it. Or a
    list of these, such as a base and adapters: the last one wins where several have the same
    name."""
    strict: Flag = True
    """The names must match the model's exactly; else missing and unexpected names are only
    reported."""


def initial_weights_of(value: object) -> object:
    """Accept a path for all defaults."""
    return {"path": value} if isinstance(value, str | list | tuple) else value


class RowOptimizer(Spec):
    """Fields of all row optimizers. Rows that a step does not use keep their values and state."""

    name: str
    """A class of `torch.optim`, as it handles sparse gradients, or `RowWiseAdagrad`."""
    lr: Positive
    """Learning rate, before the factor of `lr_schedule`."""


class RowSGD(RowOptimizer):
    """Stochastic gradient descent, without state."""

    name: Literal["SGD"]


class RowAdagrad(RowOptimizer):
    """Adagrad, Duchi et al. 2011; its state is as large as the rows."""

    name: Literal["Adagrad"]
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10


class RowWiseAdagrad(RowOptimizer):
    """Adagrad with one state value per row, the mean over the row (as in FBGEMM)."""

    name: Literal["RowWiseAdagrad"]
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10


class RowSparseAdam(RowOptimizer):
    """Adam on a step's rows; its state is twice as large as the rows."""

    name: Literal["SparseAdam"]
    betas: Pair = (0.9, 0.999)
    eps: NonNegative = 1e-8


AnyRowOptimizer = Annotated[
    RowSGD | RowAdagrad | RowWiseAdagrad | RowSparseAdam, Field(discriminator="name")
]


class Embeddings(Spec):
    """Servers of embedding tables."""

    servers: int = Field(1, ge=1, le=256, strict=True)
    """Number of server nodes; they share the rows of every table."""
    optimizer: AnyRowOptimizer
    """Optimizer of the rows, on the servers."""
    replication: int = Field(1, ge=1, le=2, strict=True)
    """2: each server has a backup, which takes over when the server is lost."""
    partition: Literal["hash", "range"] = "hash"
    """How rows are split over servers: `hash` spreads popular ids, `range` cuts 0..num_embeddings
    evenly."""
    asynchronous: Flag = False
    """Apply each worker's gradients on arrival; runs are then not bit-for-bit reproducible."""
    resources_per_server: Resources = Field(default_factory=lambda: {"CPU": 0.0})
    """Ray resources of one server node; none by default, as it works while workers wait."""
