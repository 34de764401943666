"""
The job: everything a run needs to know, in one frozen value.

Field names are Ray Train's and torch's where they have one. Reading a job from YAML, with file,
line and column in every message, is `platform/job_file.py`; a strategy's own options are checked
by the strategy (`strategies/catalog.py`), for only it knows them.
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
    """When a shard applies gradients, and what it makes of old ones."""

    asynchronous: bool = False
    """Apply each gradient when it comes; else one update of all workers' gradients."""
    bound: int | None = None
    """Asynchronous: steps that a task may be ahead of the oldest that is not done; None: any."""
    staleness_lr: bool = False
    """Divide the learning rate by a gradient's staleness (Zhang et al., IJCAI 2016)."""
    delay_compensation: float = 0.0
    """Lambda of the correction for what changed since the pull (Zheng et al., ICML 2017)."""
    backup_workers: int = 0
    """Synchronous: a step goes on without so many of the gradients (Chen et al., 2016)."""
    own_loop: bool = False
    """Gradients come from a train function, whose loop alone knows how many there will be."""

    @property
    def dynamic_tasks(self) -> bool:
        """
        Whether tasks are leased to whoever asks (`task_scheduler.py`); else each worker has its
        part of every step. Where nobody waits for others, nobody is to have a part of its own.
        """
        return self.asynchronous and not self.own_loop

    @property
    def private(self) -> bool:
        """Whether workers compute on copies of their own: shards change while they do."""
        return self.asynchronous or self.backup_workers > 0


SYNCHRONOUS = Consistency()
"""One update for all workers' gradients of a step."""


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
    """Which strategy, and the options that it declares."""

    name: StrategyName
    """A name of `distplat strategies`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """In a job file these stand beside `name`, not below a key of their own."""


def _strategy(value: object) -> object:
    """Take `ring` and `{name: ring, timeout_s: 5}`: options stand beside the name."""
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
"""`strategy` as it stands in a job file."""


class Scaling(Spec):
    """How many workers, and what each of them takes of the cluster (Ray Train's names)."""

    num_workers: Index = Field(1, le=1024)
    """Ranks; 0: train in the calling process, without Ray, for debugging."""
    use_gpu: Flag = False
    """Each worker takes one GPU, or the part that `resources_per_worker` names."""
    resources_per_worker: Resources = Field(default_factory=dict)
    """Ray resources of one worker, for example {CPU: 2, GPU: 0.5}; default {CPU: 1}. `memory` is in
    bytes."""

    @property
    def world(self) -> int:
        """Number of ranks: a run in the calling process has one."""
        return max(1, self.num_workers)

    def resources(self) -> dict[str, float]:
        """Resources of one worker with the defaults filled in."""
        default = {"CPU": 1.0} | ({"GPU": 1.0} if self.use_gpu else {})
        return default | self.resources_per_worker


_OLD_WORKERS = "num_loaders"


class Data(Spec):
    """How batches are made of the task's data set; names as in torch's DataLoader."""

    shuffle: Flag = True
    """A new order each epoch, from the job's seed; without effect beside a task's `sampler`,
    and for a stream."""
    drop_last: Flag = False
    """Leave out the last batch of an epoch where it is smaller than the others."""
    num_workers: Index = Field(0, le=256)
    """Loader processes per rank, as in torch's DataLoader; 0: load in the training thread."""
    prefetch_factor: Count = Field(2, le=1024)
    """Batches that each loader process keeps ready; needs num_workers > 0."""
    persistent_workers: Flag = False
    """Keep the loader processes of evaluations from one to the next; needs num_workers > 0. Those
    of the training data live as long as the run in any case."""
    pin_memory: Flag | None = None
    """Put batches into page-locked memory, from which copies to a GPU go on beside the computing;
    None: with GPUs and loader processes. It needs GPUs."""

    def unused_fields(self) -> set[str]:
        """Name the fields that have no effect beside the others."""
        return set() if self.num_workers else {"prefetch_factor", "persistent_workers"}

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, fields: Any) -> Any:
        """Take the name that `num_workers` had before."""
        if not isinstance(fields, Mapping) or _OLD_WORKERS not in fields:
            return fields
        if "num_workers" in fields:
            raise PydanticCustomError(
                "renamed", f"{_OLD_WORKERS} is the old name of num_workers: give one"
            )
        logger.warning("data.%s is called data.num_workers now, as in torch", _OLD_WORKERS)
        return {"num_workers" if k == _OLD_WORKERS else k: v for k, v in fields.items()}


