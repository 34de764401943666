"""
What a train function calls: `prepare`, `report`, `get_checkpoint`, `get_context`, and so on.

A worker makes a `FunctionSession` of its thread the current one (`running`), and calls the user's
function. The functions of `distplat` (`api.py`) ask it.
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
from distplat.strategies.function.batched_loader import BatchedLoader
from distplat.strategies.function.data_comparison import DataComparison
from distplat.strategies.function.dealt_sampler import DealtSampler, check_order
from distplat.strategies.function.fused_kernel import FusedSteps
from distplat.strategies.function.gradient_average import (
    BucketAverage,
    Exchange,
    SessionContext,
    broadcast_from_rank0,
)
from distplat.strategies.function.loader_kinds import check_kind, is_batched_otherwise
from distplat.strategies.function.loop_checks import EpochWatch, OptimizerWatch, ReportWatch
from distplat.strategies.function.metric_gathering import gather_for_metrics
from distplat.strategies.function.server_sum import ServerAverage, ServerSum
from distplat.strategies.function.server_updates import ServerUpdates
from distplat.strategies.function.sharded_loader import (
    DataShard,
    NumberedLoader,
    RankBatch,
    ShardedLoader,
    check_whole,
)
from distplat.strategies.function.stream_loader import StreamLoader
from distplat.strategies.loop.checks import check_state, without_shape
from distplat.strategies.loop.gathering import Gathering
from distplat.strategies.loop.loop import Progress
from distplat.strategies.loop.seeding import seed_rank
from distplat.strategies.loop.streams import is_stream
from distplat.strategies.model.module_hooks import (
    cut_elsewhere,
    passing_on,
    with_own_buffers,
    wrappers_in,
)
from distplat.strategies.model.parameter_layout import is_finite
from distplat.strategies.ports import LoopShards
from distplat.strategies.state_tree import has_tensors, pack, unpack
from distplat.strategies.torch_compat import has_default_group

logger = logging.getLogger(__name__)

_FILE = "state"
"""Name of the checkpoint's file, without its suffix."""


@dataclass(frozen=True)
class TrainContext:
    """Where a rank is; the names are those of Ray Train's context, and of Accelerate."""

    rank: int
    world: int
    local_rank: int
    """Among the ranks of its node."""
    local_world: int
    device: torch.device
    node_rank: int = 0
    """Of its node, among those that have workers."""
    nodes: int = 1
    variables: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Torchrun's, for the environment."""

    def get_world_rank(self) -> int:
        """Give this worker's number, from 0."""
        return self.rank

    def get_world_size(self) -> int:
        """Give the number of workers."""
        return self.world

    def get_local_rank(self) -> int:
        """Give this worker's number among those of its node."""
        return self.local_rank

    def get_local_world_size(self) -> int:
        """Give the number of workers on this node."""
        return self.local_world

    def get_node_rank(self) -> int:
        """Give the number of this worker's node."""
        return self.node_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, whose reports are the run's metrics."""
        return self.rank == 0


@dataclass(frozen=True)
class SessionPorts:
    """Between a session and the worker that it is in."""

    report: Callable[[AnyReport], None]
    """Takes rank 0's reports."""
    take: Take
    """Takes rank 0's checkpoints."""
    progress: Progress
    """Where this worker is."""
    saved: SavedState | None = None
    """What `get_checkpoint` gives; None: the run begins."""
    ending: Callable[[], bool] = lambda: False
    """Whether a callback or `early_stop` wants the run to end."""


