"""
Construction of a training loop from a job and a task, in separate phases.

    make_task    import the task's module
    prepare      build model and data; no communication
    join         connect the ports and set up the strategy; waits for the other ranks
    Loop.run     train
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from distplat.platform.checkpoints import is_due
from distplat.platform.errors import Problem, SpecError
from distplat.platform.even_split import split_evenly
from distplat.platform.lr_schedules import length_problems
from distplat.platform.optimizers import TaskOptimizer
from distplat.platform.plateau import PLATEAU
from distplat.platform.progress import AnyReport
from distplat.platform.resume import FROZEN, NOT_FINITE, STREAM
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.platform.tensor_file import EMA_PREFIX, TASK_PREFIX
from distplat.strategies.catalog import make_strategy
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.checkpoint.checkpoint_types import Take
from distplat.strategies.checkpoint.frozen_base import FrozenBase, check_trained_only
from distplat.strategies.checkpoint.initial_weights import fill_part, initial_weights
from distplat.strategies.collective import Collective
from distplat.strategies.loop.agreement import agree, facts_of, hash_samples
from distplat.strategies.loop.batches import make_sampler, total_steps
from distplat.strategies.loop.checks import (
    check_device,
    check_evaluations,
    check_frequencies,
    check_state,
    checked_data,
    checked_model,
)
from distplat.strategies.loop.compute import TaskModel
from distplat.strategies.loop.gathering import Gathering, all_gather_conflict, uses_all_gather
from distplat.strategies.loop.loaders import start_loader_server, warning_of
from distplat.strategies.loop.loop import LeasedLoop, Loop, Progress, task_plan
from distplat.strategies.loop.losses import LOSS_SCALE, LossScale, TermWeights
from distplat.strategies.loop.metric_states import TaskMetrics
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.loop.seeding import seed_all
from distplat.strategies.loop.streams import StreamPosition, StreamSamples
from distplat.strategies.loop.task_settings import (
    digest_of,
    order_of,
    schedule_digest,
    task_parameters,
    with_task_schedule,
)
from distplat.strategies.loop.task_warnings import (
    job_warnings,
    length_warning,
    model_warnings,
    reading_warning,
    schedule_facts,
)
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.model_state import ModelState, Shares
from distplat.strategies.model.module_options import apply_module_options
from distplat.strategies.model.optim import check_groups, sync_plateau
from distplat.strategies.model.shared_memory import check_memory
from distplat.strategies.model.task_optimizer import build_optimizers, optimizers_digest
from distplat.strategies.ports import Leases, RunStore, Shards, Tables
from distplat.strategies.sparse.lookups import lookups_of
from distplat.strategies.sparse.modules import dense_parameters
from distplat.strategies.strategy_spec import Roles
from distplat.strategies.task import Task, overrides
from distplat.strategies.worker_strategy import Context, WorkerStrategy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ports:
    """A worker's ports in one attempt; None: neither the job nor the strategy needs the port."""

    collective: Collective | None = None
    """Group of all ranks."""
    shards: Shards | None = None
    """Client of the parameter servers."""
    tables: Tables | None = None
    """Client of the embedding servers."""
    leases: Leases | None = None
    """Client of the task scheduler."""
    peers: Callable[[], Collective] | None = None
    """Creates a group of all workers, for strategies without a group; see `Context.peers`."""
    run_store: RunStore | None = None
    """Store in which ranks compare their model, data and code."""


@dataclass(frozen=True)
class CheckpointPorts:
    """Checkpoint that a worker starts from, and destination of new checkpoints."""

    saved: SavedState | None = None
    """Checkpoint to load; None: the worker keeps its model, as built or as trained so far."""
    checkpoint_step: int = 0
    """Step of the newest checkpoint."""
    take: Take | None = None
    """Receives this rank's shards of new checkpoints; None: checkpoints are disabled."""


FRESH = CheckpointPorts()
"""No checkpoints."""


def make_task(job: Job, load: Callable[[], type[Task]]) -> Task:
    """
    Create the task; random numbers that its module and class draw are the same on all ranks.

    Args:
        job: the job.
        load: imports the task's module and returns the class.
    """
    seed_all(job.seed)
    task_class = load()
    seed_all(job.seed)
    return task_class(**job.task_args)


