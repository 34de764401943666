"""
Average a model's gradients over the ranks in each backward, as DistributedDataParallel does.

    backward     layer 2 | layer 1 | layer 0 | average      | returns
    group             [ bucket 0 ][ bucket 1 ]              |
                                             ^ queued by the first gradient of this backward

When `backward()` returns, `.grad` is the mean over the ranks. Everything that a loop does with it
afterwards works as in a single process: clipping, a scaler, any torch optimizer.

An `Exchange` is how a strategy trains the models of a session.

As in torch, a parameter has a gradient if `.grad` is not None. If only some ranks have a gradient,
it counts as zero on the others. If no rank has one it stays None, and the optimizer skips the
parameter.
"""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from typing_extensions import override

from distplat.platform.errors import NonFiniteError, Problem, SpecError
from distplat.platform.spec import Job
from distplat.strategies.collective import Collective, mismatched_ranks
from distplat.strategies.function.loop_checks import check_same_parameters
from distplat.strategies.loop.control import NonFiniteSteps, StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.module_hooks import hooks_warning
from distplat.strategies.model.parameter_layout import fill, is_finite
from distplat.strategies.model.sync_batch_norm import SyncNorms
from distplat.strategies.reduction.bucket_reducer import BucketReducer, register_gradient_hooks
from distplat.strategies.ring import RingOptions
from distplat.strategies.torch_compat import after_backward, not_compiled

logger = logging.getLogger(__name__)


class Exchange(ABC):
    """How a session trains its models over all ranks."""

    synchronous = True
    """Whether all ranks run the same steps."""

    @property
    @abstractmethod
    def models(self) -> list[nn.Module]:
        """The trained models, in the order of `prepare`."""

    @property
    def parameters(self) -> Iterator[Tensor]:
        """Parameters that are trained together, without parameters that a model got later."""
        return (p for model in self.models for p in model.parameters())

    @abstractmethod
    def add_model(
        self, model: nn.Module, *, is_only_model: bool, local_buffers: Set[nn.Module]
    ) -> None:
        """
        Start training a model, which is already on its device.

        Args:
            model: has parameters to train.
            is_only_model: whether it is prepared without other models.
            local_buffers: modules whose buffers stay local to each rank from the start.
        """

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Called with each prepared optimizer. By default each rank runs the updates itself."""
        return

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """
        Check an optimizer of prepared models before its first step.

        Raises:
            SpecError: Its updates would be lost.
        """
        return

    def before_step(self, optimizer: Optimizer) -> None:
        """
        Called before each step of an optimizer.

        Raises:
            NonFiniteError: The optimizer would apply non-finite gradients.
        """
        return

    @abstractmethod
    def enable(self, on: bool, model: nn.Module | None = None) -> None:
        """
        Enable or disable averaging in backward, see `no_sync`.

        Args:
            on: whether gradients are averaged.
            model: the model; None: all models.
        """

    def leave(self) -> None:
        """Called when this rank's function has returned."""
        return

    @abstractmethod
    def finalize(self) -> None:
        """
        Bring the models to their final state, after all ranks have left.

        Raises:
            ValueError: Ranks have trained different models.
        """

    def figures(self) -> dict[str, float]:
        """Return metrics to add to the next report."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Release the models."""


def compares_after(backwards: int) -> bool:
    """Return whether ranks compare their parameters: after 3, 30, 300, ... backwards."""
    while backwards >= 10 and backwards % 10 == 0:
        backwards //= 10
    return backwards == 3


@dataclass(frozen=True)
class SessionContext:
    """Settings that all models of a session share."""

    job: Job
    group: Collective
    """All ranks; each prepares the same models in the same order."""
    on_exchange: Callable[[], None]
    """Called after an exchange of gradients."""
    step: Callable[[], int]
    """Returns the number of completed steps, for messages."""
    batch: Callable[[], int] = lambda: 0
    """Returns the fingerprint of the last batch, see `StepControl.batch`."""

    def record(self, present: NDArray[np.bool_]) -> StepControl:
        """Return this rank's control record of a backward."""
        local = StepControl(1.0, 1.0, rank=self.group.rank, present=present)
        return local.of_batch(self.batch())


