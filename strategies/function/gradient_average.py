"""
Averages a model's gradients over the ranks in each backward, as DistributedDataParallel does.

    backward     layer 2 | layer 1 | layer 0 | average      | returns
    group             [ bucket 0 ][ bucket 1 ]              |
                                             ^ queued at the first gradient of this backward

So what stands in `.grad` when `backward()` has returned is the mean over the ranks, and whatever
the loop does with it afterwards is as in one process: clipping, a scaler, any optimizer of torch.

How a strategy trains the models of a session is its `Exchange`.

A parameter has a gradient if `.grad` is not None, as torch has it. One that some rank has and
another has not counts there as zero; one that no rank has stays None, and its optimizer leaves it.
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
from distplat.strategies.function.loop_checks import check_alike
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
    """How the models of a session are trained over all ranks."""

    together = True
    """Whether all ranks make the same steps."""

    @property
    @abstractmethod
    def models(self) -> list[nn.Module]:
        """Those that are trained, in the order of `prepare`."""

    @property
    def parameters(self) -> Iterator[Tensor]:
        """Those of the models that are trained together: of none that came to a model later."""
        return (one for model in self.models for one in model.parameters())

    @abstractmethod
    def add(self, model: nn.Module, *, alone: bool, own_buffers: Set[nn.Module]) -> None:
        """
        Train a model; it is on its device.

        Args:
            model: has parameters to train.
            alone: whether no other one comes with it.
            own_buffers: the modules in it whose buffers stay each rank's own, from the start.
        """

    def take(self, optimizer: Optimizer) -> None:
        """Called with each optimizer that is prepared; its updates are those of each rank."""
        return

    def check(self, optimizer: Optimizer) -> None:
        """
        Look at an optimizer of prepared models that is about to step for the first time.

        Raises:
            SpecError: its updates would be lost.
        """
        return

    def before_step(self, optimizer: Optimizer) -> None:
        """
        Called when an optimizer is about to step.

        Raises:
            NonFiniteError: it would apply gradients that are not finite.
        """
        return

    @abstractmethod
    def enable(self, on: bool, model: nn.Module | None = None) -> None:
        """
        Say whether a backward averages, see `no_sync`.

        Args:
            on: whether it does.
            model: whose gradients; None: all models'.
        """

    def leave(self) -> None:
        """Called when this rank's function has returned."""
        return

    @abstractmethod
    def settle(self) -> None:
        """
        Have the models be what was trained; every rank has left.

        Raises:
            ValueError: ranks have trained other models.
        """

    def figures(self) -> dict[str, float]:
        """Give figures for the next report."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Let go of the models."""


_COMPARED = (3, 30, 300)
"""Backwards after which ranks compare their parameters; so they do at the end."""


@dataclass(frozen=True)
class SessionContext:
    """What is the same for all models of a session."""

    job: Job
    """The run."""
    group: Collective
    """All ranks; each makes the same models in the same order."""
    done: Callable[[], None]
    """Called when gradients were exchanged."""
    step: Callable[[], int]
    """Gives the steps done, for messages."""
    batch: Callable[[], int] = lambda: 0
    """Gives the fingerprint of what was read last, see `StepControl.batch`."""

    def record(self, present: NDArray[np.bool_]) -> StepControl:
        """Give the control record of a backward of this rank."""
        local = StepControl(1.0, 1.0, rank=self.group.rank, present=present)
        return local.of_batch(self.batch())