def prepare(
    job: Job, task: Task, device: str = "cpu", strategy: WorkerStrategy[Any] | None = None
) -> Prepared:
    """
    Build model and data. Generators are seeded before each call of user code, so that ranks agree.

    Args:
        job: the job.
        task: the user's task; its exceptions propagate.
        device: device of the model.
        strategy: the job's strategy; None: a strategy that does not shard the model.
    """
    loaders_ready = start_loader_server(job)
    seed_all(job.seed)
    spec = make_strategy(job) if strategy is None else strategy.strategy
    roles = spec.roles(job)
    model = checked_model(task, task.model() if strategy is None else strategy.build_model(task))
    warnings = model_warnings(job, model)
    check_frequencies(model, roles.replicas(job.scaling.world) * spec.micro_batches(job))
    check_state(model, sent=roles.collective is not None and job.scaling.world > 1)
    check_device(device)
    check_trained_only(job, model)
    lookups = lookups_of(model, job)
    unsharded = strategy is None or not strategy.cuts_model
    unfreezes = strategy is not None and strategy.can_unfreeze()
    task_extra = task_parameters(task, model)
    if task_extra and not unsharded:
        raise SpecError(_kept_in_task(job, [*task_extra]))
    extra = {TASK_PREFIX + name: parameter for name, parameter in task_extra.items()}
    check_groups(job.optimizer, model, extra)
    initial = {} if job.initial_weights is None else initial_weights(job, model, extra)
    check_memory(model, {n: p for n, p in dense_parameters(model) if p.requires_grad} | extra, task)
    part = _flat_model(job, model, extra, device, unfreezes=unfreezes) if unsharded else None
    data, eval_data, sampler = _data(job, task, roles)
    steps = total_steps(job, sampler)
    if problems := length_problems(job.lr_schedule, steps):  # `epochs` are steps only now
        raise SpecError(*problems)
    check_evaluations(job, sampler, eval_data)
    loaders_ready()
    full_model = None if unsharded else model
    prepared = Prepared(
        job, task, full_model, data, eval_data, sampler, steps, device, roles, part, lookups
    )
    prepared.initial = initial if any(p.is_meta for p in model.parameters()) else {}
    prepared = _with_task_updates(prepared)
    prepared.warnings = [*warnings, *job_warnings(prepared.job, sampler)]
    return prepared


def _flat_model(
    job: Job, model: nn.Module, extra: Mapping[str, Tensor], device: str, *, unfreezes: bool
) -> FlatModel:
    """Move the model and the task's own parameters to the device, into one flat vector."""
    apply_module_options(job, model)
    for tensor in extra.values():
        tensor.data = tensor.data.to(device)
    takes, group_of = job.optimizer.takes, job.optimizer.group_of
    return FlatModel(model.to(device), extra, unfreezes=unfreezes, takes=takes, group_of=group_of)


def _data(job: Job, task: Task, roles: Roles) -> tuple[Any, Any, Sampler]:
    """Return training data, evaluation data or None, and the sampler of the training data."""
    seed_all(job.seed)
    data = checked_data(job, task, task.train_data(), "train_data")
    order = order_of(task, data, job.seed)
    sampler = make_sampler(job, data, roles.replicas(job.scaling.world), order)
    seed_all(job.seed)
    eval_data = task.eval_data()
    if eval_data is not None:
        eval_data = checked_data(job, task, eval_data, "eval_data")
    for samples, method in ((data, "train_data"), (eval_data, "eval_data")):
        if samples is None or isinstance(samples, StreamSamples):  # streams are checked when read
            continue
        if warning := warning_of(samples, method):
            logger.warning(warning)
    return data, eval_data, sampler


def _with_task_updates(p: Prepared) -> Prepared:
    """Apply the learning rates and the optimizer that the task defines, if any."""
    p.job = with_task_schedule(p.job, p.task, p.total_steps).with_plateau()
    if p.part is not None and isinstance(p.job.optimizer, TaskOptimizer):
        p.made, p.job = build_optimizers(p.job, p.task, p.part)
    return p