class GradientAverage(ABC):
    """
    Keeps one model's gradients, parameters and buffers equal on all ranks.

    Args:
        model: on its device; its parameters remain the same objects, in other memory.
        context: settings shared by all models.
        number: the model's index in the order of `prepare`.
        local_buffers: see `Exchange.add_model`.

    Raises:
        SpecError: The ranks have different models, or the model is not supported.
    """

    def __init__(
        self,
        model: nn.Module,
        context: SessionContext,
        number: int,
        local_buffers: Set[nn.Module],
    ) -> None:
        self.model, self.context, self._group = model, context, context.group
        self.enabled = True
        """Whether a backward averages gradients; see `no_sync`."""
        self.non_finite: NonFiniteError | None = None
        """
        The error to raise if an optimizer applies the current gradients; see `set_non_finite`.
        """
        self._first_non_finite: NonFiniteError | None = None
        self._backwards = self._steps = 0
        self.flat = flat = FlatModel(model, owned=True)
        check_same_model(model, flat.digest(), self._group, flat.params.device)
        flat.begin_step()
        self._move_vectors()
        self._buffer_dicts = [m._buffers for m in model.modules() if m not in local_buffers]
        frozen = [p.data for p in model.parameters() if not p.requires_grad and p.numel()]
        broadcast_from_rank0([*flat.typed(flat.params), *frozen, *self._buffers()], self._group)
        all_ranks = (sys.maxsize,) * self._group.world  # all ranks take part in each forward
        name = f"sync-batch-norm-{number}"
        self._norms = SyncNorms.of(model, self._group, lambda _: all_ranks, name)
        self._policy = NonFiniteSteps.of(context.job)
        #: registered before a reducer's hooks: the first gradient starts the reduction
        self._hooks = register_gradient_hooks(flat, self._on_gradient)
        for parameter in flat.parameters:
            parameter.grad = None

    def close(self) -> None:
        """Remove the hooks, and release the group's memory."""
        if self._norms is not None:
            self._norms.close()
        for hook in self._hooks:
            hook.remove()
        for parameter in self.flat.parameters:
            parameter.grad = None

    @abstractmethod
    def _start_exchange(self, index: int) -> None:
        """Called with each gradient's slot in a backward that averages."""

    def _move_vectors(self) -> None:
        """
        Move the vectors to the memory in which the ranks' gradients are summed, if it already
        exists.
        """
        return

    def _is_sent(self, index: int) -> bool:
        """Return whether a slot's gradient of this backward was already sent."""
        return False

    def _on_gradient(self, index: int, _: str) -> None:
        if self.enabled:
            self._start_exchange(index)

    def gather(self) -> StepControl:
        """
        Copy this rank's gradients to the vector, zeros for missing ones, and return its control
        record.
        """
        flat = self.flat
        if self._group.world > 1:
            self._refuse_graphs()
        present = np.fromiter((p.grad is not None for p in flat.parameters), np.bool_)
        for index in range(len(flat.slots)):
            if not flat.gradients.is_copied(index):  # a hook has replaced it
                if self._is_sent(index):
                    raise _changed_gradient_error(flat.name(index))
                flat.gradients.ready(index)
        flat.gradients.copied.clear()
        flat.check_layout(self.context.step())
        return self.context.record(present)

    def _refuse_graphs(self) -> None:
        """Reject gradients with a graph: their mean has none, so it cannot be differentiated."""
        for index, parameter in enumerate(self.flat.parameters):
            if parameter.grad is not None and parameter.grad.requires_grad:
                raise _graph_error(self.flat.name(index))

    @torch.no_grad()
    def write_means(self, indices: Iterable[int], scale: float, sums: Tensor) -> None:
        """
        Write the mean over the ranks to `.grad`, in tensors that a loop may keep.

        With a single rank, `.grad` is already the mean.

        Args:
            indices: slots for which some rank has a gradient.
            scale: factor of the sums.
            sums: sums over the ranks, with the layout of the model's vectors.
        """
        for index in indices if self._group.world > 1 else ():
            parameter, total = self.flat.parameters[index], self.flat.slots[index].view(sums)
            grad = parameter.grad
            if grad is None or grad.layout is not torch.strided:
                parameter.grad = grad = torch.empty_like(total)
            torch.mul(total, scale, out=grad)

    def finish(self) -> None:
        """Synchronize buffers and run periodic checks, after all means are written."""
        broadcast_from_rank0(self._buffers(), self._group)
        self._backwards += 1
        compares = compares_after(self._backwards)
        if compares or self._backwards == 1:
            self._refuse_later_norms()
        if self._backwards == 1 and self._group.world > 1 and self._group.rank == 0:
            self._warn_of_hooks()
        if compares:
            self.check_same_parameters(f"at backward {self._backwards}")
        self.context.on_exchange()

    def _refuse_later_norms(self) -> None:
        """Reject `nn.SyncBatchNorm` layers created after `prepare`: they share no statistics."""
        for name, layer in self.model.named_modules() if self._group.world > 1 else ():
            if isinstance(layer, nn.SyncBatchNorm) and not (self._norms and self._norms.has(layer)):
                text = (
                    f"{name!r} of the model became nn.SyncBatchNorm after prepare(), too late to "
                    "share statistics between ranks"
                )
                hint = "call convert_sync_batchnorm(model) before prepare(model)"
                raise SpecError(Problem(("task",), text, hint))

    def _warn_of_hooks(self) -> None:
        part = "each worker's part of the batch, before the mean over the workers is taken"
        if text := hooks_warning(self.model, part):
            logger.warning("%s. After backward() has returned, .grad is the mean", text)

    def before_step(self) -> None:
        """Called before an optimizer of this model steps without any averaging backward so far."""
        self._steps += 1
        if compares_after(self._steps):
            self.check_same_parameters(f"at step {self._steps}, and no backward() before it,")

    @property
    def averaged(self) -> bool:
        """Whether any backward has averaged gradients."""
        return self._backwards > 0

    def _buffers(self) -> list[Tensor]:
        """Return the current shared buffers; a forward may replace them by other tensors."""
        buffers = (buffer for items in self._buffer_dicts for buffer in items.values())
        return [buffer for buffer in buffers if buffer is not None and buffer.numel()]

    def set_non_finite(self, non_finite: NonFiniteError | None) -> None:
        """
        Set the error to raise if an optimizer applies the current gradients; None: they are finite.

        The error is not raised here, because a GradScaler skips such a step even with `non_finite:
        stop`.
        """
        self.non_finite = non_finite
        self._first_non_finite = self._first_non_finite or non_finite

    def check_finite(self) -> None:
        """
        Check the parameters after the last step.

        Raises:
            NonFiniteError: Non-finite gradients were applied.
        """
        flat = self.flat
        if self._first_non_finite is not None and not all(map(is_finite, flat.typed(flat.params))):
            raise self._first_non_finite

    def check_same_parameters(self, when: str) -> None:
        """See `loop_checks.check_same_parameters`."""
        check_same_parameters(self.model, self._group, when, max(self._backwards, self._steps))