class Evaluation(Spec):
    """When `eval_data` is run through the model (only for tasks that have it)."""

    every_epochs: Index = 1
    """Evaluate every N epochs; 0: only after the last step."""
    every_steps: Count | None = None
    """Evaluate every N steps and after the last one, instead of by epochs."""
    before_first: Flag = False
    """Evaluate before the first step, too, at step 0; `lr_schedule` does not go by that one."""

    def period(self, steps_per_epoch: int) -> int:
        """Give the steps between two evaluations; 0: there is only that after the last step."""
        return self.every_steps or self.every_epochs * steps_per_epoch

    def unused_fields(self) -> set[str]:
        """Name the fields that have no effect beside the others."""
        return set() if self.every_steps is None else {"every_epochs"}


class CheckpointConfig(Spec):
    """What is kept of the model, while it is trained and at the end (docs/checkpoints.md)."""

    every_steps: Count | None = None
    """Save every N steps and after the last step; None: no checkpoints by steps."""
    every_epochs: Count | None = None
    """Save every N epochs and after the last step; give this or `every_steps`."""
    num_to_keep: Count = 2
    """Checkpoints that stay on the disk, the newest; older ones are deleted."""
    keep_best: KeepBest | None = None
    """The best checkpoint, by a figure of the evaluation after its step, stays beside these."""
    save_final: Flag = True
    """Write the trained parameters to `model.safetensors` in the run directory."""
    trained_only: Flag = False
    """Leave frozen parameters out of checkpoints and of `model.safetensors`, as for LoRA; whoever
    reads them needs the same base."""

    @property
    def wanted(self) -> bool:
        """Whether checkpoints are taken during the run."""
        return self.every_steps is not None or self.every_epochs is not None

    def period(self, steps_per_epoch: int) -> int:
        """Give the steps between two checkpoints; 0: there are none."""
        return self.every_steps or (self.every_epochs or 0) * steps_per_epoch


class Failure(Spec):
    """What is done about failures, and deadlines; an error that one causes names its field."""

    max_failures: Index | None = None
    """Restarts after lost workers, servers or nodes, of which one is given back for each 100 steps
    of progress, and for each new checkpoint that a train function reports; None: 3 where survivors
    keep their state (not with a sharded optimizer, nor without replicas) or there are checkpoints,
    else 0."""
    max_preemptions: Index | None = None
    """Restarts after machines were taken away, counted apart and given back alike; None: 100 where
    `max_failures` is 3 by default, else 0."""

    spare_workers: Flag = False
    """Have a process on each node that has imported torch and the task, and takes a lost worker's
    place in about a second. It takes memory for that, and no processor time; not with GPUs."""

    start_timeout_s: Seconds = 120.0
    """From asking Ray for the actors to the first step. So long, too, each 64 MiB of the trained
    model may take to come to the driver's node."""
    step_timeout_s: Seconds = 120.0
    """How long a rank or a server node may be waited for inside a step; so long, too, a rank's part
    of a checkpoint may take to leave its process, and to come to the driver's node."""
    heartbeat_timeout_s: Seconds = 30.0
    """Seconds without a heartbeat reply after which a live process counts as hung."""
    storage_timeout_s: Seconds = 120.0
    """How long the end of a run goes on with uploads while the storage of a URL does not answer.
    One operation, of 8 MiB at most, has a quarter of it. So long, too, a run that goes back waits
    for a checkpoint to be written; who reads one, or ends, for the disk to give or take bytes. Once
    a disk has taken nothing of a checkpoint for so long, those that do not come have failed."""
    non_finite: Literal["stop", "skip", "ignore"] = "stop"
    """A step with a loss or gradient that is NaN or infinite: `stop` ends the run before it is
    applied, `skip` leaves it out on all ranks, `ignore` applies it."""
    max_skipped_steps: Index = 100
    """Steps that `non_finite: skip` may leave out; one more ends the run."""


