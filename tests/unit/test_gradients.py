"""Gradients and data outside of the flat vectors are copied into them, or rejected by name."""

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
    """Two layers; the second is optional in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, *, both: bool = True) -> Tensor:
        result: Tensor = self.a(x)
        return result + self.b(x) if both else result


class FlatAndPlain:
    """A flat model and a plain one, after a step that left stale gradients."""

    copies = False  #: whether gradients are copied in hooks instead of added to zeros

    def __init__(self, make: Callable[[], nn.Module] = Net) -> None:
        torch.manual_seed(2)
        self.flat = FlatModel(make())
        if self.copies:
            register_gradient_hooks(self.flat, lambda index, _: self.flat.gradients.ready(index))
            self.flat.copy_when_ready(True)
        self.flat.grads.fill_(9.0)
        torch.manual_seed(2)
        self.plain = make()
        self.flat.begin_step()

    def backward(self, loss_fn: Callable[[nn.Module], Tensor]) -> None:
        loss = loss_fn(self.flat.model)
        self.flat.before_backward()
        torch.autograd.backward(loss)
        self.flat.collect()
        torch.autograd.backward(loss_fn(self.plain))

    def check(self) -> None:
        plain = dict(self.plain.named_parameters())
        for index, slot in enumerate(self.flat.slots):
            grad = plain[slot.name].grad
            assert self.flat.present[index] == (grad is not None), slot.name
            expected = torch.zeros(slot.shape) if grad is None else grad
            dense = expected.to_dense() if expected.is_sparse else expected
            torch.testing.assert_close(slot.view(self.flat.grads), dense, msg=slot.name)
            view = self.flat.parameters[index].grad
            assert view is not None and view.data_ptr() == slot.view(self.flat.grads).data_ptr()


@pytest.fixture(params=["added", "copied"], autouse=True)
def gradient_mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatAndPlain, "copies", request.param == "copied")
    monkeypatch.setattr(COPIED_BYTES, 0)


X = torch.ones(4, 3)


def test_missing_gradient_differs_from_zero() -> None:
    models = FlatAndPlain()
    models.backward(lambda net: net(X, both=False).sum())
    models.check()
    assert models.flat.present.tolist() == [True, True, False, False]
    models.flat.begin_step()
    assert not models.flat.present.any()
    models.backward(lambda net: net(X).sum() * 0.0)
    assert models.flat.present.all()
    assert models.flat.grads.eq(0).all()


def test_step_without_backward_has_zero_gradients() -> None:
    models = FlatAndPlain()
    models.flat.zero_missing()
    assert models.flat.grads.eq(0).all()
    assert not models.flat.present.any()


def test_copied_gradients_are_not_zeroed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(COPIED_BYTES, 6 * 4)  # weights reach this limit, biases do not
    models = FlatAndPlain()
    for slot, parameter in zip(models.flat.slots, models.flat.parameters, strict=True):
        expected = 9.0 if models.copies and slot.size == 6 else 0.0
        assert slot.view(models.flat.grads).eq(expected).all()
        assert (parameter.grad is None) == (expected == 9.0)
    models.backward(lambda net: net(X).sum())
    models.check()


def test_finite_flag_is_reset_by_a_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(COPIED_BYTES, 6 * 4)
    models = FlatAndPlain()
    models.flat.copy_when_ready(models.copies, check_finite=True)
    models.flat.begin_step()
    indices = [index for index, slot in enumerate(models.flat.slots) if slot.size == 6]
    a, b = indices
    models.backward(lambda net: net(X).sum())
    assert [models.flat.gradients.finite(index) for index in indices] == [models.copies] * 2
    grad = models.flat.parameters[a].grad
    assert grad is not None
    grad.mul_(2.0)
    assert [models.flat.gradients.finite(index) for index in indices] == [False, models.copies]
    models.flat.begin_step()
    assert not models.flat.gradients.finite(b)


def test_micro_batches_accumulate() -> None:
    models = FlatAndPlain()
    models.backward(lambda net: net(X, both=False).sum())
    models.backward(lambda net: net(2 * X).square().sum())
    models.check()


def test_autograd_grad_within_the_loss() -> None:
    def penalty(net: nn.Module) -> Tensor:
        x = X.clone().requires_grad_(True)
        [slope] = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return slope.square().sum()

    models = FlatAndPlain()
    models.backward(penalty)
    models.check()


@pytest.mark.filterwarnings("ignore:Using backward")
def test_backward_with_create_graph() -> None:
    models = FlatAndPlain()
    for times in (1, 2):
        loss = models.flat.model(times * X).square().sum()
        models.flat.before_backward()
        torch.autograd.backward(loss, create_graph=True)
        models.flat.collect()
        torch.autograd.backward(models.plain(times * X).square().sum())
    models.check()


def test_sparse_gradients_are_added() -> None:
    models = FlatAndPlain(lambda: nn.Embedding(5, 2, sparse=True))
    models.backward(lambda net: net(torch.tensor([1, 3, 3])).square().sum())
    models.check()


def test_hook_may_replace_or_drop_the_gradient() -> None:
    models = FlatAndPlain()
    for net in (models.flat.model, models.plain):
        assert isinstance(net, Net)

        def halve(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad = parameter.grad / 2

        def drop(parameter: Tensor) -> None:
            parameter.grad = None

        for parameter, hook in ((net.a.weight, halve), (net.b.weight, drop)):
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    models.backward(lambda net: net(X).sum())
    models.check()


def test_hook_registered_by_the_model_may_drop_the_gradient() -> None:
    class Dropping(Net):
        def __init__(self) -> None:
            super().__init__()
            drop = lambda parameter: setattr(parameter, "grad", None)  # noqa: E731
            self.b.weight.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]

    models = FlatAndPlain(Dropping)
    models.backward(lambda net: net(X).sum())
    models.check()


def backward_in_loss(net: nn.Module) -> Tensor:
    torch.autograd.backward(net(X).sum())
    loss: Tensor = net(X).sum()
    return loss


def grad_assigned(net: nn.Module) -> Tensor:
    net.get_parameter("b.bias").grad = torch.ones(2)
    loss: Tensor = net(X).sum()
    return loss


@pytest.mark.parametrize(
    ("loss_fn", "name"), [(backward_in_loss, "a.weight"), (grad_assigned, "b.bias")]
)
def test_rejects_a_backward_within_the_loss(
    loss_fn: Callable[[nn.Module], Tensor], name: str
) -> None:
    with pytest.raises(SpecError, match=rf"'{name}' had a gradient before backward"):
        FlatAndPlain().backward(loss_fn)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_in_forward(set_to_none: bool) -> None:
    def loss_fn(net: nn.Module) -> Tensor:
        if net is models.flat.model:
            net.zero_grad(set_to_none=set_to_none)
        loss: Tensor = net(X).square().sum()
        return loss

    models = FlatAndPlain()
    models.backward(loss_fn)
    models.check()
    if set_to_none:
        models.backward(loss_fn)
        models.check()
    else:
        with pytest.raises(SpecError, match=r"'a\.weight' away between micro-batches"):
            models.backward(loss_fn)


def test_replaced_data_is_copied_into_the_vector() -> None:
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
    ("change", "message"),
    [
        (replace, r"step 3: the parameter 'a\.weight' was replaced or removed"),
        (remove, r"step 3: the parameter 'a\.weight' was replaced or removed"),
        (add, r"step 3: 'c\.weight' was not there when the run began"),
        (share, r"step 3: 'b\.weight' shares the memory of another parameter"),
        (reshape, r"step 3: the data of 'b\.weight' were replaced by float32 \[3, 3\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_rejects_changes_of_the_model(change: Callable[[nn.Module], None], message: str) -> None:
    flat = FlatModel(Net())
    flat.check_layout(1)
    change(flat.model)
    with pytest.raises(SpecError, match=message):
        flat.check_layout(2)


def test_replaced_parameter_is_detected_in_every_step() -> None:
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


def kept_in_an_attribute() -> nn.Module:
    net = Net()
    net.a.anchor = net.a.weight.detach()
    return net


def kept_in_a_list() -> nn.Module:
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
        (kept_in_an_attribute, ("a.weight", "a.anchor"), "read it where it is used"),
        (kept_in_a_list, ("a.weight", "parts.1"), "read it where it is used"),
    ],
)
def test_rejects_tensors_that_share_memory(
    make: Callable[[], nn.Module], names: tuple[str, str], hint: str
) -> None:
    with pytest.raises(SpecError) as caught:
        FlatModel(make())
    [problem] = caught.value.problems
    assert "are different tensors in the same memory" in problem.message
    assert all(repr(name) in problem.message for name in names)
    assert hint in problem.hint


def test_accepts_recomputed_tensors_and_parameters_in_attributes() -> None:
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
    alternating = nn.ParameterList([other[::2], other[1::2]])
    slots = FlatModel(nn.ModuleList([columns, rows, alternating])).slots
    assert [slot.size for slot in slots] == [12] * 6


def test_rejects_a_complex_parameter() -> None:
    net = Net()
    net.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(SpecError, match=r"'w' is torch\.complex64"):
        FlatModel(net)


def test_empty_parameter_has_no_slot() -> None:
    net = Net()
    net.none = nn.Parameter(torch.zeros(0, 3))
    flat = FlatModel(net)
    assert "none" not in [slot.name for slot in flat.slots]
    assert flat.state_dict()["none"].shape == (0, 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_first_non_finite_gradient(value: float) -> None:
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


def test_first_non_finite_skips_gradients_checked_by_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(COPIED_BYTES, 6 * 4)
    flat = FlatModel(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)), owned=True)
    flat.copy_when_ready(True, check_finite=True)
    for index, parameter in enumerate(flat.parameters):
        parameter.grad = torch.ones_like(parameter)
        flat.gradients.ready(index)
    assert [flat.gradients.finite(index) for index in range(4)] == [True, False, True, False]
    views = [slot.view(flat.grads) for slot in flat.slots]
    views[0].data.fill_(torch.inf)  # no version increment: the previous check stays valid
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


def test_dtypes_are_stored_in_segments() -> None:
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
    dtypes = [segment.dtype for segment in flat.layout.segments]
    assert dtypes == ["float32", "float64", "bfloat16"]
    assert [slot.name[0] for slot in flat.slots] == list("aaccbbdd")
    for slot in flat.slots:
        assert slot.offset % 64 == 0
        [segment] = flat.layout.runs(slot.offset, slot.stop)
        assert getattr(torch, segment.dtype) == slot.dtype
        assert torch.equal(slot.view(flat.params), before[slot.name])
    for vector in flat.typed(flat.params):
        vector.fill_(3.0)
    assert all(p.eq(3.0).all() for p in net.parameters())


def test_task_parameters_are_trained() -> None:
    log_var = nn.Parameter(torch.zeros(2))
    flat = FlatModel(Net(), {"task.log_var": log_var})
    assert [slot.name for slot in flat.slots][-1] == "task.log_var"
    assert "task.log_var" not in flat.model.state_dict()
    assert torch.equal(flat.state_dict()["task.log_var"], log_var)
    flat.begin_step()
    loss = (flat.model(X) * torch.exp(log_var)).sum()
    flat.before_backward()
    torch.autograd.backward(loss)
    flat.collect()
    assert flat.present.all()
    flat.params.add_(flat.grads)
    assert log_var.ne(0).all()


def test_task_parameter_of_the_model_has_one_slot() -> None:
    net = Net()
    flat = FlatModel(net, {"task.head": net.get_parameter("a.weight")})
    assert "task.head" not in [slot.name for slot in flat.slots]


def test_rejects_a_task_parameter_with_a_name_of_the_model() -> None:
    net = Net()
    net.task = nn.Linear(2, 2)
    with pytest.raises(SpecError, match=r"a tensor of the name 'task\.bias'"):
        FlatModel(net, {"task.bias": nn.Parameter(torch.zeros(2))})