def _kept_in_task(job: Job, names: Sequence[str]) -> Problem:
    text = (
        f"{job.strategy.name} trains the model only, and the task keeps {', '.join(names)} itself"
    )
    hint = "make them part of what model() returns, or use `strategy: ring` or `strategy: ps-sync`"
    return Problem(("task",), text, hint)


def describe(prepared: Prepared) -> None:
    """Fingerprint this worker's model, data and code, which `join` compares between ranks."""
    p = prepared
    model = p.model if p.model is not None else p.flat.model
    sent = not p.roles.consistency.dynamic_tasks
    facts = facts_of(p.task, model, p.data, p.eval_data, p.job.seed, sent=sent)
    optimizer = optimizers_digest(p.made, p.flat) if p.made else ""
    digests = ("lr", schedule_digest(p.job)), ("optimizer", optimizer)
    p.facts = replace(facts, order=digest_of(p.sampler), said=digests)
    if warning := reading_warning(p.data, [position for position, _ in facts.hashes]):
        p.warnings.append(warning)


def resize(prepared: Prepared, job: Job, strategy: WorkerStrategy[Any]) -> None:
    """Adopt the number of workers of another attempt's job."""
    prepared.job = prepared.job.with_workers(job.scaling.num_workers)  # keeps the task's settings
    prepared.roles = strategy.strategy.roles(job)
    world = prepared.roles.replicas(job.scaling.world)
    prepared.sampler = replace(prepared.sampler, world=world)


def _shard_model(
    p: Prepared, strategy: WorkerStrategy[Any], rank: int, group: Collective | None
) -> None:
    """Keep this rank's shard of the model, and load the initial weights into it."""
    p.part, p.holding = strategy.cut_model(p, rank, group)
    fill_part(p.part, p.initial, p.holding.slices)
    p.initial = {}  # only the first attempt loads them; later ones continue from trained weights


def join(
    prepared: Prepared,
    strategy: WorkerStrategy[Any],
    rank: int,
    ports: Ports,
    *,
    report: Callable[[AnyReport], None],
    progress: Progress,
    checkpoints: CheckpointPorts = FRESH,
    stop: Callable[[int], StopOrder] = lambda step: StopOrder.NONE,
) -> Loop | LeasedLoop:
    """
    Connect a rank's ports, set up its strategy, and return its loop.

    `report` receives finished steps and evaluations, `progress` is updated by the loop; for `stop`
    see `Loop`.

    Raises:
        DistplatError: the checkpoint or a rank has another model or data set, or a port failed.
    """
    p, leases = prepared, ports.leases
    if ports.peers is not None:  # all users of the group share it
        ports = replace(ports, peers=cache(ports.peers))
    if ports.run_store is not None and p.facts is not None:
        agree(p.facts, rank, ports.run_store, partial(hash_samples, p.data))
    group = ports.collective if p.roles.collective is not None else None
    if strategy.cuts_model:
        _shard_model(p, strategy, rank, group)
    _load(p, checkpoints.saved)
    if rank == 0 and checkpoints.saved is not None:
        if warning := length_warning(p.job, p.total_steps, checkpoints.saved.state):
            logger.warning("%s", warning)
    context = _context(p, rank, ports, checkpoints, progress, report)
    start = _set_up(p, strategy, context, ports.tables)
    checkpoint = _checkpoints(p, strategy, rank, checkpoints.take)
    gathering, p.weights = _gathering(p, strategy, context), _term_weights(p, strategy, context)
    saved = checkpoints.saved
    newest = max(checkpoints.checkpoint_step, saved.step if saved is not None else 0)
    common = p, strategy, rank, report, progress, start, checkpoint, gathering, newest
    if leases is not None:
        leases.connect(task_plan(p.job, p.sampler, p.total_steps, start, p.eval_data is not None))
        if p.roles.consistency.dynamic_tasks:
            return LeasedLoop(*common, TaskModel(p, strategy.last_backward, progress.beat), leases)
    compute = strategy.compute(p, context)
    make_group = (lambda: None) if p.job.scaling.world == 1 else _group_of_all(p, context)
    group = _sync_with_others(p, ports, start, group, make_group)
    return Loop(*common, compute, stop, group, TaskMetrics(p.task, make_group))