class BucketAverage(GradientAverage):
    """
    Averages gradients with the buckets of `ring`.

    Args:
        model: see `GradientAverage`.
        number: see `GradientAverage`.
        is_only_model: whether it is prepared without other models. If so, and if it is the first
            one, buckets may be sent during backward. With several models the ranks could send
            buckets in different orders.
        local_buffers: see `GradientAverage`.
        context: see `GradientAverage`.
        options: of `ring`.
    """

    def __init__(
        self,
        model: nn.Module,
        number: int,
        is_only_model: bool,
        local_buffers: Set[nn.Module],
        context: SessionContext,
        options: RingOptions,
    ) -> None:
        super().__init__(model, context, number, local_buffers)
        self._is_scheduled = False
        self._reducer = BucketReducer(
            self.flat,
            self._group,
            int(options.bucket_mb * 2**20),
            overlap=is_only_model and not number and options.overlap,
            wire_dtype=options.wire_dtype,
            check_finite=self._policy.checks,
        )
        for parameter in self.flat.parameters:
            parameter.grad = None

    @override
    def close(self) -> None:
        self._reducer.close()
        super().close()

    @override
    def _move_vectors(self) -> None:
        self.flat.move(self.flat.params, self._group.share(self.flat.grads))

    @override
    def _start_exchange(self, index: int) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self.flat.gradients.copied.clear()
            after_backward(self._average)
            self._reducer.last_backward()

    @override
    def _is_sent(self, index: int) -> bool:
        return self._reducer.was_sent(index)

    @not_compiled
    def _average(self) -> None:
        """Called at the end of backward: sum the gradients of all ranks, then divide."""
        self._is_scheduled = False
        local = self.gather()
        present, scaled = local.present, (1.0 / self._group.world, self.flat.grads)

        def on_bucket(slots: range) -> None:  # while the sums are in the processor's cache
            self.write_means((index for index in slots if present[index]), *scaled)

        total = self._reducer.finish(local, on_bucket)
        total.check_batch(local, self.context.step())
        try:
            self._policy.decide(total, self.context.step(), self.flat.name)
            self.set_non_finite(None)
        except NonFiniteError as error:
            self.set_non_finite(error)
        self.write_means(np.flatnonzero(total.present & ~present).tolist(), *scaled)
        self.finish()


