"""
The job: the complete configuration of a run, as one immutable value.

Field names follow Ray Train and torch where these have one. `platform/job_file.py` reads a job from
YAML, with file, line and column in every message. The strategy checks its own options
(`strategies/catalog.py`).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from distplat.platform import own_loop
from distplat.platform.errors import Problem
from distplat.platform.evaluations import EarlyStop, KeepBest, evaluation_problems
from distplat.platform.fields import (
    Count,
    Flag,
    Folder,
    Index,
    Limit,
    Positive,
    Resources,
    Seconds,
    Spec,
)
from distplat.platform.lr_schedules import (
    NamedSchedule,
    ReduceLROnPlateau,
    Schedule,
    TaskSchedule,
    schedule_problems,
    unbounded_problems,
)
from distplat.platform.model_options import (
    EMA,
    Compile,
    Embeddings,
    InitialWeights,
    compile_of,
    initial_weights_of,
)
from distplat.platform.optimizer_checks import optimizer_problems
from distplat.platform.optimizers import JobOptimizer
from distplat.platform.plateau import Plateau
from distplat.platform.remote_storage import is_url, url_problem
from distplat.platform.trackers import TrackerSpec, tracker_problems

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Consistency:
    """When a shard applies gradients, and how it handles stale ones."""

    asynchronous: bool = False
    """Apply each gradient on arrival; else apply one update for all workers' gradients."""
    bound: int | None = None
    """Asynchronous: most steps that a task may be ahead of the oldest unfinished task; None: no
    limit."""
    staleness_lr: bool = False
    """Divide the learning rate by a gradient's staleness (Zhang et al., IJCAI 2016)."""
    delay_compensation: float = 0.0
    """Lambda of the correction for changes since the pull (Zheng et al., ICML 2017)."""
    backup_workers: int = 0
    """Synchronous: gradients that a step does not wait for (Chen et al., 2016)."""
    own_loop: bool = False
    """Gradients come from a train function, whose loop determines how many there are."""

    @property
    def dynamic_tasks(self) -> bool:
        """
        Whether tasks are leased to workers on request (`task_scheduler.py`). Else each worker has
        its own part of every step.
        """
        return self.asynchronous and not self.own_loop

    @property
    def private(self) -> bool:
        """Whether workers compute on copies of the parameters, because shards change meanwhile."""
        return self.asynchronous or self.backup_workers > 0


SYNCHRONOUS = Consistency()
"""One update per step for the gradients of all workers."""


NAME_PATTERN = r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
EntryPoint = Annotated[
    str,
    StringConstraints(
        pattern=r"^(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*|[^\s:-][^\s:]*\.py(?: .*)?)$",
        max_length=2000,
    ),
    AfterValidator(own_loop.check_quotes),
]
StrategyName = Annotated[str, StringConstraints(min_length=1, max_length=63)]


class StrategySpec(Spec):
    """Name and options of a strategy."""

    name: StrategyName
    """Name, as listed by `distplat strategies`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options; in a job file they stand beside `name`, not below a key of their own."""


