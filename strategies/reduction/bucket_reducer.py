"""
Sum the gradient vector bucket by bucket, each as soon as backward has finished it.

    backward     layer 3 | layer 2 | layer 1 | layer 0 |
    group                [ bucket 0 ][ bucket 1 ]      [ bucket 2 ]
                                                       ^ finish(): starts the rest, waits for all

A bucket is a view of `flat.grads`, into which backward adds: nothing is packed.

Why ranks cannot meet in different operations. In each step a rank starts every bucket once, in the
agreed order: a bucket leaves in a hook only if all before it have left (`Release`), and `finish`
starts the others in the same order, then waits for all. So the sequence of operations of a step is
the order itself. It does not depend on autograd, on which parameters a rank used or whether it had
samples; only the moments differ between ranks. The order changes once, by a broadcast between two
steps, at the same position of every rank's sequence.
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
    Call `on_gradient` with index and name of each parameter whose gradient a backward has finished.

    Returns:
        Hooks, to be removed when nobody listens any more.
    """

    def hook(index: int, name: str) -> Callable[[Tensor], None]:
        return not_compiled(lambda _: on_gradient(index, name))

    return [
        flat.parameters[index].register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            hook(index, slot.name)
        )
        for index, slot in enumerate(flat.trained_slots)
    ]


def came_again(name: str) -> SpecError:
    """Say that a gradient changed after it was sent."""
    text = f"the gradient of {name!r} came again after it was sent: backward within backward"
    hint = "set `overlap: false`, or use checkpointing with use_reentrant=False"
    return SpecError(Problem(("strategy", "overlap"), text, hint))


MEASURE_EVERY = 16
"""Steps from one measured rounding error to the next: it costs a pass over the gradients."""