def _changed_gradient_error(name: str) -> SpecError:
    """Return the error for a gradient that changed after it was sent."""
    text = f"a hook changed the gradient of {name!r} in backward, after it was sent"
    hint = (
        "register the hook before prepare(), or set `overlap: false`; pass models that share the "
        "parameter to one call of prepare()"
    )
    return SpecError(Problem(("task",), text, hint))


def _graph_error(name: str) -> SpecError:
    """Return the error for a gradient whose graph would be lost."""
    text = (
        f"backward(create_graph=True) with several workers: the mean in {name!r}.grad has no "
        "graph, so a loss computed from it would not be trained"
    )
    hint = (
        "torch.autograd.grad(loss, parameters, create_graph=True) returns this worker's gradients "
        "with a graph; compute the penalty from them, and call backward() without create_graph"
    )
    return SpecError(Problem(("task",), text, hint))


def check_same_model(
    model: nn.Module, digest: str, group: Collective, device: torch.device
) -> None:
    """
    Check that all ranks have the same model; every rank calls this.

    Args:
        model: the argument of `prepare`.
        digest: fingerprint of its parameters.
        group: all ranks.
        device: of the model.

    Raises:
        SpecError: The message names the ranks whose model differs from rank 0's.
    """
    for name, buffer in model.named_buffers():
        if buffer.layout is not torch.strided:
            text = f"prepare() got a model with the buffer {name!r}, {buffer.layout}"
            hint = "rank 0's buffers are broadcast: keep indices and values in two dense buffers"
            raise SpecError(Problem(("task",), text, hint))
    buffers = repr([(n, b.shape, b.dtype) for n, b in model.named_buffers()])
    if ranks := mismatched_ranks([digest, buffers], group, device):
        names = ", ".join(map(str, ranks))
        what = f"prepare() got another model on rank {names} than on rank 0"
        hint = "names, shapes, types and requires_grad must be the same on all ranks"
        raise SpecError(Problem(("task",), what, hint))


@torch.no_grad()
def broadcast_from_rank0(tensors: Sequence[Tensor], group: Collective) -> None:
    """Broadcast rank 0's tensors in place, with one message per dtype; every rank calls this."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors if group.world > 1 else ():
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same_dtype in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same_dtype])
        group.broadcast(flat)
        if group.rank:
            parts = torch.split(flat, [tensor.numel() for tensor in same_dtype])
            for tensor, part in zip(same_dtype, parts, strict=True):
                fill(tensor, part.view(tensor.shape))
