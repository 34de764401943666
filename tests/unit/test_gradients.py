"""Gradients and data that leave the vectors are taken in, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from distplat.platform.errors import SpecError
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.reduction.bucket_reducer import register_gradient_hooks

COPIED_BYTES = "distplat.strategies.model.flat._COPIED_BYTES"


class Net(nn.Module):
    """Two layers, the second of which is used on request."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, *, both: bool = True) -> Tensor:
        result: Tensor = self.a(x)
        return result + self.b(x) if both else result


class Rig:
    """A flat model beside a plain one, behind a step that left gradients."""

    copies = False  #: whether gradients are copied in hooks instead of added to zeros

    def __init__(self, kind: Callable[[], nn.Module] = Net) -> None:
        torch.manual_seed(2)
        self.flat = FlatModel(kind())
        if self.copies:
            register_gradient_hooks(self.flat, lambda index, _: self.flat.gradients.ready(index))
            self.flat.copy_when_ready(True)
        self.flat.grads.fill_(9.0)
        torch.manual_seed(2)
        self.plain = kind()
        self.flat.begin_step()

    def backward(self, made: Callable[[nn.Module], Tensor]) -> None:
        loss = made(self.flat.model)
        self.flat.before_backward()
        torch.autograd.backward(loss)
        self.flat.collect()
        torch.autograd.backward(made(self.plain))

    def check(self) -> None:
        plain = dict(self.plain.named_parameters())
        for index, slot in enumerate(self.flat.slots):
            grad = plain[slot.name].grad
            assert self.flat.present[index] == (grad is not None), slot.name
            expected = torch.zeros(slot.shape) if grad is None else grad
            dense = expected.to_dense() if expected.is_sparse else expected
            torch.testing.assert_close(slot.view(self.flat.grads), dense, msg=slot.name)
            held = self.flat.parameters[index].grad
            assert held is not None and held.data_ptr() == slot.view(self.flat.grads).data_ptr()