class Wire:
    """
    A copy of the gradient vector in a smaller type, which is what the group reduces.

    Nothing is scaled. What float16 cannot hold becomes infinite (above 65504) or loses digits
    (below 6e-5) or all of itself (below 3e-8), as in any use of float16; bfloat16 has the range of
    float32, and eight bits. The ranks' terms are weighted by their share of the batch, so their sum
    is no larger than a gradient of the whole batch.

    Args:
        gradients: shape [n]; set to zero: an all-reduce of them is timed here, as a baseline.
        dtype: name of the type that travels, `float16` or `bfloat16`.
        collective: the group; every rank makes its wire.

    Raises:
        SpecError: the gradients are as small already.
    """

    def __init__(self, gradients: Tensor, dtype: str, collective: Collective) -> None:
        kind: torch.dtype = getattr(torch, dtype)
        if kind.itemsize >= gradients.itemsize:
            text = f"{dtype} is no smaller than the gradients, which are {dtype_name(gradients)}"
            raise SpecError(Problem(("strategy", "compression"), text, "remove it"))
        self._gradients = gradients
        self._vector = collective.share(torch.empty_like(gradients, dtype=kind))
        sent, _ = traffic_elements(gradients.numel(), collective.rank, collective.world)
        self._saved_bytes = float(sent * (gradients.itemsize - kind.itemsize))
        self._baseline_s = time_all_reduce(gradients, collective)
        self._steps = -1
        self.seconds = 0.0  #: spent in casting, in this step
        self.overflows = kind is torch.float16  #: whether a finite gradient may become infinite

    def begin(self) -> None:
        """Another step comes."""
        self.seconds = 0.0
        self._error = self._whole = 0.0
        self._steps += 1
        self._measures = self._steps % MEASURE_EVERY == 0

    def pack(self, start: int, stop: int) -> Tensor:
        """Give a part of the gradients as it travels; the group may write into it."""
        began = time.perf_counter()
        grads, packed = self._gradients[start:stop], self._vector[start:stop]
        packed.copy_(grads)
        self.seconds += time.perf_counter() - began
        if self._measures:
            self._error += float(torch.linalg.vector_norm(packed.to(grads.dtype) - grads)) ** 2
            self._whole += float(torch.linalg.vector_norm(grads)) ** 2
        return packed

    def unpack(self, start: int, stop: int) -> None:
        """Write a part that came back into the gradients."""
        began = time.perf_counter()
        self._gradients[start:stop].copy_(self._vector[start:stop])
        self.seconds += time.perf_counter() - began

    def figures(self, working_s: float) -> dict[str, float]:
        """
        Give the figures of this step; the error only in steps in which it was measured.

        Args:
            working_s: of the step's operations, waiting left out.
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

    The first step sends nothing early: rank 0 watches in which order the buckets become complete,
    and all ranks take that order over. Parameters that no backward uses have zero gradients, which
    are summed as such.

    Args:
        flat: the model, on the vectors it will stay on.
        collective: the group; with one rank nothing is done.
        bucket_bytes: about so much is sent at once; the first bucket is smaller.
        overlap: send while backward goes on.
        wire_dtype: `float16`, `bfloat16`, or None: gradients travel as they are.
        check_finite: look for NaN and infinity in each bucket before it leaves.

    Raises:
        SpecError: gradients that are as small as `wire_dtype` already, or of several types.
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
        self._broken: int | None = None  #: first parameter so far that is not finite here
        self.local = StepControl()
        """This rank's record of the last step, with what was found in its gradients."""
        self._control = ControlSum(collective, len(flat.slots), flat.grads.device)
        self._cuts = [*cut_segments(flat, bucket_bytes)]
        self._types = [flat.layout.runs(cut.start, cut.stop)[0].dtype for cut in self._cuts]
        self._layouts = [flat.layout.cut(cut.start, cut.stop) for cut in self._cuts]
        self._release = Release([cut.parameters for cut in self._cuts])
        self._handles: dict[int, Handle] = {}
        self._wire: Wire | None = None
        if wire_dtype is not None and not self._alone:
            self._wire = Wire(flat.grads[: flat.layout.tail], wire_dtype, collective)
        self._meter, self._overlap = Meter(collective), OverlapMeter(collective)
        self._begun = self._listening = False
        self._agreed = not overlap
        self._hooks = (
            register_gradient_hooks(flat, self._on_gradient) if overlap and not self._alone else []
        )
        flat.copy_when_ready(bool(self._hooks), looks=check_finite)

    @override
    def last_backward(self) -> None:
        """Called once for each part that has a last backward of its own."""
        if not self._alone:
            if not self._begun:
                self._begin()
            # NCCL wants operations of several communicators in one order on all ranks, and ranks
            # without samples come to the buckets after the last call of `all_gather` only.
            self._listening = not idle_ranks_wait()

    def was_sent(self, index: int) -> bool:
        """Say whether a slot's gradient of the backward under way was sent already."""
        return self._begun and self._release.was_sent(index)

    def pause(self) -> None:
        """Called after a backward that is followed by another one, not the last."""
        self._listening = False

    @override
    def finish(
        self, local: StepControl, on_bucket: Callable[[range], None] = lambda parameters: None
    ) -> StepControl:
        """
        The control record leaves behind the last bucket.

        Args:
            local: see `Reducer`.
            on_bucket: called with the slots of each bucket that has been reduced.
        """
        if self._alone:
            self.local = local.looked_at(self._flat) if self._check_finite else local
            return self.local
        if not self._begun:
            self._begin()
        self._begun = self._listening = False
        cast_before = self._wire.seconds if self._wire else 0.0
        self._overlap.finish()
        self._flat.zero_missing()
        for number in self._release.rest():
            self._start(number)
        broken, self._broken = self._broken, None
        self.local = local if broken is None else local.broken(broken)
        self._control.start(self.local)
        for number in self._release.order:
            self._handles.pop(number).wait()
            if self._wire is not None:
                self._wire.unpack(self._cuts[number].start, self._cuts[number].stop)
            on_bucket(self._cuts[number].parameters)
        total = self._control.wait()
        self._overlap.end(self._wire.seconds - cast_before if self._wire else 0.0)
        if not self._agreed:
            self._agree()
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

    def close(self) -> None:
        """
        Take the hooks off the model.

        Waits for nothing: who closes in the middle of a step has given the group up, and its
        operations end by themselves.
        """
        self._listening = False
        self._flat.copy_when_ready(False)
        for hook in self._hooks:
            hook.remove()
        self._handles.clear()

    def _begin(self) -> None:
        self._meter.begin()
        self._begun = True
        # No hook may wait for the other ranks: one that does not reach a bucket's parameters sends
        # it in `finish`, and may need this rank in the backward of a layer before.
        self._release.begin(early=not self._collective.start_waits)
        self._overlap.begin()
        if self._wire is not None:
            self._wire.begin()

    def _on_gradient(self, parameter: int, name: str) -> None:
        """Send what may go now that one more gradient is there; autograd calls this."""
        if self._listening and self._release.was_sent(parameter):
            raise came_again(name)
        self._flat.gradients.ready(parameter)
        if not self._listening:
            return
        for number in self._release.gradient(parameter):
            self._start(number)

    def _start(self, number: int) -> None:
        if self._check_finite:
            self._look_at(number)
        cut = self._cuts[number]
        if self._wire is None:
            travels = typed(self._grads, cut.start, cut.stop, self._types[number])
        else:
            travels = self._wire.pack(cut.start, cut.stop)
        self._overlap.start()
        self._handles[number] = self._collective.start_all_reduce(travels)

    def _look_at(self, number: int) -> None:
        """
        Look for NaN and infinity in a bucket before it leaves: then others' gradients are in it.

        In one pass over it, or in those of its parameters that were not looked at in their hooks.
        The view ends with this function: torch lets go of the GIL to free it, and once the
        operation runs in its thread, that costs the backward a third of a millisecond a bucket.
        """
        cut, layout = self._cuts[number], self._layouts[number]
        run = self._grads[cut.start : cut.stop]
        if any(map(self._flat.gradients.finite, cut.parameters)):
            slot = self._first_of_others(run, layout.pieces, self._types[number])
        else:
            slot = first_non_finite(run, layout.segments, layout.pieces)
        if slot is not None:
            self._broken = slot if self._broken is None else min(slot, self._broken)

    def _first_of_others(self, run: Tensor, pieces: Sequence[Piece], dtype: str) -> int | None:
        """Give the first slot that is not finite, of those that no hook has looked at."""
        for piece in pieces:
            if not self._flat.gradients.finite(piece.slot):
                if not is_finite(typed(run, piece.start, piece.stop, dtype)):
                    return piece.slot
        return None

    def _agree(self) -> None:
        """Take over what rank 0 saw; where it had no samples, ask again after the next step."""
        proposal = self._release.proposal()
        order, held = proposal or ([-1] * len(self._cuts), [False] * len(self._cuts))
        plan = torch.tensor([order, [int(h) for h in held]], device=self._grads.device)
        self._collective.broadcast(plan)
        order, held = plan[0].tolist(), plan[1].bool().tolist()
        if order[0] >= 0:
            self._release.agree(order, held)
            self._agreed = True


def cut_segments(flat: FlatModel, bucket_bytes: int) -> Iterator[Bucket]:
    """Cut each segment into buckets, the last one first: what backward makes first is there."""
    item = flat.grads.itemsize
    limit = first = bucket_bytes // item
    first = min(first, FIRST_BYTES // item)
    for segment in reversed([one for one in flat.layout.segments if one.start < flat.layout.tail]):
        inside = [
            (index, slot.offset - segment.start)
            for index, slot in enumerate(flat.slots)
            if segment.start <= slot.offset < segment.stop
        ]
        begin = inside[0][0]
        size = segment.stop - segment.start
        for cut in cut_buckets([offset for _, offset in inside], size, limit, first):
            members = range(cut.parameters.start + begin, cut.parameters.stop + begin)
            yield replace(
                cut,
                start=cut.start + segment.start,
                stop=cut.stop + segment.start,
                parameters=members,
            )
        first = limit