class GradientAverage(ABC):
    """
    Keeps one model's gradients, parameters and buffers alike on all ranks.

    Args:
        model: on its device; its parameters stay the same objects, in other memory.
        context: the run, as far as it is the same for all models.
        number: of the model, in the order of `prepare`.
        own_buffers: see `Exchange.add`.

    Raises:
        SpecError: the ranks have different models, or one that cannot be trained so.
    """

    def __init__(
        self,
        model: nn.Module,
        context: SessionContext,
        number: int,
        own_buffers: Set[nn.Module],
    ) -> None:
        self.model, self.context, self._group = model, context, context.group
        self.enabled = True
        """Whether a backward averages; see `no_sync`."""
        self.broken: NonFiniteError | None = None
        """Why no optimizer may apply the gradients as they are; see `note`."""
        self._first_broken: NonFiniteError | None = None
        self._backwards = self._steps = 0
        self.flat = flat = FlatModel(model, owned=True)
        check_same_model(model, flat.digest(), self._group, flat.params.device)
        flat.begin_step()
        self._move_vectors()
        self._holders = [one._buffers for one in model.modules() if one not in own_buffers]
        frozen = [one.data for one in model.parameters() if not one.requires_grad and one.numel()]
        broadcast_from_rank0([*flat.typed(flat.params), *frozen, *self._buffers()], self._group)
        every = (sys.maxsize,) * self._group.world  # forwards of a loop are those of all ranks
        name = f"sync-batch-norm-{number}"
        self._norms = SyncNorms.of(model, self._group, lambda _: every, name)
        self._policy = NonFiniteSteps.of(context.job)
        #: before those of a reducer: the first gradient begins the reduction
        self._hooks = register_gradient_hooks(flat, self._came)
        for one in flat.parameters:
            one.grad = None

    def close(self) -> None:
        """Take the hooks off, and let go of the group's memory."""
        if self._norms is not None:
            self._norms.close()
        for hook in self._hooks:
            hook.remove()
        for one in self.flat.parameters:
            one.grad = None

    @abstractmethod
    def _begin(self, index: int) -> None:
        """Called with a slot's gradient in a backward that averages."""

    def _move_vectors(self) -> None:
        """Move the vectors to where the ranks' gradients are summed, if that is known already."""
        return

    def _has_left(self, index: int) -> bool:
        """Say whether a slot's gradient of this backward was sent already."""
        return False

    def _came(self, index: int, _: str) -> None:
        if self.enabled:
            self._begin(index)

    def gather(self) -> StepControl:
        """Copy this rank's gradients to the vector, zeros for missing ones; say which are there."""
        flat = self.flat
        if self._group.world > 1:
            self._refuse_graphs()
        present = np.fromiter((one.grad is not None for one in flat.parameters), np.bool_)
        for index in range(len(flat.slots)):
            if not flat.gradients.is_copied(index):  # by a hook
                if self._has_left(index):
                    raise _changed(flat.name(index))
                flat.gradients.ready(index)
        flat.gradients.copied.clear()
        flat.check_layout(self.context.step())
        return self.context.record(present)

    def _refuse_graphs(self) -> None:
        """See that nobody means to differentiate the gradients: their mean has no graph."""
        for index, one in enumerate(self.flat.parameters):
            if one.grad is not None and one.grad.requires_grad:
                raise _with_graph(self.flat.name(index))

    @torch.no_grad()
    def hand_out(self, indices: Iterable[int], scale: float, sums: Tensor) -> None:
        """
        Have the mean over the ranks in `.grad`: in tensors that a loop may keep.

        One rank's own are the mean already.

        Args:
            indices: slots of which some rank had a gradient.
            scale: by which the sums are multiplied.
            sums: over the ranks, laid out as the model's vectors.
        """
        for index in indices if self._group.world > 1 else ():
            one, total = self.flat.parameters[index], self.flat.slots[index].view(sums)
            grad = one.grad
            if grad is None or grad.layout is not torch.strided:
                one.grad = grad = torch.empty_like(total)
            torch.mul(total, scale, out=grad)

    def finish(self) -> None:
        """Called when all gradients are handed out; the buffers follow."""
        broadcast_from_rank0(self._buffers(), self._group)
        self._backwards += 1
        if self._backwards in (1, *_COMPARED):
            self._refuse_later_norms()
        if self._backwards == 1 and self._group.world > 1 and self._group.rank == 0:
            self._warn_of_hooks()
        if self._backwards in _COMPARED:
            self.check_alike(f"at backward {self._backwards}")
        self.context.done()

    def _refuse_later_norms(self) -> None:
        """See that no `nn.SyncBatchNorm` came later: it would be a plain batch norm, by rank."""
        for name, layer in self.model.named_modules() if self._group.world > 1 else ():
            if isinstance(layer, nn.SyncBatchNorm) and not (self._norms and self._norms.has(layer)):
                text = (
                    f"{name!r} of the model became nn.SyncBatchNorm after prepare(), too late for"
                )
                hint = "call convert_sync_batchnorm(model) before prepare(model)"
                raise SpecError(Problem(("task",), f"{text} its ranks to share statistics", hint))

    def _warn_of_hooks(self) -> None:
        part = "each worker's part of the batch, before the mean over the workers is taken"
        if text := hooks_warning(self.model, part):
            logger.warning("%s. When backward() has returned, .grad is the mean", text)

    def before_step(self) -> None:
        """Called when an optimizer of this model steps before any backward has averaged."""
        self._steps += 1
        if self._steps in _COMPARED:
            self.check_alike(f"at step {self._steps}, and no backward() before it,")

    @property
    def averaged(self) -> bool:
        """Whether there was a backward that averaged."""
        return self._backwards > 0

    def _buffers(self) -> list[Tensor]:
        """Give the ranks' common buffers as of now: a forward may put others in their place."""
        every = (one for held in self._holders for one in held.values())
        return [one for one in every if one is not None and one.numel()]

    def note(self, broken: NonFiniteError | None) -> None:
        """
        Take what came of a look at the gradients; the run ends where an optimizer would apply them.

        A GradScaler has none do so: a loop may have one in spite of `non_finite: stop`.
        """
        self.broken = broken
        self._first_broken = self._first_broken or broken

    def check_finite(self) -> None:
        """
        See that nobody has applied such gradients all the same; after the last step.

        Raises:
            NonFiniteError: somebody has.
        """
        flat = self.flat
        if self._first_broken is not None and not all(map(is_finite, flat.typed(flat.params))):
            raise self._first_broken

    def check_alike(self, when: str) -> None:
        """See `loop_checks.check_alike`."""
        check_alike(self.model, self._group, when, max(self._backwards, self._steps))


