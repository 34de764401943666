"""
Averages a model's gradients over the ranks in each backward, as DistributedDataParallel does.

    backward     layer 2 | layer 1 | layer 0 | average      | returns
    group             [ bucket 0 ][ bucket 1 ]              |
                                             ^ queued at the first gradient of this backward

So what stands in `.grad` when `backward()` has returned is the mean over the ranks, and whatever
the loop does with it afterwards is as in one process: clipping, a scaler, any optimizer of torch.

A parameter has a gradient if `.grad` is not None, as torch has it. One that some rank has and
another has not counts there as zero; one that no rank has stays None, and its optimizer leaves it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.platform.spec import Job
from distplat.strategies.collective import Collective, gather_bytes
from distplat.strategies.function.oversight import check_alike
from distplat.strategies.loop.control import NonFiniteSteps, StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.sync_batch_norm import SyncNorms
from distplat.strategies.reduction.bucket_reducer import BucketReducer
from distplat.strategies.ring import RingOptions
from distplat.strategies.torch_compat import after_backward

_COMPARED = (3, 30)
"""Backwards after which ranks compare their parameters; so they do at the end."""


class GradientAverage:
    """
    Keeps one model's gradients, parameters and buffers alike on all ranks.

    Args:
        model: on its device; its parameters stay the same objects, in other memory.
        group: all ranks; each makes this in the same order.
        job: the run.
        options: of `ring`.
        overlap: whether buckets may leave while backward goes on: not with several models, whose
            buckets would come in another order on each rank.
        done: called when gradients were averaged.
        step: gives the steps done, for messages.
        number: of the model, in the order of `prepare`.

    Raises:
        SpecError: the ranks have different models, or one that cannot be trained so.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Collective,
        job: Job,
        options: RingOptions,
        *,
        overlap: bool,
        done: Callable[[], None],
        step: Callable[[], int],
        number: int = 0,
    ) -> None:
        self.model, self._group, self._done, self._step = model, group, done, step
        self.enabled = True
        """Whether a backward averages; see `no_sync`."""
        self._under_way = False
        self._backwards = 0
        self.flat = flat = FlatModel(model)
        self._compare()
        flat.begin_step()
        flat.move(flat.params, group.share(flat.grads))
        self._buffers = [one for one in model.buffers() if one.numel()]
        frozen = [one.data for one in model.parameters() if not one.requires_grad and one.numel()]
        take_over([*flat.typed(flat.params), *frozen, *self._buffers], group)
        every = (sys.maxsize,) * group.world  # forwards of a loop are those of all ranks
        self._norms = SyncNorms.of(model, group, lambda _: every, f"sync-batch-norm-{number}")
        self._policy = NonFiniteSteps.of(job)
        self._hooks = [
            one.register_post_accumulate_grad_hook(self._began)  # type: ignore[no-untyped-call]
            for one in flat.parameters
        ]  # before those of the reducer: the first gradient begins the reduction
        wire = {"none": None, "fp16": "float16", "bf16": "bfloat16"}[options.compression]
        self._reducer = BucketReducer(
            flat,
            group,
            int(options.bucket_mb * 2**20),
            overlap=overlap and options.overlap,
            wire_dtype=wire,
            look=self._policy.looks,
        )
        for one in flat.parameters:
            one.grad = None

    def close(self) -> None:
        """Take the hooks off, and let go of the group's memory."""
        self._reducer.close()
        if self._norms is not None:
            self._norms.close()
        for hook in self._hooks:
            hook.remove()
        for one in self.flat.parameters:
            one.grad = None

    def _compare(self) -> None:
        """
        See whether all ranks have this model.

        Raises:
            SpecError: names the ranks that differ from rank 0.
        """
        mine = self.flat.digest()
        buffers = repr([(n, b.shape, b.dtype) for n, b in self.model.named_buffers()])
        text = json.dumps([mine, hashlib.sha256(buffers.encode()).hexdigest()]).encode()
        every = gather_bytes(text, self._group, self.flat.params.device)
        if others := [str(rank) for rank, one in enumerate(every) if one != every[0]]:
            what = f"prepare() got another model on rank {', '.join(others)} than on rank 0"
            hint = "names, shapes, types and requires_grad must be the same on all ranks"
            raise SpecError(Problem(("task",), what, hint))

    def _began(self, _: Tensor) -> None:
        """Be told of a gradient; the first one of a backward begins the reduction."""
        if self.enabled and not self._under_way:
            self._under_way = True
            after_backward(self._average)
            self._reducer.last_backward()

    def _average(self) -> None:
        """Be told that backward is over: gradients of all ranks are summed, then divided."""
        self._under_way = False
        flat, world = self.flat, self._group.world
        step = self._step()
        present = np.fromiter((one.grad is not None for one in flat.parameters), np.bool_)
        for place, has in enumerate(present.tolist()):
            if has:
                flat.ready(place)
            else:
                flat.slots[place].view(flat.grads).zero_()
        flat.check_layout(step)
        total = self._reducer.finish(StepControl(1.0, 1.0, rank=self._group.rank, present=present))
        self._policy.decide(total, step, flat.name)
        flat.scale_gradients(1.0 / world)
        for place in np.flatnonzero(total.present & ~present).tolist():
            flat.parameters[place].grad = flat.gradient(place)
        take_over(self._buffers, self._group)
        self._backwards += 1
        if self._backwards in _COMPARED:
            self.check_alike(f"at backward {self._backwards}")
        self._done()

    def check_alike(self, when: str) -> None:
        """See `oversight.check_alike`."""
        check_alike(self.model, self._group, when)


@torch.no_grad()
def take_over(tensors: Sequence[Tensor], group: Collective) -> None:
    """Have what rank 0 has, in place, by a message for each type; every rank calls this."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for one in tensors if group.world > 1 else ():
        by_type.setdefault(one.dtype, []).append(one)
    for some in by_type.values():
        whole = torch.cat([one.reshape(-1) for one in some])
        group.broadcast(whole)
        if group.rank:
            parts = torch.split(whole, [one.numel() for one in some])
            for one, part in zip(some, parts, strict=True):
                one.copy_(part.view(one.shape))