def _strategy(value: object) -> object:
    """Accept `ring` and `{name: ring, timeout_s: 5}`: options stand beside the name."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict):
        beside = {k: v for k, v in value.items() if k not in ("name", "options")}
        options = value.get("options", {})  # the form of `model_dump`
        name = {"name": value["name"]} if "name" in value else {}
        return name | {"options": options | beside if isinstance(options, dict) else options}
    if isinstance(value, StrategySpec):
        return value
    raise PydanticCustomError("strategy_type", "must be a name, or a mapping with `name`")


StrategyField = Annotated[StrategySpec, BeforeValidator(_strategy)]
"""`strategy` field of a job file."""


class Scaling(Spec):
    """Number of workers, and the resources of each (Ray Train's names)."""

    num_workers: Index = Field(1, le=1024)
    """Number of ranks; 0: train in the calling process, without Ray, for debugging."""
    use_gpu: Flag = False
    """Each worker uses one GPU, or the fraction in `resources_per_worker`."""
    resources_per_worker: Resources = Field(default_factory=dict)
    """Ray resources of one worker, for example {CPU: 2, GPU: 0.5}; default {CPU: 1}. `memory` is in
    bytes."""

    @property
    def world(self) -> int:
        """Number of ranks; 1 for a run in the calling process."""
        return max(1, self.num_workers)

    def resources(self) -> dict[str, float]:
        """Return the resources of one worker, with defaults."""
        default = {"CPU": 1.0} | ({"GPU": 1.0} if self.use_gpu else {})
        return default | self.resources_per_worker


_OLD_WORKERS = "num_loaders"


class Data(Spec):
    """How batches are built from the task's data set; names as in torch's DataLoader."""

    shuffle: Flag = True
    """Shuffle the data in each epoch, by the job's seed; no effect with a task's `sampler`, or on a
    stream."""
    drop_last: Flag = False
    """Drop an epoch's last batch if it is smaller than the others."""
    num_workers: Index = Field(0, le=256)
    """Loader processes per rank, as in torch's DataLoader; 0: load in the training thread."""
    prefetch_factor: Count = Field(2, le=1024)
    """Batches prefetched by each loader process; needs num_workers > 0."""
    persistent_workers: Flag = False
    """Keep the loader processes between evaluations; needs num_workers > 0. Loader processes of
    training data live as long as the run in any case."""
    pin_memory: Flag | None = None
    """Load batches into page-locked memory, so that copies to a GPU overlap with computation; None:
    if there are GPUs and loader processes. Needs GPUs."""

    def unused_fields(self) -> set[str]:
        """Return the fields without effect."""
        return set() if self.num_workers else {"prefetch_factor", "persistent_workers"}

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, fields: Any) -> Any:
        """Accept the former name of `num_workers`."""
        if not isinstance(fields, Mapping) or _OLD_WORKERS not in fields:
            return fields
        if "num_workers" in fields:
            raise PydanticCustomError(
                "renamed", f"{_OLD_WORKERS} is the former name of num_workers: give only one"
            )
        logger.warning("data.%s is called data.num_workers now, as in torch", _OLD_WORKERS)
        return {"num_workers" if k == _OLD_WORKERS else k: v for k, v in fields.items()}


class Evaluation(Spec):
    """When the model is evaluated on `eval_data` (only for tasks with it)."""

    every_epochs: Index = 1
    """Evaluate every N epochs; 0: only after the last step."""
    every_steps: Count | None = None
    """Evaluate every N steps and after the last one, instead of by epochs."""
    before_first: Flag = False
    """Also evaluate before the first step, at step 0; `lr_schedule` ignores this evaluation."""

    def period(self, steps_per_epoch: int) -> int:
        """Return the steps between evaluations; 0: only one after the last step."""
        return self.every_steps or self.every_epochs * steps_per_epoch

    def unused_fields(self) -> set[str]:
        """Return the fields without effect."""
        return set() if self.every_steps is None else {"every_epochs"}


class CheckpointConfig(Spec):
    """Which states of the model are saved, during training and at its end (docs/checkpoints.md)."""

    every_steps: Count | None = None
    """Save every N steps and after the last step; None: no checkpoints by steps."""
    every_epochs: Count | None = None
    """Save every N epochs and after the last step; set this or `every_steps`."""
    num_to_keep: Count = 2
    """Number of newest checkpoints to keep; older ones are deleted."""
    keep_best: KeepBest | None = None
    """Also keep the best checkpoint, by a metric of the evaluation after its step."""
    save_final: Flag = True
    """Write the trained parameters to `model.safetensors` in the run directory."""
    trained_only: Flag = False
    """Leave frozen parameters out of checkpoints and of `model.safetensors`, as for LoRA; loading
    them needs the same base model."""

    @property
    def enabled(self) -> bool:
        """Whether checkpoints are saved during the run."""
        return self.every_steps is not None or self.every_epochs is not None

    def period(self, steps_per_epoch: int) -> int:
        """Return the steps between checkpoints; 0: none."""
        return self.every_steps or (self.every_epochs or 0) * steps_per_epoch