class FunctionSession:
    """
    One rank's part in a run of a train function.

    Args:
        job: the run.
        context: this rank's.
        group: all ranks.
        ports: to the worker.
        shards: the way to parameter servers, not connected yet; None: the strategy has none.
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
            self._exchanged,
            lambda: self._progress.step,
            lambda: self._batch.fingerprint,
        )
        self._exchange = exchange = _exchange_of(session_context, shards)
        watched = self._before_first_step, exchange.before_step
        alone = group.world == 1
        self._optimizer_watch = OptimizerWatch(lambda: exchange.parameters, *watched, alone=alone)
        self._samples = self._epoch = 0
        self._batch = RankBatch(None, 0, 0)  #: the last one, without what it holds
        self._last_of_pass: dict[object, RankBatch] = {}  #: those under way, by their last one
        self._report_watch, self._epoch_watch = ReportWatch(job), EpochWatch(group.world)
        self._comparison = DataComparison(group, context.device)
        self._kept_groups: list[Any] = []
        """
        Groups of wrappers. A wrapper that is the last to let go of its group waits for the group's
        threads with the GIL held, and one that frees a tensor waits for the GIL: torch's own hangs.
        """
        self._asks_to_stop = self._warned = self._data_checked = False
        self._waited_s, self._last = 0.0, time.perf_counter()
        self._exchanges = 0
        self._progress.step = saved.step if saved is not None else 0
        self._progress.begun = True
        self._progress.beat()

    def prepare(self, *things: Any) -> Any:
        """Make models, optimizers, loaders and schedulers ready; see `api.prepare`."""
        models = [one for one in things if isinstance(one, nn.Module)]
        ready = {id(one): self._prepare_model(one, alone=len(models) == 1) for one in models}
        prepared = tuple(
            ready[id(one)] if id(one) in ready else self._prepare_other(one) for one in things
        )
        seed = self.job.seed
        if models and self.group.world > 1:  # they are made alike
            seed_rank(seed, self._progress.step, self.context.rank)
        return prepared[0] if len(prepared) == 1 else prepared

    def _prepare_model(self, given: nn.Module, *, alone: bool) -> nn.Module:
        wrapped = isinstance(given, nn.parallel.DistributedDataParallel)
        model = given.get_submodule("module") if wrapped else given
        wrappers = wrappers_in(given)
        self._kept_groups += [one.process_group for one in wrappers]
        if any(one is model for one in self._exchange.models):
            raise _refused("a model that it got before", "prepare each model once")
        for one in wrappers:
            passing_on(one, lambda on: self._exchange.enable(on, model))
        if cut := cut_elsewhere(model):
            hint = "give it the whole model; `hybrid` cuts that of a Task"
            raise _refused(f"a model of which each rank has a part, by {cut}", hint)
        if lazy := without_shape(model):
            raise _refused(f"a model in which {lazy}", "run a batch through it before prepare()")
        model.to(self.context.device)
        if not any(one.requires_grad for one in model.parameters()):  # a teacher, for example
            broadcast_from_rank0(
                [one for one in model.state_dict().values() if one.numel()], self.group
            )
            return given
        check_state(model, sent=False, named="a model that prepare() got")
        self._exchange.add(model, alone=alone, own_buffers=with_own_buffers(wrappers))
        return given

    def _prepare_other(self, thing: Any) -> Any:
        if isinstance(thing, DataLoader):
            return self._prepare_loader(thing)
        if isinstance(thing, torch.optim.Optimizer):
            inner = getattr(thing, "optimizer", thing)  # Accelerate and Lightning wrap it
            optimizer = inner if isinstance(inner, torch.optim.Optimizer) else thing
            self._exchange.take(optimizer)
            FusedSteps(optimizer)
            return thing
        if isinstance(thing, torch.optim.lr_scheduler.LRScheduler):
            self._epoch_watch.scheduler(thing)
            return thing  # it changes the optimizer, which is looked at when it steps
        hint = "models, optimizers, DataLoaders and schedulers of torch.optim.lr_scheduler"
        inside = "one by one; of an object that holds one, give what it holds, and leave others out"
        raise _refused(f"a {type(thing).__name__}", f"it takes {hint}, {inside}")

    def _prepare_loader(self, loader: DataLoader[Any]) -> ShardedLoader:
        context = self.context
        cut = DataShard(context.rank, context.world, self.job.seed)
        check_kind(loader)
        sharded: ShardedLoader
        if is_stream(loader.dataset):
            sharded = StreamLoader(loader, cut, context.device, self._note_batch, self.group)
        else:
            kind = BatchedLoader if is_batched_otherwise(loader) else NumberedLoader
            sharded = kind(loader, cut, context.device, self._note_batch)
            check_whole(sharded)
            if isinstance(sharded.sampler, DealtSampler):
                check_order(sharded.sampler, self.group, context.device)
            if context.world > 1:
                self._comparison.check(loader.dataset)
        if context.is_main_process:
            self._epoch_watch.loader(sharded, loader)
            logger.info("%s", sharded.described())
        return sharded

    def _before_first_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at an optimizer, and where the gradients come from that it is to use."""
        self._exchange.check(optimizer)
        prepared = self._batch.samples > 0 or self.group.world == 1
        divided = prepared or has_default_group()  # a DistributedSampler of its own, most likely
        if not divided and not self._data_checked and self.context.is_main_process:
            logger.warning(
                "the first batch is of no loader that prepare() gave: all %d workers train on the "
                "same samples, unless the loop reads a part by rank",
                self.group.world,
            )
        self._data_checked = True

    def _note_batch(
        self, one: object, batch: RankBatch | None, waited_s: float, epoch: int
    ) -> None:
        self._last_of_pass.pop(one, None)
        if batch is None:
            return
        self._epoch, self._batch = epoch, batch._replace(batch=None)
        self._last_of_pass[one] = self._batch
        if torch.is_grad_enabled():  # an evaluation trains on none
            self._samples += batch.samples
        self._waited_s += waited_s
        self._progress.beat()

    def report(self, metrics: Mapping[str, Any], checkpoint: Any = None) -> None:
        """Tell the run's figures, and keep a checkpoint; see `api.report`."""
        if not isinstance(metrics, Mapping):
            text = f"report() got a {type(metrics).__name__}: it takes numbers by name"
            raise SpecError(Problem(("task",), text, 'report({"loss": loss})'))
        figures = {name: _number(name, value) for name, value in metrics.items()}
        checkpoint = from_ray_train(checkpoint)
        self._report_watch.reported(figures, kept=checkpoint is not None)
        step = self._progress.step
        self._progress.step = step + 1
        self._progress.beat()
        now = time.perf_counter()
        whole, waited = now - self._last, self._waited_s
        samples, self._samples = self._samples * self.context.world, 0
        self._last, self._waited_s = now, 0.0
        if not self.context.is_main_process:
            if isinstance(checkpoint, Checkpoint) and not self._warned:
                self._warned = True
                text = "rank %d reported files (%s, ...), which are not kept: rank 0's are"
                logger.warning(text, self.context.rank, next(iter(checkpoint.files)))
            return
        if self._ports.ending() and not self._asks_to_stop and not self._warned:
            self._warned = True
            logger.warning("the run is to end, and its loop never asks distplat.should_stop()")
        loss = figures.pop("loss", math.nan)
        seconds = {"data": waited, "compute": max(0.0, whole - waited)}
        figures = {**self._exchange.figures(), **figures}
        self._ports.report(
            StepReport(0, step, self._epoch, loss, samples, seconds, 0, figures, weight=1.0)
        )
        if checkpoint is not None:
            self._keep(step + 1, checkpoint)

    def _keep(self, version: int, checkpoint: Any) -> None:
        tree, tensors = pack(checkpoint)
        part = tensors_part(_FILE, {str(n): one for n, one in enumerate(tensors)})
        facts = {FUNCTION: tree, "versions": {"torch": str(torch.__version__)}}
        if (name := self._not_finite()) is not None:
            facts[NOT_FINITE] = name
        self._ports.take(version, part, facts)

    def _not_finite(self) -> str | None:
        """
        Give the name of the first trained parameter that holds NaN or infinity; None: none does.

        Of models, not of what is reported: an attention's mask or a history may hold either.
        """
        for model in self._exchange.models:
            for name, one in model.named_parameters():
                values = torch.view_as_real(one) if one.is_complex() else one
                if one.requires_grad and not is_finite(values.detach()):
                    return name
        return None

    def checkpoint(self) -> Any:
        """Give what was reported last before this attempt; see `api.get_checkpoint`."""
        saved = self._ports.saved
        if saved is None:
            return None
        tree = saved.state[FUNCTION]
        tensors = saved.file(_FILE) if has_tensors(tree) else {}  # else there is no such file
        return unpack(tree, [tensors[str(n)] for n in range(len(tensors))])

    def should_stop(self) -> bool:
        """Say whether the loop is to end; see `api.should_stop`."""
        self._asks_to_stop = True
        wanted = self._ports.ending()
        if self._exchange.together and self.group.world > 1:
            flag = torch.tensor([int(wanted)], device=self.context.device)
            self.group.broadcast(flag)
            wanted = bool(flag)
        return wanted

    def gather(self, values: Any) -> Any:
        """Give what all ranks have; see `api.gather_for_metrics`."""
        # What was counted over a pass may be as long as its last batch.
        *_, last = (RankBatch(None, 0, 0), *self._last_of_pass.values())
        batch = last.samples, last.own
        return gather_for_metrics(values, self.group, self.context.device, batch)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients as they are in the backwards of this block."""
        self._exchange.enable(False)
        try:
            yield
        finally:
            self._exchange.enable(True)

    def gathering(self) -> Gathering:
        """
        Give this rank's state of `all_gather`.

        A rank's gradient of all rows is the sum over the ranks, and parameters have the mean of the
        ranks' gradients: so they have the gradient of the mean of the ranks' losses.
        """
        refused = None
        if not self._exchange.together:
            text = f"all_gather() does not go together with {self.job.strategy.name!r}: workers are"
            hint = "use `strategy: ring` or `ps-sync`"
            refused = Problem(("strategy",), f"{text} not in one step", hint)
        group = self.group
        everybody = [1] * group.world  # has rows each time
        return Gathering(lambda: group, group.world, lambda step: everybody, refused=refused)

    def _exchanged(self) -> None:
        self._exchanges += 1
        self._progress.beat()

    def returned(self) -> None:
        """Be told that the function has returned; others are told where this one has left."""
        step, count = self._progress.step, self._exchanges
        self._progress.returned = (
            f"after step {step}" if step else f"after {count} exchanges of gradients"
        )

    def leave(self) -> None:
        """
        Return when all ranks' functions have returned.

        Raises:
            SpecError: no report had what the job goes by.
        """
        self._report_watch.over()
        if self.context.is_main_process and self.group.world > 1:
            self._epoch_watch.over()
        self._exchange.leave()
        # Who leaves early takes its memory with it. Another rank may be in a barrier() of its loop:
        # the second one is not met by what comes then, and harms no operation over gloo.
        for _ in range(2):
            self.group.barrier()

    def trained(self) -> dict[str, Tensor]:
        """
        Give the trained models' state; of several with the model's number before each name.

        Raises:
            ValueError: ranks have trained other models.
        """
        self._exchange.settle()
        if self.context.is_main_process and (name := self._not_finite()) is not None:
            text = "the trained model holds NaN or infinity, in %r: its last step made it so"
            logger.warning(text, name)
        models = self._exchange.models
        if len(models) == 1:
            return dict(models[0].state_dict())
        return {f"{n}.{k}": v for n, one in enumerate(models) for k, v in one.state_dict().items()}

    def close(self) -> None:
        """Let go of the models; the group goes next."""
        self._optimizer_watch.close()
        self._exchange.close()


def _exchange_of(context: SessionContext, shards: LoopShards | None) -> Exchange:
    """Make what the job's strategy does with models and optimizers."""
    strategy = make_strategy(context.job)
    if shards is None:
        return Averages(partial(BucketAverage, context=context, options=strategy.options))
    if strategy.roles(context.job).consistency.asynchronous:
        return ServerUpdates(context, shards)
    servers = ServerSum(context, shards)
    return Averages(
        lambda model, number, _, own: ServerAverage(model, servers, number, own), servers.leave
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


def _refused(what: str, hint: str) -> SpecError:
    return SpecError(Problem(("task",), f"prepare() got {what}", hint))
