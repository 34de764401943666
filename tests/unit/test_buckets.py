"""When buckets leave during one rank's backward, and that nothing leaves too early."""

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


class Odd(nn.Module):
    """Registered in an order that neither forward nor backward has."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.middle = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.middle(self.first(inputs)))
        return outputs


LAST, FIRST, MIDDLE = 0, 16, 32
"""Where their gradients lie."""


class Rig:
    """A reducer with buckets of one parameter each over a group that records."""

    def __init__(self, model: nn.Module, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.flat = FlatModel(model)
        self.group = Recorder(self.flat.grads)
        self.reducer = BucketReducer(self.flat, self.group, 4, **arguments)

    def backward(self, forward: Forward | None = None, *, last: bool = True) -> list[int]:
        """Go backward once; give what was sent meanwhile."""
        before = len(self.group.started)
        outputs = (forward or self.flat.model)(torch.ones(2, 4))
        if last:
            self.reducer.last_backward()
        torch.autograd.backward(outputs.square().sum())
        return self.group.started[before:]

    def finish(self) -> list[int]:
        """Finish the step; give what was sent meanwhile."""
        before = len(self.group.started)
        self.reducer.finish(record_of(self.flat))
        return self.group.started[before:]

    def step(self, forward: Forward | None = None) -> tuple[list[int], list[int]]:
        """Give what was sent (behind backward, at the end)."""
        self.flat.grads.zero_()
        return self.backward(forward), self.finish()


def test_the_order_of_use_is_learned_in_the_first_step() -> None:
    rig = Rig(Odd())
    assert rig.step() == ([], [MIDDLE, FIRST, LAST])
    for _ in range(2):
        assert rig.step() == ([LAST, MIDDLE, FIRST], [])


def test_while_a_start_waits_for_other_ranks_all_leave_at_the_end() -> None:
    """In the order that they will have: it is learned meanwhile."""
    rig = Rig(Odd())
    rig.group.start_waits = True
    assert rig.step() == ([], [MIDDLE, FIRST, LAST])
    for _ in range(2):
        assert rig.step() == ([], [LAST, MIDDLE, FIRST])
    rig.group.start_waits = False
    for _ in range(2):
        assert rig.step() == ([LAST, MIDDLE, FIRST], [])


def test_without_overlap_all_leave_at_the_end() -> None:
    rig = Rig(Odd(), overlap=False)
    for _ in range(2):
        assert rig.step() == ([], [MIDDLE, FIRST, LAST])


def test_accumulating_backwards_send_nothing() -> None:
    rig = Rig(Odd())
    rig.step()
    assert rig.backward(last=False) == []
    assert rig.backward() == [LAST, MIDDLE, FIRST]
    assert rig.finish() == []
    assert rig.backward(last=False) == []


def test_a_step_without_samples_sends_everything_in_the_same_order() -> None:
    rig = Rig(Odd())
    assert rig.finish() == [MIDDLE, FIRST, LAST]  # nothing to learn from yet
    rig.step()
    assert rig.finish() == [LAST, MIDDLE, FIRST]
    assert rig.step() == ([LAST, MIDDLE, FIRST], [])


def test_an_unused_parameter_holds_up_no_other_once_known() -> None:
    model = Odd()

    def partly(inputs: Tensor) -> Tensor:
        outputs: Tensor = model.last(model.first(inputs))
        return outputs

    rig = Rig(model)
    assert rig.step(partly) == ([], [MIDDLE, FIRST, LAST])
    assert rig.step(partly) == ([LAST, FIRST], [MIDDLE])
    assert rig.step() == ([LAST, FIRST], [MIDDLE])  # it is used after all


def test_a_parameter_unused_for_once_holds_up_those_behind_it() -> None:
    model = Odd()
    rig = Rig(model)
    rig.step()
    assert rig.step(lambda x: model.last(model.first(x))) == ([LAST], [MIDDLE, FIRST])


def test_a_parameter_used_three_times_leaves_once_and_complete() -> None:
    model = Odd()
    rig = Rig(model)

    def repeated(inputs: Tensor) -> Tensor:
        outputs: Tensor = model(model.middle(model.middle(inputs)))
        return outputs

    rig.step(repeated)
    assert rig.step(repeated) == ([LAST, FIRST, MIDDLE], [])


def nested(model: Odd) -> Forward:
    """Backward within backward, twice through one parameter."""

    def forward(inputs: Tensor) -> Tensor:
        once = checkpoint(model.middle, model.first(inputs), use_reentrant=True)
        twice: Tensor = checkpoint(model.middle, once, use_reentrant=True)
        return twice

    return forward


def test_a_gradient_that_comes_in_parts_is_held_until_all_have_come() -> None:
    model = Odd()
    rig = Rig(model)
    rig.step(nested(model))
    early, late = rig.step(nested(model))
    assert early == [FIRST]
    assert sorted(late) == [LAST, MIDDLE]
    nested_grads = rig.flat.grads.clone()
    rig.step(lambda x: model.middle(model.middle(model.first(x))))
    torch.testing.assert_close(rig.flat.grads, nested_grads)


def test_a_gradient_that_was_sent_too_early_is_an_error_not_a_wrong_sum() -> None:
    model = Odd()
    rig = Rig(model)
    rig.step(lambda x: model.middle(model.first(x)))
    with pytest.raises(SpecError, match=r"'middle\.weight' changed after it was sent"):
        rig.step(nested(model))


def test_a_broken_group_is_seen_in_backward() -> None:
    rig = Rig(Odd())
    rig.step()
    rig.group.broken = True
    with pytest.raises(CollectiveError):
        rig.backward()
    rig.reducer.close()


class Raise(torch.autograd.Function):
    """User code that fails on the way back."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ZeroDivisionError