class Failure(Spec):
    """Recovery from failures, and deadlines; an error after a deadline names its field."""

    max_failures: Index | None = None
    """Restarts after lost workers, servers or nodes. One is returned for each 100 steps of
    progress, and for each new checkpoint that a train function reports. None: 3 where survivors
    keep their state (not with a sharded optimizer, nor without replicas) or there are checkpoints,
    else 0."""
    max_preemptions: Index | None = None
    """Restarts after preempted machines, counted separately and returned alike. None: 100 where
    `max_failures` is 3 by default, else 0."""

    spare_workers: Flag = False
    """Keep a spare process on each node, with torch and the task imported, that replaces a lost
    worker in about a second. It uses memory, but no CPU time; not with GPUs."""

    start_timeout_s: Seconds = 120.0
    """Time from the request for actors to the first step; also the time that each 64 MiB of the
    trained model may take to arrive at the driver's node."""
    step_timeout_s: Seconds = 120.0
    """How long to wait for a rank or a server node within a step; also how long a rank's part of a
    checkpoint may take to leave its process, and to arrive at the driver's node."""
    heartbeat_timeout_s: Seconds = 30.0
    """Seconds without a heartbeat reply after which a live process counts as hung."""
    storage_timeout_s: Seconds = 120.0
    """How long the end of a run continues uploads while the storage of a URL does not respond. The
    deadline of one operation, of at most 8 MiB, is a quarter of it. It is also the deadline for a
    checkpoint to be written before a rollback, and for the disk to make progress while a checkpoint
    is read or a run ends. After a disk has made no progress on a checkpoint for this time,
    outstanding checkpoints count as failed."""
    non_finite: Literal["stop", "skip", "ignore"] = "stop"
    """A step with a NaN or infinite loss or gradient: `stop` ends the run before the step is
    applied, `skip` skips it on all ranks, `ignore` applies it."""
    max_skipped_steps: Index = 100
    """Most steps that `non_finite: skip` may skip, counted from the start, the resume or the last
    recovery; one more ends the run."""


