"""`BucketReducer`: when it sends each bucket during backward, never before it is complete."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from control_records import record_of
from rank_threads import on_ranks
from recorder import Recorder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distplat.platform.errors import CollectiveError, SpecError
from distplat.strategies.fakes import Fabric
from distplat.strategies.loop.control import control_size
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.reduction.bucket_reducer import BucketReducer

Forward = Callable[[Tensor], Tensor]


class Unordered(nn.Module):
    """Registers its layers in an order that differs from forward and from backward."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.middle = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.middle(self.first(inputs)))
        return outputs


LAST, FIRST, MIDDLE = 0, 16, 32
"""Offsets of the layers' gradients in the flat vector."""


class Rig:
    """A reducer with one parameter per bucket, over a group that records its operations."""

    def __init__(self, model: nn.Module, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.flat = FlatModel(model)
        self.group = Recorder(self.flat.grads)
        self.reducer = BucketReducer(self.flat, self.group, 4, **arguments)

    def backward(self, forward: Forward | None = None, *, last: bool = True) -> list[int]:
        """Run one backward; return the offsets sent during it."""
        before = len(self.group.started)
        outputs = (forward or self.flat.model)(torch.ones(2, 4))
        if last:
            self.reducer.last_backward()
        torch.autograd.backward(outputs.square().sum())
        return self.group.started[before:]

    def finish(self) -> list[int]:
        """Finish the step; return the offsets sent during it."""
        before = len(self.group.started)
        self.reducer.finish(record_of(self.flat))
        return self.group.started[before:]

    def step(self, forward: Forward | None = None) -> tuple[list[int], list[int]]:
        """Return the offsets sent (during backward, at the end)."""
        self.flat.grads.zero_()
        return self.backward(forward), self.finish()


def test_learns_the_order_in_the_first_step() -> None:
    rig = Rig(Unordered())
    assert rig.step() == ([], [MIDDLE, FIRST, LAST])
    for _ in range(2):
        assert rig.step() == ([LAST, MIDDLE, FIRST], [])


def test_sends_all_at_the_end_while_start_waits_for_other_ranks() -> None:
    """The order is learned meanwhile."""
    rig = Rig(Unordered())
    rig.group.start_waits = True
    assert rig.step() == ([], [MIDDLE, FIRST, LAST])
    for _ in range(2):
        assert rig.step() == ([], [LAST, MIDDLE, FIRST])
    rig.group.start_waits = False
    for _ in range(2):
        assert rig.step() == ([LAST, MIDDLE, FIRST], [])


def test_sends_all_at_the_end_without_overlap() -> None:
    rig = Rig(Unordered(), overlap=False)
    for _ in range(2):
        assert rig.step() == ([], [MIDDLE, FIRST, LAST])


def test_accumulation_sends_only_in_the_last_backward() -> None:
    rig = Rig(Unordered())
    rig.step()
    assert rig.backward(last=False) == []
    assert rig.backward() == [LAST, MIDDLE, FIRST]
    assert rig.finish() == []
    assert rig.backward(last=False) == []


def test_step_without_samples_sends_all_in_the_same_order() -> None:
    rig = Rig(Unordered())
    assert rig.finish() == [MIDDLE, FIRST, LAST]  # no order is known yet
    rig.step()
    assert rig.finish() == [LAST, MIDDLE, FIRST]
    assert rig.step() == ([LAST, MIDDLE, FIRST], [])


def test_known_unused_parameter_does_not_delay_others() -> None:
    model = Unordered()

    def partly(inputs: Tensor) -> Tensor:
        outputs: Tensor = model.last(model.first(inputs))
        return outputs

    rig = Rig(model)
    assert rig.step(partly) == ([], [MIDDLE, FIRST, LAST])
    assert rig.step(partly) == ([LAST, FIRST], [MIDDLE])
    assert rig.step() == ([LAST, FIRST], [MIDDLE])  # its gradient is still sent at the end


def test_newly_unused_parameter_delays_later_ones() -> None:
    model = Unordered()
    rig = Rig(model)
    rig.step()
    assert rig.step(lambda x: model.last(model.first(x))) == ([LAST], [MIDDLE, FIRST])


def test_parameter_used_three_times_is_sent_once_and_complete() -> None:
    model = Unordered()
    rig = Rig(model)

    def repeated(inputs: Tensor) -> Tensor:
        outputs: Tensor = model(model.middle(model.middle(inputs)))
        return outputs

    rig.step(repeated)
    assert rig.step(repeated) == ([LAST, FIRST, MIDDLE], [])


def nested(model: Unordered) -> Forward:
    """Use reentrant checkpointing: two nested backwards through one parameter."""

    def forward(inputs: Tensor) -> Tensor:
        once = checkpoint(model.middle, model.first(inputs), use_reentrant=True)
        twice: Tensor = checkpoint(model.middle, once, use_reentrant=True)
        return twice

    return forward


def test_partial_gradients_are_held_until_complete() -> None:
    model = Unordered()
    rig = Rig(model)
    rig.step(nested(model))
    early, late = rig.step(nested(model))
    assert early == [FIRST]
    assert sorted(late) == [LAST, MIDDLE]
    nested_grads = rig.flat.grads.clone()
    rig.step(lambda x: model.middle(model.middle(model.first(x))))
    torch.testing.assert_close(rig.flat.grads, nested_grads)


def test_gradient_that_changes_after_sending_raises() -> None:
    model = Unordered()
    rig = Rig(model)
    rig.step(lambda x: model.middle(model.first(x)))
    with pytest.raises(SpecError, match=r"'middle\.weight' changed after it was sent"):
        rig.step(nested(model))


def test_broken_group_raises_in_backward() -> None:
    rig = Rig(Unordered())
    rig.step()
    rig.group.broken = True
    with pytest.raises(CollectiveError):
        rig.backward()
    rig.reducer.close()


class RaiseInBackward(torch.autograd.Function):
    """User code that fails in backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ZeroDivisionError


def test_close_does_not_wait_after_a_user_error() -> None:
    model = Unordered()
    rig = Rig(model)
    rig.step()

    def failing(inputs: Tensor) -> Tensor:
        outputs: Tensor = model.last(RaiseInBackward.apply(model.middle(model.first(inputs))))  # type: ignore[no-untyped-call]
        return outputs

    with pytest.raises(ZeroDivisionError):
        rig.backward(failing)
    assert rig.group.started[3:] == [LAST]
    rig.reducer.close()
    assert rig.backward() == []


def test_closed_reducer_removes_its_hooks() -> None:
    rig = Rig(Unordered())
    rig.step()
    rig.reducer.close()
    old, rig.reducer = rig.reducer, BucketReducer(rig.flat, rig.group, 4)
    old.last_backward()
    assert rig.step() == ([], [MIDDLE, FIRST, LAST])
    assert rig.step() == ([LAST, MIDDLE, FIRST], [])


def test_one_rank_sends_nothing() -> None:
    flat = FlatModel(Unordered())
    alone = Fabric(1).collective(0)
    reducer = BucketReducer(flat, alone, 4, wire_dtype="float16")
    for _ in range(2):
        flat.grads.fill_(0.1)
        reducer.last_backward()
        reducer.finish(record_of(flat))
        assert torch.equal(flat.grads, torch.full_like(flat.grads, 0.1))
        assert not any(reducer.figures().values())
    assert alone._number == 0  # no operation of the group


def reduce_once(dtype: str, value: float) -> list[tuple[Tensor, dict[str, float]]]:
    """Reduce gradients of three ranks; those of rank r are (r + 1) * value."""
    fabric = Fabric(3)

    def body(rank: int) -> tuple[Tensor, dict[str, float]]:
        flat = FlatModel(Unordered())
        reducer = BucketReducer(flat, fabric.collective(rank), 4, wire_dtype=dtype)
        flat.grads.fill_((rank + 1) * value)
        reducer.finish(record_of(flat))
        return flat.grads, reducer.figures()

    return on_ranks(3, body)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sends_half_precision(dtype: str) -> None:
    (grads, figures), *others = reduce_once(dtype, 0.3)
    torch_dtype = getattr(torch, dtype)
    torch.testing.assert_close(grads, torch.full((48,), 1.8), rtol=3e-2, atol=0)
    assert all(torch.equal(grads, other) for other, _ in others)
    order_bytes = 2 * 3 * 8  # broadcast once, from rank 0 to two others
    control_bytes = 2 * 2 / 3 * control_size(3) * 8
    expected = 2 * 2 / 3 * 48 * 2 + 2 * order_bytes + control_bytes
    assert figures["sent_bytes"] == pytest.approx(expected, rel=0.05)
    assert figures["saved_bytes"] == 2 * 2 / 3 * 48 * (4 - 2)
    rounding = abs(float(torch.tensor(0.3).to(torch_dtype)) / 0.3 - 1)
    assert figures["error_norm"] == pytest.approx(rounding, rel=1e-3)
    assert figures["compress_s"] > 0


def test_float16_overflows_and_bfloat16_does_not() -> None:
    assert torch.isinf(reduce_once("float16", 3e4)[0][0]).all()
    assert torch.isfinite(reduce_once("bfloat16", 3e4)[0][0]).all()


def test_rejects_compression_of_half_precision() -> None:
    flat = FlatModel(Unordered().to(torch.bfloat16))
    with pytest.raises(SpecError, match=r"compression: float16 is no smaller"):
        BucketReducer(flat, Recorder(flat.grads), 4, wire_dtype="float16")


def test_figures_exclude_setup_traffic() -> None:
    rig = Rig(Unordered())
    rig.group.traffic.sent_bytes += 1000  # setting up
    for _ in range(3):
        rig.step()
        rig.group.traffic.sent_bytes += 7  # the step's update
        assert rig.reducer.figures()["sent_bytes"] == 7
        rig.group.traffic.sent_bytes += 5  # other traffic
        rig.step()
        assert rig.reducer.figures()["sent_bytes"] == 5


def test_measures_error_every_16_steps() -> None:
    rig = Rig(Unordered(), wire_dtype="bfloat16")
    measured = []
    for _ in range(34):
        rig.step()
        measured.append("error_norm" in rig.reducer.figures())
    assert [step for step, has_error in enumerate(measured) if has_error] == [0, 16, 32]


def test_reports_saved_time() -> None:
    rig = Rig(Unordered(), wire_dtype="bfloat16")
    rig.step()
    rig.group.traffic.working_s += 2.0
    rig.group.traffic.waiting_s += 5.0  # not counted
    figures = rig.reducer.figures()
    cost = 2.0 + figures["compress_s"]
    assert figures["saved_s"] == pytest.approx(figures["baseline_s"] - cost)
    assert 0 < figures["baseline_s"] < 1