def _sync_with_others(
    p: Prepared,
    ports: Ports,
    start: int,
    group: Collective | None,
    make_group: Callable[[], Collective | None],
) -> Collective | None:
    """Agree with the other ranks on learning rate and loss scale; return the group."""
    device = p.flat.params.device
    if (plateau := p.job.plateau) is not None:
        group = make_group() if group is None else group  # gathers evaluations
        settings = ports.shards.settings() if start and p.roles.servers and ports.shards else ()
        sync_plateau(plateau, start, group, settings, device)
    if p.loss_scale is not None:
        p.loss_scale.sync(start, make_group(), device)
    return group


def _group_of_all(p: Prepared, context: Context) -> Callable[[], Collective | None]:
    """Return a function that creates a group of all ranks, or returns the strategy's group."""
    has_group = p.roles.collective is not None
    return (lambda: context.collective) if has_group else context.peers


def _gathering(p: Prepared, strategy: WorkerStrategy[Any], context: Context) -> Gathering:
    """Return this rank's state of `all_gather`, with the reason if the job refuses it."""
    refused = None
    if conflict := all_gather_conflict(p.job, p.roles, gathers=strategy.strategy.gathers):
        text = f"all_gather() cannot be combined with {conflict}"
        refused = Problem(("strategy",), text, "use `strategy: ring` or `ps-sync`")
    elif strategy.strategy.micro_batches(p.job) > 1:
        text = "all_gather() in a loss needs a worker's part of the batch at once"
        hybrid = "strategy", "micro_batches"
        where = hybrid if strategy.cuts_model else ("gradient_accumulation",)
        refused = Problem(where, text, "set it to 1")
    make_group = _group_of_all(p, context)
    assert p.state is not None, "_load() makes it"
    expected = refused is None and p.sampler.world > 1 and uses_all_gather(p.task, p.flat.model)
    return Gathering(make_group, p.sampler.world, p.state.shares.micro_batches, expected, refused)


def _term_weights(
    p: Prepared, strategy: WorkerStrategy[Any], context: Context
) -> TermWeights | None:
    """
    Return the weights of a loss with several terms; None: the loss is a single term.

    Raises:
        SpecError: the strategy does not support `weights()`.
    """
    if not overrides(type(p.task), "weights"):
        return None
    if p.roles.consistency.dynamic_tasks:
        return TermWeights(p.task)
    if conflict := all_gather_conflict(p.job, p.roles, gathers=strategy.strategy.gathers):
        text = f"weights() cannot be combined with {conflict}"
        hint = "use `strategy: ring`, `ps-sync` or `ps-async`"
        raise SpecError(Problem(("strategy",), text, hint))
    return TermWeights(p.task, _group_of_all(p, context), p.sampler.world)


def _shares_of(p: Prepared) -> Shares:
    """Return the shares of a run, whose sampler may change between attempts."""

    def samples(step: int) -> list[int]:
        return [b - a for a, b in split_evenly(p.sampler.batch_size(step), p.sampler.world)]

    max_micro_batches = make_strategy(p.job).micro_batches(p.job)

    def micro_batches(step: int) -> list[int]:
        return [min(size, max_micro_batches) for size in samples(step)]

    def checkpoint_due(version: int) -> bool:
        every = p.job.checkpoint.period(p.sampler.steps_per_epoch)
        return is_due(version, every, p.total_steps)

    return Shares(samples, micro_batches, checkpoint_due)


def _context(
    p: Prepared,
    rank: int,
    ports: Ports,
    checkpoints: CheckpointPorts,
    progress: Progress,
    report: Callable[[AnyReport], None],
) -> Context:
    return Context(
        p.job,
        rank,
        p.job.scaling.world,
        p.total_steps,
        p.flat,
        ports.collective,
        ports.shards,
        progress.beat,
        checkpoints.saved,
        checkpoints.checkpoint_step,
        model_state=p.state,
        connect_peers=ports.peers,
        report=report,
        optimizers=p.made,
    )