class Job(Spec):
    """One training run."""

    name: Name
    """1 to 63 of a-z, 0-9 and '-'; used in the names of actors and the run directory."""
    task: EntryPoint | None = None
    """`module:Class`, from the job's directory or installed, or `module:function` of a train
    function, or a script with its arguments, `train.py --lr 0.1`; None: passed to Trainer in
    Python."""
    own_loop: Flag = False
    """The task is a train function, with its own loop; default true if the job has none of
    `optimizer`, `global_batch_size`, `epochs` and `steps`."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task's constructor; for a train function its `config`."""
    strategy: StrategyField
    """The strategy: a name, or a mapping with the name and the strategy's options."""
    scaling: Scaling = Scaling()
    optimizer: JobOptimizer
    lr_schedule: NamedSchedule = Schedule()
    embeddings: Embeddings | None = None
    """Servers of embedding tables, for models with `distplat.nn.ShardedEmbedding`."""
    initial_weights: Annotated[InitialWeights | None, BeforeValidator(initial_weights_of)] = None
    """Weights to start from: a path, or a mapping; None: those of the task's model()."""
    epochs: Count | None = None
    """Passes over the training data; set this or `steps`, or only `max_time_s`."""
    steps: Count | None = None
    """Optimizer updates; set this or `epochs`, or only `max_time_s`."""
    global_batch_size: Count = Field(le=2**30)
    """Samples per update, over all workers."""
    gradient_accumulation: Count = Field(1, le=2**20)
    """Micro-batches into which each worker splits its part of the batch."""
    clip_norm: Limit | None = None
    """Clip gradients to this 2-norm over all parameters; `.inf`: no clipping, but `grad_norm` in
    the metrics; None: neither."""
    ema: EMA | None = None
    """Exponential moving average of the weights, also evaluated and saved; None: disabled."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """`bf16`: forward under autocast; parameters and updates keep the model's dtype. `fp16`: the
    same in float16, with loss scaling as in torch's `GradScaler`."""
    compile: Annotated[Compile | None, BeforeValidator(compile_of)] = None
    """`true`, or a mapping: compile forward and backward with `torch.compile`."""
    activation_checkpointing: str | None = Field(None, min_length=1)
    """Modules that keep only their inputs and recompute activations in backward, to save memory:
    comma-separated patterns of names, such as "blocks.*". Under `hybrid`, whole stages."""
    seed: Index = 0
    """Seed of model, data, their order and dropout; runs with the same seed have the same bits."""
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    checkpoint: CheckpointConfig = CheckpointConfig()
    early_stop: EarlyStop | None = None
    """End the run when evaluations stop improving; None: disabled."""
    max_time_s: Positive | None = None
    """End the run, as after its last step, this many seconds after its start, but after one step at
    least; None: no limit. Without `epochs` and `steps` it is the only limit."""
    failure: Failure = Failure()
    trackers: tuple[TrackerSpec, ...] = ()
    """Experiment trackers in addition to TensorBoard: `mlflow`, `trackio`, `wandb`, or mappings
    with their `name`."""
    storage_path: Folder = "runs"
    """Parent of run directories, relative to the directory in which `submit` was called. Or a URL,
    such as s3://bucket/prefix: run directories are created in `runs`, and copied to the URL."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, fields: Any) -> Any:
        """Fill in the fields of a loop for a train function."""
        return own_loop.fill_loop_fields(fields) if isinstance(fields, Mapping) else fields

    def with_workers(self, number: int) -> "Job":
        """Return the job with another number of workers; check `problems` of the result."""
        scaling = self.scaling.model_copy(update={"num_workers": number})
        return self.model_copy(update={"scaling": scaling})

    @property
    def task_schedule(self) -> TaskSchedule | None:
        """Learning rates that the task returned; None: the job defines them."""
        schedule: Any = self.lr_schedule
        return schedule if isinstance(schedule, TaskSchedule) else None

    @property
    def plateau(self) -> Plateau | None:
        """State of a schedule that depends on evaluations, on a worker; None: another schedule."""
        schedule: Any = self.lr_schedule
        return schedule if isinstance(schedule, Plateau) else None

    def with_plateau(self) -> "Job":
        """Return a process's own job if its rates depend on evaluations, else this job."""
        rule: Any = self.lr_schedule
        rule = rule.rule if isinstance(rule, Plateau) else rule
        return self.with_schedule(Plateau(rule)) if isinstance(rule, ReduceLROnPlateau) else self

    def with_schedule(self, schedule: TaskSchedule | Plateau | ReduceLROnPlateau) -> "Job":
        """Return the job with another schedule, also one that a job file cannot contain."""
        return self.model_copy(update={"lr_schedule": schedule})

    def problems(self) -> list[Problem]:
        """Check dependencies between fields; []: the job is valid."""
        if self.own_loop:
            fields = {"name": self.name, "strategy": self.strategy, "own_loop": True}
            found = own_loop.problems(self, Job.model_validate(fields))
            found += own_loop.script_problems(self)
            return [*found, *_gpu_problems(self), *tracker_problems(self)]
        return [
            *own_loop.script_problems(self),
            *_length_problems(self),
            *_data_problems(self),
            *_gpu_problems(self),
            *_precision_problems(self),
            *optimizer_problems(self.optimizer),
            *schedule_problems(self.lr_schedule, self.steps),
            *_evaluation_problems(self),
            *_checkpoint_problems(self),
            *_embedding_problems(self),
            *_storage_problems(self),
            *tracker_problems(self),
        ]