class BucketAverage(GradientAverage):
    """
    By the buckets of `ring`.

    Args:
        model: see `GradientAverage`.
        number: see there.
        alone: whether no other model comes with it. Of the first one that does buckets may leave
            while backward goes on; those of several would come in another order on each rank.
        own_buffers: see `GradientAverage`.
        context: see there.
        options: of `ring`.
    """

    def __init__(
        self,
        model: nn.Module,
        number: int,
        alone: bool,
        own_buffers: Set[nn.Module],
        context: SessionContext,
        options: RingOptions,
    ) -> None:
        super().__init__(model, context, number, own_buffers)
        self._under_way = False
        self._reducer = BucketReducer(
            self.flat,
            self._group,
            int(options.bucket_mb * 2**20),
            overlap=alone and not number and options.overlap,
            wire_dtype=options.wire_dtype,
            check_finite=self._policy.looks,
        )
        for one in self.flat.parameters:
            one.grad = None

    @override
    def close(self) -> None:
        self._reducer.close()
        super().close()

    @override
    def _move_vectors(self) -> None:
        self.flat.move(self.flat.params, self._group.share(self.flat.grads))

    @override
    def _begin(self, index: int) -> None:
        if not self._under_way:
            self._under_way = True
            self.flat.gradients.copied.clear()
            after_backward(self._average)
            self._reducer.last_backward()

    @override
    def _has_left(self, index: int) -> bool:
        return self._reducer.was_sent(index)

    @not_compiled
    def _average(self) -> None:
        """Called after backward: gradients of all ranks are summed, then divided."""
        self._under_way = False
        local = self.gather()
        present, given = local.present, (1.0 / self._group.world, self.flat.grads)

        def on_bucket(slots: range) -> None:  # it is in the processor's cache
            self.hand_out((index for index in slots if present[index]), *given)

        total = self._reducer.finish(local, on_bucket)
        total.check_batch(local, self.context.step())
        try:
            self._policy.decide(total, self.context.step(), self.flat.name)
            self.note(None)
        except NonFiniteError as error:
            self.note(error)
        self.hand_out(np.flatnonzero(total.present & ~present).tolist(), *given)
        self.finish()


def _changed(name: str) -> SpecError:
    """Say that a gradient is another one than was sent."""
    text = f"a hook changed the gradient of {name!r} in backward, after it was sent"
    hint = (
        "register the hook before prepare(), or set `overlap: false`; models that share the "
        "parameter go into one call of prepare()"
    )
    return SpecError(Problem(("task",), text, hint))


def _with_graph(name: str) -> SpecError:
    """Say that a gradient of a gradient would be lost."""
    text = f"backward(create_graph=True) with several workers: the mean in {name!r}.grad has no"
    hint = (
        "torch.autograd.grad(loss, parameters, create_graph=True) gives this worker's gradients "
        "with one; make a penalty of them, and call backward() without create_graph"
    )
    return SpecError(
        Problem(("task",), f"{text} graph, so what is made of it is not trained", hint)
    )


def check_same_model(
    model: nn.Module, digest: str, group: Collective, device: torch.device
) -> None:
    """
    See whether all ranks have this model; every rank calls this.

    Args:
        model: as it was handed to `prepare`.
        digest: of its parameters.
        group: all ranks.
        device: of the model.

    Raises:
        SpecError: names the ranks that differ from rank 0.
    """
    for name, buffer in model.named_buffers():
        if buffer.layout is not torch.strided:
            text = f"prepare() got a model with the buffer {name!r}, {buffer.layout}"
            hint = (
                "ranks take over rank 0's buffers: keep its indices and its values in two of them"
            )
            raise SpecError(Problem(("task",), text, hint))
    buffers = repr([(n, b.shape, b.dtype) for n, b in model.named_buffers()])
    if others := mismatched_ranks([digest, buffers], group, device):
        names = ", ".join(map(str, others))
        what = f"prepare() got another model on rank {names} than on rank 0"
        hint = "names, shapes, types and requires_grad must be the same on all ranks"
        raise SpecError(Problem(("task",), what, hint))


@torch.no_grad()
def broadcast_from_rank0(tensors: Sequence[Tensor], group: Collective) -> None:
    """Broadcast rank 0's tensors, in place, by a message for each type; every rank calls this."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for one in tensors if group.world > 1 else ():
        by_type.setdefault(one.dtype, []).append(one)
    for some in by_type.values():
        whole = torch.cat([one.reshape(-1) for one in some])
        group.broadcast(whole)
        if group.rank:
            parts = torch.split(whole, [one.numel() for one in some])
            for one, part in zip(some, parts, strict=True):
                fill(one, part.view(one.shape))