def _set_up(
    p: Prepared, strategy: WorkerStrategy[Any], context: Context, tables: Tables | None
) -> int:
    """Set up the strategy and embedding tables; return the step to continue from."""
    if p.lookups is None or tables is None:
        return strategy.setup(context)
    steps = p.lookups.connect(tables, p.total_steps, context.saved)
    start = strategy.setup(replace(context, table_steps=steps))
    p.lookups.begin(start)
    return start


def trained_model(p: Prepared, strategy: WorkerStrategy[Any], rank: int) -> dict[str, Tensor]:
    """Return this rank's shard of the trained model, without tensors that the job does not save."""
    state = strategy.trained(p.flat)
    if (rank == 0 or p.holding is not None) and (name := p.not_finite()) is not None:
        text = "the trained model holds NaN or infinity, in %r: its last step made it so"
        logger.warning(text, name)
    unsaved = p.frozen.unchanged() if p.frozen is not None else {}
    return {n: tensor for n, tensor in state.items() if n.removeprefix(EMA_PREFIX) not in unsaved}


def _load(p: Prepared, saved: SavedState | None) -> None:
    """Load the checkpoint, if any; create loss scale, frozen base and model state."""
    if saved is not None:
        saved.check_data(p.sampler.size)
        mark = StreamPosition.read(saved.state.get(STREAM))
        if mark is not None and isinstance(p.data, StreamSamples):
            p.data.keep(mark)
        saved.load_model(p.flat, None if p.holding is None else p.holding.slices)
    p.loss_scale = p.loss_scale or LossScale.of(p.job, p.flat)
    if p.loss_scale is not None and saved is not None and LOSS_SCALE in saved.state:
        scale, steps = saved.state[LOSS_SCALE]
        p.loss_scale.load(saved.step, (float(scale), int(steps)))
    if p.job.plateau is not None and saved is not None:
        p.job.plateau.load_state_dict(saved.state.get(PLATEAU))
    if p.job.checkpoint.trained_only and p.frozen is None:
        p.frozen = FrozenBase(p.flat, None if saved is None else saved.left_out)
    if p.state is None:
        p.state = ModelState(p.flat, _shares_of(p), p.task.buffers)


def _checkpoints(
    p: Prepared, strategy: WorkerStrategy[Any], rank: int, take: Take | None
) -> Callable[[int, bool], None]:
    """Return the function that takes this rank's shard of a checkpoint; see `Loop.checkpoint`."""
    if take is None:
        return lambda version, stops: None
    every = p.job.checkpoint.period(p.sampler.steps_per_epoch)

    def checkpoint(version: int, stops: bool) -> None:
        if stops or is_due(version, every, p.total_steps):
            facts = _facts(p, version)
            part = strategy.checkpoint(version)
            if p.lookups is not None and rank == 0:  # one rank copies the tables for all
                part = part.also(partial(p.lookups.copies, version))
            if (
                stops or version == p.total_steps
            ):  # the run waits for it: all ranks have finished their steps
                part = replace(part, may_skip=False)
            take(version, part, facts)

    return checkpoint


def _facts(p: Prepared, version: int) -> dict[str, Any]:
    """Return the content of a checkpoint's `state.json`; mark the parameters that it omits."""
    facts: dict[str, Any] = {
        "epoch": p.sampler.epoch_of(version),
        "steps_per_epoch": p.sampler.steps_per_epoch,
        "samples": p.sampler.size,
        **schedule_facts(p.job, version, p.total_steps),
        "versions": {"torch": str(torch.__version__)},
    }
    if isinstance(p.data, StreamSamples):  # the position to resume reading from
        mark = p.data.mark_before(p.sampler.position(version))
        facts |= {} if mark is None else {STREAM: mark.saved()}
    if (name := p.not_finite()) is not None:
        facts[NOT_FINITE] = name
    if p.frozen is not None:
        facts[FROZEN] = p.frozen.unchanged()
        p.flat.unsaved = frozenset(facts[FROZEN])
    if p.loss_scale is not None:
        facts[LOSS_SCALE] = p.loss_scale.saved(version)
    if p.job.plateau is not None:
        facts[PLATEAU] = p.job.plateau.state_dict()
    if p.lookups is not None:
        facts["tables"] = [asdict(spec) for spec in p.lookups.specs]
    return facts
