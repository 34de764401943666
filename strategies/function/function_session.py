"""
The session of a train function: the implementation of `prepare`, `report`, `get_checkpoint` etc.

A worker makes a `FunctionSession` the current session of its thread (`running`), and calls the
user's function. The functions of `distplat` (`api.py`) call the session.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distplat.platform.errors import Problem, SpecError
from distplat.platform.progress import AnyReport, StepReport
from distplat.platform.resume import FUNCTION, NOT_FINITE
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.checkpoint.checkpoint_types import Take
from distplat.strategies.checkpoint.parts import tensors_part
from distplat.strategies.collective import Collective
from distplat.strategies.directory_checkpoint import Checkpoint, from_ray_train
from distplat.strategies.function.averages import Averages
from distplat.strategies.function.batched_loader import BatchSamplerLoader
from distplat.strategies.function.data_comparison import DataComparison
from distplat.strategies.function.fused_kernel import FusedSteps
from distplat.strategies.function.gradient_average import (
    BucketAverage,
    Exchange,
    SessionContext,
    broadcast_from_rank0,
)
from distplat.strategies.function.loader_checks import check_loader_class, has_custom_batches
from distplat.strategies.function.loop_checks import EpochWatch, OptimizerWatch, ReportWatch
from distplat.strategies.function.metric_gathering import gather_for_metrics
from distplat.strategies.function.server_sum import ServerAverage, ServerSum
from distplat.strategies.function.server_updates import ServerUpdates
from distplat.strategies.function.sharded_loader import (
    DataShard,
    MapStyleLoader,
    RankBatch,
    ShardedLoader,
    check_not_empty,
)
from distplat.strategies.function.sharded_sampler import ShardedSampler, check_order
from distplat.strategies.function.stream_loader import StreamLoader
from distplat.strategies.loop.checks import check_state, without_shape
from distplat.strategies.loop.gathering import Gathering
from distplat.strategies.loop.loop import Progress
from distplat.strategies.loop.seeding import seed_rank
from distplat.strategies.loop.streams import is_stream
from distplat.strategies.model.module_hooks import (
    disable_averaging,
    modules_without_broadcast,
    sharded_class_name,
    wrappers_in,
)
from distplat.strategies.model.parameter_layout import is_finite
from distplat.strategies.ports import LoopShards
from distplat.strategies.state_tree import has_tensors, pack, unpack
from distplat.strategies.torch_compat import has_default_group

logger = logging.getLogger(__name__)

_FILE = "state"
"""Name of the checkpoint's file, without suffix."""


@dataclass(frozen=True)
class TrainContext:
    """Rank and device of a worker, with the names of Ray Train's context and Accelerate."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the workers of this node."""
    local_world_size: int
    device: torch.device
    node_rank: int = 0
    """Number of this node, among the nodes with workers."""
    nodes: int = 1
    variables: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Environment variables of torchrun."""

    def get_world_rank(self) -> int:
        """Return this worker's rank, from 0."""
        return self.rank

    def get_world_size(self) -> int:
        """Return the number of workers."""
        return self.world_size

    def get_local_rank(self) -> int:
        """Return this worker's rank among the workers of its node."""
        return self.local_rank

    def get_local_world_size(self) -> int:
        """Return the number of workers on this node."""
        return self.local_world_size

    def get_node_rank(self) -> int:
        """Return the number of this worker's node."""
        return self.node_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, whose reports are the run's metrics."""
        return self.rank == 0


@dataclass(frozen=True)
class SessionPorts:
    """The session's connections to its worker."""

    report: Callable[[AnyReport], None]
    """Receives rank 0's reports."""
    take: Take
    """Receives rank 0's checkpoints."""
    progress: Progress
    """This worker's progress."""
    saved: SavedState | None = None
    """The checkpoint for `get_checkpoint`; None: a new run."""
    ending: Callable[[], bool] = lambda: False
    """Returns whether a callback or `early_stop` has requested the end of the run."""