def _length_problems(job: Job) -> list[Problem]:
    if job.epochs is not None and job.steps is not None:
        return [Problem(("epochs",), "give `epochs` or `steps`, got both")]
    if job.epochs is not None or job.steps is not None:
        return []
    if job.max_time_s is None:
        return [Problem(("epochs",), "give `epochs`, `steps` or `max_time_s`, got none")]
    return unbounded_problems(job.lr_schedule)


def _gpu_problems(job: Job) -> list[Problem]:
    gpus = job.scaling.resources().get("GPU", 0)
    if gpus and job.failure.spare_workers:
        text = "a spare cannot take over a lost worker's GPU"
        return [Problem(("failure", "spare_workers"), text, "remove it")]
    if bool(gpus) == job.scaling.use_gpu:
        return []
    where = ("scaling", "resources_per_worker")
    got = "true" if job.scaling.use_gpu else "false"
    return [Problem(where, f"asks for {gpus:g} GPU while use_gpu is {got}")]


def _precision_problems(job: Job) -> list[Problem]:
    if job.precision != "fp16":
        return []
    problems = []
    if job.embeddings is not None:
        text = "cannot be combined with `embeddings`: gradients of rows would be scaled"
        problems.append(Problem(("precision",), text, "use bf16"))
    if job.failure.non_finite == "ignore":
        text = "cannot be `ignore` with `precision: fp16`, whose loss scale goes by it"
        problems.append(Problem(("failure", "non_finite"), text, "allowed: stop, skip"))
    return problems


def _data_problems(job: Job) -> list[Problem]:
    """Check for settings that torch refuses on workers, or ignores with a warning."""
    data, fields_set = job.data, job.data.model_fields_set
    problems = [
        Problem(("data", field), "has no effect without loader processes", "give num_workers, too")
        for field in sorted(data.unused_fields() & fields_set)
        if field != "persistent_workers" or data.persistent_workers
    ]
    if data.pin_memory and not job.scaling.use_gpu:
        text = "has no effect without GPUs: torch pins no memory then"
        problems.append(Problem(("data", "pin_memory"), text, "remove it, or set scaling.use_gpu"))
    return problems


def _evaluation_problems(job: Job) -> list[Problem]:
    if job.evaluation.unused_fields() & job.evaluation.model_fields_set:
        return [Problem(("evaluation",), "give `every_steps` or `every_epochs`, got both")]
    return []


def _checkpoint_problems(job: Job) -> list[Problem]:
    config = job.checkpoint
    if config.every_steps is not None and config.every_epochs is not None:
        return [Problem(("checkpoint",), "give `every_steps` or `every_epochs`, got both")]
    if config.num_to_keep != CheckpointConfig().num_to_keep and not config.enabled:
        text = "has no effect without `every_steps` or `every_epochs`"
        return [Problem(("checkpoint", "num_to_keep"), text, "remove it")]
    if config.trained_only and not config.enabled and not config.save_final:
        text = "has no effect without checkpoints and without `save_final`"
        return [Problem(("checkpoint", "trained_only"), text, "remove it")]
    return evaluation_problems(job)


def _storage_problems(job: Job) -> list[Problem]:
    if not is_url(job.storage_path):
        return []
    text, hint = url_problem(job.storage_path)
    return [Problem(("storage_path",), text, hint)] if text else []


def _embedding_problems(job: Job) -> list[Problem]:
    """Check for fields that would apply to a part of the model only."""
    if job.embeddings is None:
        return []
    problems = []
    if job.clip_norm is not None:
        text = "cannot be combined with `embeddings`: the norm would lack the rows' gradients"
        hint = "remove it, and lower the learning rates if need be"
        problems.append(Problem(("clip_norm",), text, hint))
    if job.ema is not None:
        text = "cannot be combined with `embeddings`: rows of tables are not averaged"
        hint = "remove it, or use nn.Embedding"
        problems.append(Problem(("ema",), text, hint))
    return problems
