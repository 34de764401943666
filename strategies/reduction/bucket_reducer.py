"""
All-reduce of the gradient vector in buckets, overlapped with backward.

    backward     layer 3 | layer 2 | layer 1 | layer 0 |
    group                [ bucket 0 ][ bucket 1 ]      [ bucket 2 ]
                                                       ^ finish(): sends the rest, waits for all

A bucket is a view of `flat.grads`, into which backward accumulates: nothing is packed.

All ranks start the same operations in the same order. In each step a rank sends every bucket once,
in the agreed order: a hook sends a bucket only if all buckets before it were sent (`Release`), and
`finish` sends the others in the same order. So the sequence does not depend on autograd, on the
parameters that a rank used, or on whether it had samples; only the timing differs between ranks.
The order changes once, by a broadcast between two steps, at the same position on every rank.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.platform.vector_layout import Piece
from distplat.strategies.algorithms.buckets import FIRST_BYTES, Bucket, Release, cut_buckets
from distplat.strategies.algorithms.reduce import traffic_elements
from distplat.strategies.collective import Collective, Handle
from distplat.strategies.loop.control import StepControl
from distplat.strategies.loop.gathering import idle_ranks_wait
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.parameter_layout import (
    dtype_name,
    first_non_finite,
    is_finite,
    typed,
)
from distplat.strategies.reduction.base import (
    ControlSum,
    Meter,
    OverlapMeter,
    Reducer,
    mixed_dtypes_error,
    time_all_reduce,
)
from distplat.strategies.torch_compat import not_compiled


def register_gradient_hooks(
    flat: FlatModel, on_gradient: Callable[[int, str], None]
) -> list[RemovableHandle]:
    """
    Call `on_gradient` with index and name of a parameter after its gradient is accumulated.

    Returns:
        Handles to remove the hooks.
    """

    def hook(index: int, name: str) -> Callable[[Tensor], None]:
        return not_compiled(lambda _: on_gradient(index, name))

    return [
        flat.parameters[index].register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            hook(index, slot.name)
        )
        for index, slot in enumerate(flat.trained_slots)
    ]


def gradient_changed_error(name: str) -> SpecError:
    """Return the error for a gradient that changed after it was sent."""
    text = f"the gradient of {name!r} changed after it was sent: nested backward"
    hint = "set `overlap: false`, or use checkpointing with use_reentrant=False"
    return SpecError(Problem(("strategy", "overlap"), text, hint))


MEASURE_EVERY = 16
"""Steps between measurements of the rounding error, each a pass over the gradients."""


class Wire:
    """
    A copy of the gradient vector in a smaller dtype, which the group reduces.

    Gradients are not scaled. In float16 values above 65504 become infinite, values below 6e-5 lose
    precision, and values below 3e-8 become zero; bfloat16 has the range of float32 with eight bits
    of precision. Each rank's gradient is weighted by its share of the batch, so the sum is no
    larger than a gradient of the whole batch.

    Args:
        gradients: shape [n]; set to zero: an all-reduce of them is timed here, as a baseline.
        dtype: dtype to send, `float16` or `bfloat16`.
        collective: the group; construction is a collective operation.

    Raises:
        SpecError: the gradients' dtype is not larger.
    """

    def __init__(self, gradients: Tensor, dtype: str, collective: Collective) -> None:
        wire_dtype: torch.dtype = getattr(torch, dtype)
        if wire_dtype.itemsize >= gradients.itemsize:
            text = f"{dtype} is no smaller than the gradients, which are {dtype_name(gradients)}"
            raise SpecError(Problem(("strategy", "compression"), text, "remove it"))
        self._gradients = gradients
        self._vector = collective.share(torch.empty_like(gradients, dtype=wire_dtype))
        sent, _ = traffic_elements(gradients.numel(), collective.rank, collective.world)
        self._saved_bytes = float(sent * (gradients.itemsize - wire_dtype.itemsize))
        self._baseline_s = time_all_reduce(gradients, collective)
        self._steps = -1
        self.seconds = 0.0  #: spent on casting in this step
        self.overflows = (
            wire_dtype is torch.float16
        )  #: whether a finite gradient may become infinite

    def begin(self) -> None:
        """Start a step."""
        self.seconds = 0.0
        self._error = self._whole = 0.0
        self._steps += 1
        self._measures = self._steps % MEASURE_EVERY == 0

    def pack(self, start: int, stop: int) -> Tensor:
        """Return a part of the gradients in the sent dtype; the group reduces it in place."""
        began = time.perf_counter()
        grads, packed = self._gradients[start:stop], self._vector[start:stop]
        packed.copy_(grads)
        self.seconds += time.perf_counter() - began
        if self._measures:
            self._error += float(torch.linalg.vector_norm(packed.to(grads.dtype) - grads)) ** 2
            self._whole += float(torch.linalg.vector_norm(grads)) ** 2
        return packed

    def unpack(self, start: int, stop: int) -> None:
        """Copy a reduced part back into the gradients."""
        began = time.perf_counter()
        self._gradients[start:stop].copy_(self._vector[start:stop])
        self.seconds += time.perf_counter() - began

    def figures(self, working_s: float) -> dict[str, float]:
        """
        Return the figures of this step, with the error if it was measured in this step.

        Args:
            working_s: time of the step's operations without waiting.
        """
        figures = {
            "saved_bytes": self._saved_bytes,
            "compress_s": self.seconds,
            "baseline_s": self._baseline_s,
            "saved_s": self._baseline_s - (working_s + self.seconds),
        }
        if self._measures:
            figures["error_norm"] = (self._error / self._whole) ** 0.5 if self._whole else 0.0
        return figures


class BucketReducer(Reducer):
    """
    Sums `flat.grads` over a group in buckets (see `Reducer`).

    The first step sends nothing during backward: rank 0 records the order in which buckets become
    complete, and all ranks adopt it. Gradients of parameters that no backward uses are zeros.

    Args:
        flat: the model, on its final vectors.
        collective: the group; with one rank nothing is sent.
        bucket_bytes: approximate size of a bucket; the first bucket is smaller.
        overlap: send buckets during backward.
        wire_dtype: `float16`, `bfloat16`, or None: gradients are sent in their own dtype.
        check_finite: check each bucket for NaN and infinity before it is sent.

    Raises:
        SpecError: `wire_dtype` is not smaller than the gradients' dtype, or gradients have several.
    """

    def __init__(
        self,
        flat: FlatModel,
        collective: Collective,
        bucket_bytes: int,
        *,
        overlap: bool = True,
        wire_dtype: str | None = None,
        check_finite: bool = True,
    ) -> None:
        self._flat, self._grads, self._collective = flat, flat.grads, collective
        self._alone = collective.world == 1
        if wire_dtype is not None and flat.mixed:
            raise mixed_dtypes_error(flat.layout)
        self._check_finite = check_finite
        self._non_finite: int | None = None  #: first slot with a gradient that is not finite
        self.local = StepControl()
        """This rank's control record of the last step, after the check of its gradients."""
        self._control = ControlSum(collective, len(flat.slots), flat.grads.device)
        self._buckets = [*cut_segments(flat, bucket_bytes)]
        self._dtypes = [
            flat.layout.runs(bucket.start, bucket.stop)[0].dtype for bucket in self._buckets
        ]
        self._layouts = [flat.layout.cut(bucket.start, bucket.stop) for bucket in self._buckets]
        self._release = Release([bucket.parameters for bucket in self._buckets])
        self._handles: dict[int, Handle] = {}
        self._wire: Wire | None = None
        if wire_dtype is not None and not self._alone:
            self._wire = Wire(flat.grads[: flat.layout.tail], wire_dtype, collective)
        self._meter, self._overlap = Meter(collective), OverlapMeter(collective)
        self._started = self._sending = False
        self._agreed = not overlap
        self._hooks = (
            register_gradient_hooks(flat, self._on_gradient) if overlap and not self._alone else []
        )
        flat.copy_when_ready(bool(self._hooks), check_finite=check_finite)

    @override
    def last_backward(self) -> None:
        """Called once for each part of the model that has a last backward of its own."""
        if not self._alone:
            if not self._started:
                self._start_step()
            # NCCL needs operations of several communicators in the same order on all ranks, and
            # ranks without samples reach the buckets only after the last `all_gather`.
            self._sending = not idle_ranks_wait()

    def was_sent(self, index: int) -> bool:
        """Return whether a slot's gradient was already sent during the current backward."""
        return self._started and self._release.was_sent(index)

    def pause(self) -> None:
        """Stop sending until the next `last_backward`: another backward follows."""
        self._sending = False

    @override
    def finish(
        self, local: StepControl, on_bucket: Callable[[range], None] = lambda parameters: None
    ) -> StepControl:
        """
        The control record is sent after the last bucket.

        Args:
            local: see `Reducer`.
            on_bucket: called with the slots of each bucket once it is reduced.
        """
        if self._alone:
            self.local = local.looked_at(self._flat) if self._check_finite else local
            return self.local
        if not self._started:
            self._start_step()
        self._started = self._sending = False
        cast_before = self._wire.seconds if self._wire else 0.0
        self._overlap.finish()
        self._flat.zero_missing()
        for number in self._release.rest():
            self._send(number)
        non_finite, self._non_finite = self._non_finite, None
        self.local = local if non_finite is None else local.broken(non_finite)
        self._control.start(self.local)
        for number in self._release.order:
            self._handles.pop(number).wait()
            if self._wire is not None:
                self._wire.unpack(self._buckets[number].start, self._buckets[number].stop)
            on_bucket(self._buckets[number].parameters)
        total = self._control.wait()
        self._overlap.end(self._wire.seconds - cast_before if self._wire else 0.0)
        if not self._agreed:
            self._agree_on_order()
        overflows = self._grads.dtype is torch.float16
        if self._wire is not None:
            overflows = self._wire.overflows
        return total.overflowed(self._flat) if self._check_finite and overflows else total

    @override
    def figures(self) -> dict[str, float]:
        figures = {**self._meter.lap(), **self._overlap.figures()}
        if self._wire is not None:
            figures |= self._wire.figures(figures["working_s"])
        return figures

    @override
    def close(self) -> None:
        """
        Remove the hooks from the model.

        Does not wait: a reducer is closed within a step only if its group was aborted, and then
        operations end by themselves.
        """
        self._sending = False
        self._flat.copy_when_ready(False)
        for hook in self._hooks:
            hook.remove()
        self._handles.clear()

    def _start_step(self) -> None:
        self._meter.begin()
        self._started = True
        # No hook may wait for other ranks: a rank whose backward does not reach a bucket's
        # parameters sends the bucket in `finish`, and may before need this rank's backward.
        self._release.begin(early=not self._collective.start_waits)
        self._overlap.begin()
        if self._wire is not None:
            self._wire.begin()

    def _on_gradient(self, parameter: int, name: str) -> None:
        """Send the buckets that one more gradient completes; called by autograd."""
        if self._sending and self._release.was_sent(parameter):
            raise gradient_changed_error(name)
        self._flat.gradients.ready(parameter)
        if not self._sending:
            return
        for number in self._release.gradient(parameter):
            self._send(number)

    def _send(self, number: int) -> None:
        if self._check_finite:
            self._check_bucket(number)
        bucket = self._buckets[number]
        if self._wire is None:
            gradients = typed(self._grads, bucket.start, bucket.stop, self._dtypes[number])
        else:
            gradients = self._wire.pack(bucket.start, bucket.stop)
        self._overlap.start()
        self._handles[number] = self._collective.start_all_reduce(gradients)

    def _check_bucket(self, number: int) -> None:
        """
        Check a bucket for NaN and infinity while it still holds only this rank's gradients.

        One pass over the bucket, or only over parameters that were not checked in their hooks. The
        view is freed with this function: torch releases the GIL to free it, and once the operation
        runs in its thread, that costs backward a third of a millisecond per bucket.
        """
        bucket, layout = self._buckets[number], self._layouts[number]
        run = self._grads[bucket.start : bucket.stop]
        if any(map(self._flat.gradients.finite, bucket.parameters)):
            slot = self._first_non_finite(run, layout.pieces, self._dtypes[number])
        else:
            slot = first_non_finite(run, layout.segments, layout.pieces)
        if slot is not None:
            self._non_finite = slot if self._non_finite is None else min(slot, self._non_finite)

    def _first_non_finite(self, run: Tensor, pieces: Sequence[Piece], dtype: str) -> int | None:
        """Return the first slot that is not finite, of those not checked in their hooks."""
        for piece in pieces:
            if not self._flat.gradients.finite(piece.slot):
                if not is_finite(typed(run, piece.start, piece.stop, dtype)):
                    return piece.slot
        return None

    def _agree_on_order(self) -> None:
        """Adopt rank 0's order of buckets; if it had no samples, try after the next step."""
        proposal = self._release.proposal()
        order, held = proposal or ([-1] * len(self._buckets), [False] * len(self._buckets))
        plan = torch.tensor([order, [int(h) for h in held]], device=self._grads.device)
        self._collective.broadcast(plan)
        order, held = plan[0].tolist(), plan[1].bool().tolist()
        if order[0] >= 0:
            self._release.agree(order, held)
            self._agreed = True


def cut_segments(flat: FlatModel, bucket_bytes: int) -> Iterator[Bucket]:
    """Yield the buckets of each segment, the last first: backward computes its gradients first."""
    itemsize = flat.grads.itemsize
    limit = first = bucket_bytes // itemsize
    first = min(first, FIRST_BYTES // itemsize)
    for segment in reversed(flat.layout.segments):
        if segment.start >= flat.layout.tail:
            continue
        slots = [
            (index, slot.offset - segment.start)
            for index, slot in enumerate(flat.slots)
            if segment.start <= slot.offset < segment.stop
        ]
        first_slot = slots[0][0]
        size = segment.stop - segment.start
        for bucket in cut_buckets([offset for _, offset in slots], size, limit, first):
            parameters = range(
                bucket.parameters.start + first_slot, bucket.parameters.stop + first_slot
            )
            yield replace(
                bucket,
                start=bucket.start + segment.start,
                stop=bucket.stop + segment.start,
                parameters=parameters,
            )
        first = limit