@pytest.fixture(params=["added", "copied"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rig, "copies", request.param == "copied")
    monkeypatch.setattr(COPIED_BYTES, 0)


X = torch.ones(4, 3)


def test_without_is_not_zero() -> None:
    rig = Rig()
    rig.backward(lambda net: net(X, both=False).sum())
    rig.check()
    assert rig.flat.present.tolist() == [True, True, False, False]
    rig.flat.begin_step()
    assert not rig.flat.present.any()
    rig.backward(lambda net: net(X).sum() * 0.0)
    assert rig.flat.present.all()
    assert rig.flat.grads.eq(0).all()


def test_a_step_without_a_backward_has_gradients_of_zero() -> None:
    rig = Rig()
    rig.flat.zero_missing()
    assert rig.flat.grads.eq(0).all()
    assert not rig.flat.present.any()


def test_large_gradients_are_not_set_to_zero_where_they_are_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(COPIED_BYTES, 6 * 4)  # a weight, and no bias
    rig = Rig()
    for slot, parameter in zip(rig.flat.slots, rig.flat.parameters, strict=True):
        left = 9.0 if rig.copies and slot.size == 6 else 0.0
        assert slot.view(rig.flat.grads).eq(left).all()
        assert (parameter.grad is None) == (left == 9.0)
    rig.backward(lambda net: net(X).sum())
    rig.check()


def test_copied_gradients_are_looked_at_as_long_as_nothing_changes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(COPIED_BYTES, 6 * 4)
    rig = Rig()
    rig.flat.copy_when_ready(rig.copies, check_finite=True)
    rig.flat.begin_step()
    indices = [index for index, slot in enumerate(rig.flat.slots) if slot.size == 6]
    a, b = indices
    rig.backward(lambda net: net(X).sum())
    assert [rig.flat.gradients.finite(index) for index in indices] == [rig.copies] * 2
    grad = rig.flat.parameters[a].grad
    assert grad is not None
    grad.mul_(2.0)
    assert [rig.flat.gradients.finite(index) for index in indices] == [False, rig.copies]
    rig.flat.begin_step()
    assert not rig.flat.gradients.finite(b)


def test_micro_batches_add_up() -> None:
    rig = Rig()
    rig.backward(lambda net: net(X, both=False).sum())
    rig.backward(lambda net: net(2 * X).square().sum())
    rig.check()


def test_create_graph_within_loss_is_no_backward_of_its_own() -> None:
    def penalty(net: nn.Module) -> Tensor:
        x = X.clone().requires_grad_(True)
        [slope] = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return slope.square().sum()

    rig = Rig()
    rig.backward(penalty)
    rig.check()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_of_gradients_is_taken_in() -> None:
    rig = Rig()
    for times in (1, 2):
        loss = rig.flat.model(times * X).square().sum()
        rig.flat.before_backward()
        torch.autograd.backward(loss, create_graph=True)
        rig.flat.collect()
        torch.autograd.backward(rig.plain(times * X).square().sum())
    rig.check()


def test_sparse_gradients_are_added_densely() -> None:
    rig = Rig(lambda: nn.Embedding(5, 2, sparse=True))
    rig.backward(lambda net: net(torch.tensor([1, 3, 3])).square().sum())
    rig.check()


def test_a_hook_may_replace_the_gradient_or_drop_it() -> None:
    rig = Rig()
    for net in (rig.flat.model, rig.plain):
        assert isinstance(net, Net)

        def halve(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad = parameter.grad / 2

        def drop(parameter: Tensor) -> None:
            parameter.grad = None

        for parameter, hook in ((net.a.weight, halve), (net.b.weight, drop)):
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    rig.backward(lambda net: net(X).sum())
    rig.check()


def test_a_hook_of_the_models_own_may_drop_the_gradient() -> None:
    class Dropping(Net):
        def __init__(self) -> None:
            super().__init__()
            drop = lambda parameter: setattr(parameter, "grad", None)  # noqa: E731
            self.b.weight.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]

    rig = Rig(Dropping)
    rig.backward(lambda net: net(X).sum())
    rig.check()


def own_backward(net: nn.Module) -> Tensor:
    torch.autograd.backward(net(X).sum())
    loss: Tensor = net(X).sum()
    return loss


def assigned(net: nn.Module) -> Tensor:
    net.get_parameter("b.bias").grad = torch.ones(2)
    loss: Tensor = net(X).sum()
    return loss


@pytest.mark.parametrize(("made", "name"), [(own_backward, "a.weight"), (assigned, "b.bias")])
def test_a_backward_within_the_loss_is_refused(
    made: Callable[[nn.Module], Tensor], name: str
) -> None:
    with pytest.raises(SpecError, match=rf"'{name}' had a gradient before backward"):
        Rig().backward(made)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_in_forward(set_to_none: bool) -> None:
    def made(net: nn.Module) -> Tensor:
        if net is rig.flat.model:
            net.zero_grad(set_to_none=set_to_none)
        loss: Tensor = net(X).square().sum()
        return loss

    rig = Rig()
    rig.backward(made)
    rig.check()
    if set_to_none:
        rig.backward(made)
        rig.check()
    else:
        with pytest.raises(SpecError, match=r"'a\.weight' away between micro-batches"):
            rig.backward(made)


def test_data_that_leave_the_vector_are_taken_in() -> None:
    flat = FlatModel(Net())
    weight = flat.model.get_parameter("a.weight")
    weight.data = torch.full((2, 3), 5.0)
    assert flat.check_layout(0) == ["a.weight"]
    assert flat.slots[0].view(flat.params).eq(5.0).all()
    flat.params.zero_()
    assert weight.eq(0).all()
    assert flat.check_layout(1) == []


def replace(net: nn.Module) -> None:
    net.get_submodule("a").weight = nn.Parameter(torch.zeros(2, 3))


def remove(net: nn.Module) -> None:
    del net.get_submodule("a").weight


def add(net: nn.Module) -> None:
    net.c = nn.Linear(2, 2)


def share(net: nn.Module) -> None:
    net.get_parameter("b.weight").data = net.get_parameter("a.weight").data


def reshape(net: nn.Module) -> None:
    net.get_parameter("b.weight").data = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (replace, r"step 3: the parameter 'a\.weight' was replaced or removed"),
        (remove, r"step 3: the parameter 'a\.weight' was replaced or removed"),
        (add, r"step 3: 'c\.weight' was not there when the run began"),
        (share, r"step 3: 'b\.weight' shares the memory of another parameter"),
        (reshape, r"step 3: the data of 'b\.weight' were replaced by float32 \[3, 3\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_changed_is_refused(spoil: Callable[[nn.Module], None], message: str) -> None:
    flat = FlatModel(Net())
    flat.check_layout(1)
    spoil(flat.model)
    with pytest.raises(SpecError, match=message):
        flat.check_layout(2)


def test_what_is_cheap_to_see_is_seen_in_every_step() -> None:
    flat = FlatModel(Net())
    for step in range(5):
        flat.check_layout(step)
    replace(flat.model)
    with pytest.raises(SpecError, match="step 6"):
        flat.check_layout(5)


def tied_by_data() -> nn.Module:
    net = Net()
    net.b.weight.data = net.a.weight.data
    return net


def aliased_by_a_buffer() -> nn.Module:
    net = Net()
    net.register_buffer("copy", net.a.weight.data[1])
    return net


def transposed() -> nn.Module:
    net = Net()
    net.other = nn.Parameter(net.a.weight.detach().t())
    return net


def every_second_row() -> nn.Module:
    net = Net()
    net.register_buffer("rows", net.a.weight.detach()[::2])
    return net


def held_in_an_attribute() -> nn.Module:
    net = Net()
    net.a.anchor = net.a.weight.detach()
    return net


def held_in_a_list() -> nn.Module:
    net = Net()
    vars(net)["parts"] = [torch.ones(2), net.a.weight[:1]]
    return net


@pytest.mark.parametrize(
    ("make", "names", "hint"),
    [
        (tied_by_data, ("a.weight", "b.weight"), "same nn.Parameter"),
        (aliased_by_a_buffer, ("a.weight", "copy"), "same nn.Parameter"),
        (transposed, ("a.weight", "other"), "same nn.Parameter"),
        (every_second_row, ("a.weight", "rows"), "same nn.Parameter"),
        (held_in_an_attribute, ("a.weight", "a.anchor"), "read it where it is used"),
        (held_in_a_list, ("a.weight", "parts.1"), "read it where it is used"),
    ],
)
def test_tensors_in_the_same_memory_are_refused(
    make: Callable[[], nn.Module], names: tuple[str, str], hint: str
) -> None:
    with pytest.raises(SpecError) as caught:
        FlatModel(make())
    [problem] = caught.value.problems
    assert "are different tensors in the same memory" in problem.message
    assert all(repr(name) in problem.message for name in names)
    assert hint in problem.hint


def test_what_a_hook_makes_anew_and_what_is_the_parameter_itself_may_be_held() -> None:
    net: Any = Net()
    nn.utils.spectral_norm(net.a)
    prune.RandomUnstructured.apply(net.b, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    net.listed = [*net.parameters()]
    net.own = net.a.bias.detach().clone()
    FlatModel(net)


def test_slices_of_one_tensor_may_be_parameters() -> None:
    whole = torch.zeros(4, 6)
    columns = nn.ParameterList([whole[:, :3], whole[:, 3:]])
    rows = nn.ParameterList([whole.clone()[:2], whole.clone()[2:]])
    other = torch.zeros(4, 6)
    turns = nn.ParameterList([other[::2], other[1::2]])
    found = FlatModel(nn.ModuleList([columns, rows, turns])).slots
    assert [slot.size for slot in found] == [12] * 6


def test_a_complex_parameter_is_refused_by_name() -> None:
    net = Net()
    net.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(SpecError, match=r"'w' is torch\.complex64"):
        FlatModel(net)


def test_an_empty_parameter_is_left_alone() -> None:
    net = Net()
    net.none = nn.Parameter(torch.zeros(0, 3))
    flat = FlatModel(net)
    assert "none" not in [slot.name for slot in flat.slots]
    assert flat.state_dict()["none"].shape == (0, 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_gradient_that_is_not_finite_is_named(value: float) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).half())
    flat = FlatModel(net)
    assert flat.first_non_finite() is None
    for name in ("2.bias", "1.weight"):
        slot = next(slot for slot in flat.slots if slot.name == name)
        slot.view(flat.grads).view(-1)[1] = value
        first = flat.first_non_finite()
        assert first is not None and flat.name(first) == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    flat = FlatModel(nn.Linear(8, 8, bias=False).to(dtype))
    flat.slots[0].view(flat.grads).fill_(torch.finfo(dtype).max)
    assert flat.first_non_finite() is None


def test_what_hooks_have_seen_to_be_finite_is_left_out_until_it_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(COPIED_BYTES, 6 * 4)
    flat = FlatModel(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)), owned=True)
    flat.copy_when_ready(True, check_finite=True)
    for index, one in enumerate(flat.parameters):
        one.grad = torch.ones_like(one)
        flat.gradients.ready(index)
    assert [flat.gradients.finite(index) for index in range(4)] == [True, False, True, False]
    views = [slot.view(flat.grads) for slot in flat.slots]
    views[0].data.fill_(torch.inf)  # no version counts it: the look that was is believed
    assert flat.first_non_finite(unseen=True) is None and flat.first_non_finite() == 0
    for index in (3, 1):
        views[index][0] = torch.nan
        assert flat.first_non_finite(unseen=True) == 0
    views[0].data.fill_(1.0)
    assert flat.first_non_finite(unseen=True) == 1
    views[1][0] = views[3][0] = 1.0
    grad = flat.parameters[2].grad
    assert grad is not None and flat.gradients.is_copied(2)
    grad.fill_(-torch.inf)
    flat.gradients.ready(2)
    assert flat.first_non_finite(unseen=True) == 2