def test_after_an_error_of_the_user_close_waits_for_nothing() -> None:
    model = Odd()
    rig = Rig(model)
    rig.step()

    def failing(inputs: Tensor) -> Tensor:
        outputs: Tensor = model.last(Raise.apply(model.middle(model.first(inputs))))  # type: ignore[no-untyped-call]
        return outputs

    with pytest.raises(ZeroDivisionError):
        rig.backward(failing)
    assert rig.group.started[3:] == [LAST]
    rig.reducer.close()
    assert rig.backward() == []


def test_a_closed_reducer_leaves_the_model_to_its_successor() -> None:
    rig = Rig(Odd())
    rig.step()
    rig.reducer.close()
    old, rig.reducer = rig.reducer, BucketReducer(rig.flat, rig.group, 4)
    old.last_backward()
    assert rig.step() == ([], [MIDDLE, FIRST, LAST])
    assert rig.step() == ([LAST, MIDDLE, FIRST], [])


def test_one_rank_alone_does_nothing() -> None:
    flat = FlatModel(Odd())
    alone = Fabric(1).collective(0)
    reducer = BucketReducer(flat, alone, 4, wire_dtype="float16")
    for _ in range(2):
        flat.grads.fill_(0.1)
        reducer.last_backward()
        reducer.finish(record_of(flat))
        assert torch.equal(flat.grads, torch.full_like(flat.grads, 0.1))
        assert not any(reducer.figures().values())
    assert alone._number == 0  # no operation at all


def reduce_once(dtype: str, value: float) -> list[tuple[Tensor, dict[str, float]]]:
    """Let rank r of three bring (r + 1) * value in every place."""
    fabric = Fabric(3)

    def body(rank: int) -> tuple[Tensor, dict[str, float]]:
        flat = FlatModel(Odd())
        reducer = BucketReducer(flat, fabric.collective(rank), 4, wire_dtype=dtype)
        flat.grads.fill_((rank + 1) * value)
        reducer.finish(record_of(flat))
        return flat.grads, reducer.figures()

    return on_ranks(3, body)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_travel(dtype: str) -> None:
    (grads, figures), *others = reduce_once(dtype, 0.3)
    kind = getattr(torch, dtype)
    torch.testing.assert_close(grads, torch.full((48,), 1.8), rtol=3e-2, atol=0)
    assert all(torch.equal(grads, other) for other, _ in others)
    order_bytes = 2 * 3 * 8  # broadcast once, from rank 0 to two others
    control_bytes = 2 * 2 / 3 * control_size(3) * 8
    expected = 2 * 2 / 3 * 48 * 2 + 2 * order_bytes + control_bytes
    assert figures["sent_bytes"] == pytest.approx(expected, rel=0.05)
    assert figures["saved_bytes"] == 2 * 2 / 3 * 48 * (4 - 2)
    rounding = abs(float(torch.tensor(0.3).to(kind)) / 0.3 - 1)
    assert figures["error_norm"] == pytest.approx(rounding, rel=1e-3)
    assert figures["compress_s"] > 0


def test_float16_overflows_as_anywhere_and_bfloat16_does_not() -> None:
    assert torch.isinf(reduce_once("float16", 3e4)[0][0]).all()
    assert torch.isfinite(reduce_once("bfloat16", 3e4)[0][0]).all()


def test_halves_of_halves_are_refused() -> None:
    flat = FlatModel(Odd().to(torch.bfloat16))
    with pytest.raises(SpecError, match=r"compression: float16 is no smaller"):
        BucketReducer(flat, Recorder(flat.grads), 4, wire_dtype="float16")


def test_figures_cover_all_that_is_sent_after_setting_up() -> None:
    rig = Rig(Odd())
    rig.group.traffic.sent_bytes += 1000  # setting up
    for _ in range(3):
        rig.step()
        rig.group.traffic.sent_bytes += 7  # a step's update may send as well
        assert rig.reducer.figures()["sent_bytes"] == 7
        rig.group.traffic.sent_bytes += 5  # and so may others
        rig.step()
        assert rig.reducer.figures()["sent_bytes"] == 5


def test_the_error_is_measured_now_and_then() -> None:
    rig = Rig(Odd(), wire_dtype="bfloat16")
    measured = []
    for _ in range(34):
        rig.step()
        measured.append("error_norm" in rig.reducer.figures())
    assert [step for step, was in enumerate(measured) if was] == [0, 16, 32]


def test_halves_say_whether_they_paid() -> None:
    rig = Rig(Odd(), wire_dtype="bfloat16")
    rig.step()
    rig.group.traffic.working_s += 2.0
    rig.group.traffic.waiting_s += 5.0  # is on neither side
    figures = rig.reducer.figures()
    cost = 2.0 + figures["compress_s"]
    assert figures["saved_s"] == pytest.approx(figures["baseline_s"] - cost)
    assert 0 < figures["baseline_s"] < 1