class Job(Spec):
    """One training run."""

    name: Name
    """1 to 63 of a-z, 0-9 and '-'; actors and the run directory are called after it."""
    task: EntryPoint | None = None
    """`module:Class`, from the job's directory or installed, or `module:function` of a train
    function, or a script with its arguments, `train.py --lr 0.1`; None: given to Trainer in
    Python."""
    own_loop: Flag = False
    """The task is a train function, with a loop of its own; so it is, too, where the job has none
    of `optimizer`, `global_batch_size`, `epochs` and `steps`."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task's constructor; of a train function its `config`."""
    strategy: StrategyField
    """The architecture: a name, or a mapping with the name and the strategy's options."""
    scaling: Scaling = Scaling()
    optimizer: JobOptimizer
    lr_schedule: NamedSchedule = Schedule()
    embeddings: Embeddings | None = None
    """Servers of embedding tables, for models with `distplat.nn.ShardedEmbedding`."""
    initial_weights: Annotated[InitialWeights | None, BeforeValidator(initial_weights_of)] = None
    """Weights to begin from: a path, or a mapping; None: those that the task's model() makes."""
    epochs: Count | None = None
    """Passes over the training data; give this or `steps`, or `max_time_s` alone."""
    steps: Count | None = None
    """Optimizer updates; give this or `epochs`, or `max_time_s` alone."""
    global_batch_size: Count = Field(le=2**30)
    """Samples of one update, over all workers."""
    gradient_accumulation: Count = Field(1, le=2**20)
    """Micro-batches into which each worker cuts its part of the batch."""
    clip_norm: Limit | None = None
    """Scale gradients down to this 2-norm over all parameters; `.inf`: never, but have the norm as
    `grad_norm` in the metrics; None: neither."""
    ema: EMA | None = None
    """An average of the weights beside them, evaluated and saved too; None: there is none."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """`bf16`: forward under autocast; parameters and updates stay as the model made them. `fp16`:
    the same in float16, with a loss scale as torch's `GradScaler` has it."""
    compile: Annotated[Compile | None, BeforeValidator(compile_of)] = None
    """`true`, or a mapping: forward and backward are compiled by `torch.compile`."""
    activation_checkpointing: str | None = Field(None, min_length=1)
    """Modules that keep only their inputs, and compute again in backward, to save memory: patterns
    of names with commas between, such as "blocks.*". Under `hybrid` whole stages do so."""
    seed: Index = 0
    """Seeds model, data, their order and dropout; the same seed gives the same bits."""
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
    checkpoint: CheckpointConfig = CheckpointConfig()
    early_stop: EarlyStop | None = None
    """When evaluations get no better the run ends; None: it makes all its steps."""
    max_time_s: Positive | None = None
    """The run ends, as after its last step, once so many seconds have passed since it began; None:
    it makes all its steps. It makes one at least. Without `epochs` and `steps` its time alone ends
    it."""
    failure: Failure = Failure()
    trackers: tuple[TrackerSpec, ...] = ()
    """Experiment trackers beside TensorBoard: `mlflow`, `trackio`, `wandb`, or mappings with their
    `name`."""
    storage_path: Folder = "runs"
    """Where run directories are made; relative to the directory `submit` was called in. Or a URL,
    such as s3://bucket/prefix: they are made in `runs`, and a copy of each is kept at the URL."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, fields: Any) -> Any:
        """Have a job of a train function do without the fields of a loop."""
        return own_loop.filled(fields) if isinstance(fields, Mapping) else fields

    def with_workers(self, number: int) -> "Job":
        """Give the same job with another number of workers; `problems` is to be asked of it."""
        scaling = self.scaling.model_copy(update={"num_workers": number})
        return self.model_copy(update={"scaling": scaling})

    @property
    def task_schedule(self) -> TaskSchedule | None:
        """The rates that the task says itself, once it has been asked; None: the job does."""
        schedule: Any = self.lr_schedule
        return schedule if isinstance(schedule, TaskSchedule) else None

    @property
    def plateau(self) -> Plateau | None:
        """What evaluations have made of the rates, in a worker; None: nothing goes by them."""
        schedule: Any = self.lr_schedule
        return schedule if isinstance(schedule, Plateau) else None

    def with_plateau(self) -> "Job":
        """Give a process's own job, if its rates go by evaluations; else the job as it is."""
        rule: Any = self.lr_schedule
        rule = rule.rule if isinstance(rule, Plateau) else rule
        return self.with_schedule(Plateau(rule)) if isinstance(rule, ReduceLROnPlateau) else self

    def with_schedule(self, schedule: TaskSchedule | Plateau | ReduceLROnPlateau) -> "Job":
        """Give the same job with another schedule, which may be one that no job file can hold."""
        return self.model_copy(update={"lr_schedule": schedule})

    def problems(self) -> list[Problem]:
        """Check what no single field can see; empty: the job holds together."""
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
    """What torch refuses in the workers, or passes over with a warning."""
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
    chosen = job.checkpoint
    if chosen.every_steps is not None and chosen.every_epochs is not None:
        return [Problem(("checkpoint",), "give `every_steps` or `every_epochs`, got both")]
    if chosen.num_to_keep != CheckpointConfig().num_to_keep and not chosen.wanted:
        text = "has no effect without `every_steps` or `every_epochs`"
        return [Problem(("checkpoint", "num_to_keep"), text, "remove it")]
    if chosen.trained_only and not chosen.wanted and not chosen.save_final:
        text = "has no effect without checkpoints and without `save_final`"
        return [Problem(("checkpoint", "trained_only"), text, "remove it")]
    return evaluation_problems(job)


def _storage_problems(job: Job) -> list[Problem]:
    if not is_url(job.storage_path):
        return []
    text, hint = url_problem(job.storage_path)
    return [Problem(("storage_path",), text, hint)] if text else []


def _embedding_problems(job: Job) -> list[Problem]:
    """What would hold for a part of the model only."""
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