def test_infinities_of_both_signs_do_not_cancel() -> None:
    flat = FlatModel(nn.Linear(2, 1, bias=False))
    flat.grads[:2] = torch.tensor([torch.inf, -torch.inf])
    assert flat.first_non_finite() == 0


def test_several_types_lie_in_segments() -> None:
    net = nn.ModuleDict(
        {
            name: nn.Linear(3, 2).to(dtype)
            for name, dtype in [
                ("a", torch.float32),
                ("b", torch.float64),
                ("c", torch.float32),
                ("d", torch.bfloat16),
            ]
        }
    )
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flat = FlatModel(net)
    assert flat.params.dtype is torch.uint8
    types = [segment.dtype for segment in flat.layout.segments]
    assert types == ["float32", "float64", "bfloat16"]
    assert [slot.name[0] for slot in flat.slots] == list("aaccbbdd")
    for slot in flat.slots:
        assert slot.offset % 64 == 0
        [home] = flat.layout.runs(slot.offset, slot.stop)
        assert getattr(torch, home.dtype) == slot.dtype
        assert torch.equal(slot.view(flat.params), before[slot.name])
    for vector in flat.typed(flat.params):
        vector.fill_(3.0)
    assert all(p.eq(3.0).all() for p in net.parameters())


def test_parameters_of_the_task_are_trained_beside_the_models() -> None:
    own = nn.Parameter(torch.zeros(2))
    flat = FlatModel(Net(), {"task.log_var": own})
    assert [slot.name for slot in flat.slots][-1] == "task.log_var"
    assert "task.log_var" not in flat.model.state_dict()
    assert torch.equal(flat.state_dict()["task.log_var"], own)
    flat.begin_step()
    loss = (flat.model(X) * torch.exp(own)).sum()
    flat.before_backward()
    torch.autograd.backward(loss)
    flat.collect()
    assert flat.present.all()
    flat.params.add_(flat.grads)
    assert own.ne(0).all()


def test_a_parameter_of_the_task_that_is_the_models_counts_once() -> None:
    net = Net()
    flat = FlatModel(net, {"task.head": net.get_parameter("a.weight")})
    assert "task.head" not in [slot.name for slot in flat.slots]


def test_a_name_that_the_model_has_is_refused() -> None:
    net = Net()
    net.task = nn.Linear(2, 2)
    with pytest.raises(SpecError, match=r"a tensor of the name 'task\.bias'"):
        FlatModel(net, {"task.bias": nn.Parameter(torch.zeros(2))})