class FunctionSession:
    """
    One rank's session in a run of a train function.

    Args:
        job: the job.
        context: this rank's context.
        group: all ranks.
        ports: connections to the worker.
        shards: the port to parameter servers, not connected yet; None: the strategy has no servers.
    """

    def __init__(
        self,
        job: Job,
        context: TrainContext,
        group: Collective,
        ports: SessionPorts,
        shards: LoopShards | None,
    ) -> None:
        self.job, self.context, self.group = job, context, group
        self._ports, self._progress, saved = ports, ports.progress, ports.saved
        session_context = SessionContext(
            job,
            group,
            self._on_exchange,
            lambda: self._progress.step,
            lambda: self._batch.fingerprint,
        )
        self._exchange = exchange = _build_exchange(session_context, shards)
        self._optimizer_watch = OptimizerWatch(
            lambda: exchange.parameters,
            self._before_first_step,
            exchange.before_step,
            is_single_rank=group.world == 1,
        )
        self._samples = self._epoch = 0
        self._batch = RankBatch(None, 0, 0)  #: the last batch, without its data
        self._last_of_pass: dict[object, RankBatch] = {}  #: last batch of each current pass
        self._report_watch, self._epoch_watch = ReportWatch(job), EpochWatch(group.world)
        self._comparison = DataComparison(group, context.device)
        self._kept_groups: list[Any] = []
        """
        Process groups of wrappers, kept to avoid a deadlock in torch. A wrapper that holds the last
        reference waits for the group's threads while it holds the GIL, and a thread that frees a
        tensor waits for the GIL.
        """
        self._checks_stop = self._warned = self._data_checked = False
        self._waited_s, self._last = 0.0, time.perf_counter()
        self._exchanges = 0
        self._progress.step = saved.step if saved is not None else 0
        self._progress.begun = True
        self._progress.beat()

    def prepare(self, *objects: Any) -> Any:
        """See `api.prepare`."""
        models = [obj for obj in objects if isinstance(obj, nn.Module)]
        is_only_model = len(models) == 1
        prepared_models = {id(m): self._prepare_model(m, is_only_model) for m in models}
        prepared = tuple(
            prepared_models[id(obj)] if id(obj) in prepared_models else self._prepare_other(obj)
            for obj in objects
        )
        if models and self.group.world > 1:  # until now all ranks had the same seed
            seed_rank(self.job.seed, self._progress.step, self.context.rank)
        return prepared[0] if len(prepared) == 1 else prepared

    def _prepare_model(self, module: nn.Module, is_only_model: bool) -> nn.Module:
        is_ddp = isinstance(module, nn.parallel.DistributedDataParallel)
        model = module.get_submodule("module") if is_ddp else module
        wrappers = wrappers_in(module)
        self._kept_groups += [wrapper.process_group for wrapper in wrappers]
        if any(prepared is model for prepared in self._exchange.models):
            raise _prepare_error("a model that is already prepared", "prepare each model once")
        for wrapper in wrappers:
            disable_averaging(wrapper, lambda on: self._exchange.enable(on, model))
        if wrapper_name := sharded_class_name(model):
            hint = "pass the whole model; `hybrid` splits the model of a Task"
            raise _prepare_error(f"a model of which each rank has a part, by {wrapper_name}", hint)
        if lazy := without_shape(model):
            raise _prepare_error(
                f"a model in which {lazy}", "run a batch through it before prepare()"
            )
        model.to(self.context.device)
        if not any(p.requires_grad for p in model.parameters()):  # for example, a teacher
            tensors = [tensor for tensor in model.state_dict().values() if tensor.numel()]
            broadcast_from_rank0(tensors, self.group)
            return module
        check_state(model, sent=False, named="a model that prepare() got")
        self._exchange.add_model(
            model, is_only_model=is_only_model, local_buffers=modules_without_broadcast(wrappers)
        )
        return module

    def _prepare_other(self, obj: Any) -> Any:
        if isinstance(obj, DataLoader):
            return self._prepare_loader(obj)
        if isinstance(obj, torch.optim.Optimizer):
            inner = getattr(obj, "optimizer", obj)  # unwrap Accelerate's and Lightning's class
            optimizer = inner if isinstance(inner, torch.optim.Optimizer) else obj
            self._exchange.add_optimizer(optimizer)
            FusedSteps(optimizer)
            return obj
        if isinstance(obj, torch.optim.lr_scheduler.LRScheduler):
            self._epoch_watch.add_scheduler(obj)
            return obj  # it changes the optimizer, which is checked when it steps
        hint = (
            "pass models, optimizers, DataLoaders and schedulers of torch.optim.lr_scheduler as "
            "separate arguments; unwrap objects that contain one, and do not pass anything else"
        )
        raise _prepare_error(f"a {type(obj).__name__}", hint)

    def _prepare_loader(self, loader: DataLoader[Any]) -> ShardedLoader:
        context = self.context
        shard = DataShard(context.rank, context.world_size, self.job.seed)
        check_loader_class(loader)
        sharded: ShardedLoader
        if is_stream(loader.dataset):
            sharded = StreamLoader(loader, shard, context.device, self._on_batch, self.group)
        else:
            cls = BatchSamplerLoader if has_custom_batches(loader) else MapStyleLoader
            sharded = cls(loader, shard, context.device, self._on_batch)
            check_not_empty(sharded)
            if isinstance(sharded.sampler, ShardedSampler):
                check_order(sharded.sampler, self.group, context.device)
            if context.world_size > 1:
                self._comparison.check(loader.dataset)
        if context.is_main_process:
            self._epoch_watch.add_loader(sharded, loader)
            logger.info("%s", sharded.description())
        return sharded

    def _before_first_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check an optimizer, and the loader of the batch that its gradients come from."""
        self._exchange.check_optimizer(optimizer)
        is_prepared = self._batch.samples > 0 or self.group.world == 1
        is_split = is_prepared or has_default_group()  # most likely by a DistributedSampler
        if not is_split and not self._data_checked and self.context.is_main_process:
            logger.warning(
                "the first batch is not from a loader that prepare() returned: all %d workers "
                "train on the same samples, unless the loop splits the data by rank",
                self.group.world,
            )
        self._data_checked = True

    def _on_batch(
        self, this_pass: object, batch: RankBatch | None, waited_s: float, epoch: int
    ) -> None:
        self._last_of_pass.pop(this_pass, None)
        if batch is None:
            return
        self._epoch, self._batch = epoch, batch._replace(batch=None)
        self._last_of_pass[this_pass] = self._batch
        if torch.is_grad_enabled():  # samples of an evaluation do not count
            self._samples += batch.samples
        self._waited_s += waited_s
        self._progress.beat()

    def report(self, metrics: Mapping[str, Any], checkpoint: Any = None) -> None:
        """See `api.report`."""
        if not isinstance(metrics, Mapping):
            text = f"report() got a {type(metrics).__name__}: it takes numbers by name"
            raise SpecError(Problem(("task",), text, 'report({"loss": loss})'))
        figures = {name: _number(name, value) for name, value in metrics.items()}
        checkpoint = from_ray_train(checkpoint)
        self._report_watch.on_report(figures, has_checkpoint=checkpoint is not None)
        step = self._progress.step
        self._progress.step = step + 1
        self._progress.beat()
        now = time.perf_counter()
        total, waited = now - self._last, self._waited_s
        samples, self._samples = self._samples * self.context.world_size, 0
        self._last, self._waited_s = now, 0.0
        if not self.context.is_main_process:
            if isinstance(checkpoint, Checkpoint) and not self._warned:
                self._warned = True
                text = "rank %d reported files (%s, ...), which are not saved: only rank 0's are"
                logger.warning(text, self.context.rank, next(iter(checkpoint.files)))
            return
        if self._ports.ending() and not self._checks_stop and not self._warned:
            self._warned = True
            logger.warning("the run should end, but its loop never calls distplat.should_stop()")
        loss = figures.pop("loss", math.nan)
        seconds = {"data": waited, "compute": max(0.0, total - waited)}
        figures = {**self._exchange.figures(), **figures}
        self._ports.report(
            StepReport(0, step, self._epoch, loss, samples, seconds, 0, figures, weight=1.0)
        )
        if checkpoint is not None:
            self._save(step + 1, checkpoint)

    def _save(self, version: int, checkpoint: Any) -> None:
        tree, tensors = pack(checkpoint)
        part = tensors_part(_FILE, {str(n): tensor for n, tensor in enumerate(tensors)})
        facts = {FUNCTION: tree, "versions": {"torch": str(torch.__version__)}}
        if (name := self._not_finite()) is not None:
            facts[NOT_FINITE] = name
        self._ports.take(version, part, facts)

    def _not_finite(self) -> str | None:
        """
        Return the name of the first trained parameter with NaN or infinity; None: all are finite.

        Only models are checked, not the reported checkpoint: an attention mask or a history may
        contain either.
        """
        for model in self._exchange.models:
            for name, parameter in model.named_parameters():
                values = torch.view_as_real(parameter) if parameter.is_complex() else parameter
                if parameter.requires_grad and not is_finite(values.detach()):
                    return name
        return None

    def checkpoint(self) -> Any:
        """See `api.get_checkpoint`."""
        saved = self._ports.saved
        if saved is None:
            return None
        tree = saved.state[FUNCTION]
        tensors = saved.file(_FILE) if has_tensors(tree) else {}  # without tensors, no such file
        return unpack(tree, [tensors[str(n)] for n in range(len(tensors))])

    def should_stop(self) -> bool:
        """See `api.should_stop`."""
        self._checks_stop = True
        is_ending = self._ports.ending()
        if self._exchange.synchronous and self.group.world > 1:
            flag = torch.tensor([int(is_ending)], device=self.context.device)
            self.group.broadcast(flag)
            is_ending = bool(flag)
        return is_ending

    def gather(self, values: Any) -> Any:
        """See `api.gather_for_metrics`."""
        # Only during a pass: after it, a tensor over all samples may be as long as the last batch.
        *_, last = (RankBatch(None, 0, 0), *self._last_of_pass.values())
        batch = last.samples, last.unique
        return gather_for_metrics(values, self.group, self.context.device, batch)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """See `api.no_sync`."""
        self._exchange.enable(False)
        try:
            yield
        finally:
            self._exchange.enable(True)

    def gathering(self) -> Gathering:
        """
        Return this rank's state of `all_gather`.

        A rank's gradient of the gathered rows is summed over the ranks, and parameters get the mean
        of the ranks' gradients. The result is the gradient of the mean of the ranks' losses.
        """
        problem = None
        if not self._exchange.synchronous:
            text = f"all_gather() cannot be combined with {self.job.strategy.name!r}: workers do"
            hint = "use `strategy: ring` or `ps-sync`"
            problem = Problem(("strategy",), f"{text} not run the same steps", hint)
        group = self.group
        all_ranks = [1] * group.world  # every rank has rows in each call
        return Gathering(lambda: group, group.world, lambda step: all_ranks, refused=problem)

    def _on_exchange(self) -> None:
        self._exchanges += 1
        self._progress.beat()

    def returned(self) -> None:
        """
        Record that the function has returned, for the messages of ranks that still wait for this
        one.
        """
        step, count = self._progress.step, self._exchanges
        self._progress.returned = (
            f"after step {step}" if step else f"after {count} exchanges of gradients"
        )

    def leave(self) -> None:
        """
        Wait until the functions of all ranks have returned.

        Raises:
            SpecError: No report had the metric of `early_stop`.
        """
        self._report_watch.on_return()
        if self.context.is_main_process and self.group.world > 1:
            self._epoch_watch.on_return()
        self._exchange.leave()
        # A rank that exits early frees its shared memory. Two barriers, because another rank may
        # be in a barrier() of its own loop, which the first one would match.
        for _ in range(2):
            self.group.barrier()

    def trained(self) -> dict[str, Tensor]:
        """
        Return the trained models' state; with several models, names are prefixed by the model's
        number.

        Raises:
            ValueError: Ranks have trained different models.
        """
        self._exchange.finalize()
        if self.context.is_main_process and (name := self._not_finite()) is not None:
            text = "the trained model holds NaN or infinity, in %r, after its last step"
            logger.warning(text, name)
        models = self._exchange.models
        if len(models) == 1:
            return dict(models[0].state_dict())
        return {f"{n}.{k}": v for n, m in enumerate(models) for k, v in m.state_dict().items()}

    def close(self) -> None:
        """Release the models; the group is closed afterwards."""
        self._optimizer_watch.close()
        self._exchange.close()


def _build_exchange(context: SessionContext, shards: LoopShards | None) -> Exchange:
    """Build the exchange of the job's strategy."""
    strategy = make_strategy(context.job)
    if shards is None:
        return Averages(partial(BucketAverage, context=context, options=strategy.options))
    if strategy.roles(context.job).consistency.asynchronous:
        return ServerUpdates(context, shards)
    servers = ServerSum(context, shards)
    return Averages(
        lambda model, number, _, buffers: ServerAverage(model, servers, number, buffers),
        servers.leave,
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool | int | float):
        return float(value)
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "size", None) is not None:
        try:
            return float(item())
        except (RuntimeError, TypeError, ValueError):
            pass
    text = f"report() got {name!r}, a {type(value).__name__}: it takes numbers"
    raise SpecError(Problem(("task",), text, "tensors of one element are numbers, too"))


def _prepare_error(what: str, hint: str) -> SpecError:
    return SpecError(Problem(("task",), f"prepare() got {what}", hint))
