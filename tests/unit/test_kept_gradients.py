"""Gradients that a train function keeps across its next backward, as in plain torch."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks, function_job
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils.data import DataLoader, TensorDataset

import distplat
from distplat.platform.errors import SpecError

SAMPLES, BATCH = 24, 12
STRATEGIES = ["ring", {"name": "ring", "bucket_mb": 0.001}, {"name": "ring", "overlap": False}]


def data() -> TensorDataset:
    inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1)).double()
    return TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())


def model_of() -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


Parameters = list[nn.Parameter]
Step = Callable[[nn.Module, Tensor, Tensor, Parameters], None]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = (model(inputs) - targets).square().mean()
    return loss


def combine_two_losses(
    model: nn.Module, inputs: Tensor, targets: Tensor, parameters: Parameters
) -> None:
    """Keep the gradients of one loss while those of another are computed (PCGrad, GradNorm)."""
    backward(loss_of(model, inputs, targets))
    first = [parameter.grad for parameter in parameters]
    model.zero_grad()
    backward(model(inputs).square().mean())
    for parameter, kept in zip(parameters, first, strict=True):
        assert parameter.grad is not None and kept is not None
        parameter.grad = parameter.grad + (2.0 if (parameter.grad * kept).sum() > 0 else 0.5) * kept


def combine_two_halves(
    model: nn.Module, inputs: Tensor, targets: Tensor, parameters: Parameters
) -> None:
    """Keep views of the gradients of the first half of the batch."""
    half = len(inputs) // 2
    backward(loss_of(model, inputs[:half], targets[:half]))
    views = [p.grad.detach().view(-1) for p in parameters if p.grad is not None]
    model.zero_grad()
    backward(loss_of(model, inputs[half:], targets[half:]))
    for parameter, view in zip(parameters, views, strict=True):
        assert parameter.grad is not None
        parameter.grad += view.view(parameter.shape)


def gradient_penalty(
    model: nn.Module, inputs: Tensor, targets: Tensor, parameters: Parameters
) -> None:
    """Add a penalty on the gradients, which is differentiated again."""
    backward(loss_of(model, inputs, targets), create_graph=True)
    norm = torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None]).sum()
    model.zero_grad()
    backward(loss_of(model, inputs, targets) + 0.1 * norm)


def train_with(step: Step, world: int, prepare: Callable[..., Any]) -> nn.Module:
    model: nn.Module = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(data(), batch_size=BATCH // world)
    model, optimizer, loader = prepare(model, optimizer, loader)
    parameters = list(model.parameters())
    for _ in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad()
            step(model, inputs, targets, parameters)
            for parameter in parameters:
                parameter.grad = None if parameter.grad is None else parameter.grad.detach()
            optimizer.step()
    return model


@pytest.mark.parametrize("strategy", [*STRATEGIES, "ps-sync"], ids=str)
@pytest.mark.parametrize("step", [combine_two_losses, combine_two_halves])
def test_kept_gradients_are_not_overwritten(step: Step, strategy: Any) -> None:
    def train(config: Mapping[str, Any]) -> None:
        train_with(step, 2, distplat.prepare)

    run = call_on_ranks(train, job=function_job(2, strategy=strategy))
    expected = train_with(step, 1, lambda *objects: objects).state_dict()
    for rank in range(2):
        for name, value in expected.items():
            torch.testing.assert_close(run.trained[rank][name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_averaged_gradients_with_a_graph_are_refused(strategy: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        train_with(gradient_penalty, distplat.get_context().get_world_size(), distplat.prepare)

    single_rank = call_on_ranks(train, job=function_job(1, strategy=strategy)).trained[0]
    for name, value in (
        train_with(gradient_penalty, 1, lambda *objects: objects).state_dict().items()
    ):
        torch.testing.assert_close(single_rank[name], value, rtol=1e-9, atol=1e-9)
    with pytest.raises(SpecError, match=r"(?s)'0.weight'.grad has no graph.*torch.autograd.grad"):
        call_on_ranks(train, job=function_job(2, strategy=strategy))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_gradients_before_the_first_step_survive_the_next_backward(strategy: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(model_of())
        inputs, targets = data()[:BATCH]
        backward(loss_of(model, inputs, targets))
        gradients = [parameter.grad for parameter in model.parameters()]
        copies = [gradient.clone() for gradient in gradients if gradient is not None]
        model.zero_grad()
        backward(loss_of(model, 2 * inputs, targets))
        for gradient, copy in zip(gradients, copies, strict=True):
            torch.testing.assert_close(gradient, copy, rtol=0, atol=0)

    call_on_ranks(train, job=function_job(2, strategy=strategy))


def test_user_hook_changes_the_sent_gradient_or_is_refused() -> None:
    def train(late: bool) -> Callable[[Mapping[str, Any]], object]:
        def halve(parameter: Tensor) -> None:
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)

        def body(config: Mapping[str, Any]) -> None:
            model = distplat.prepare(model_of())
            layer_index = 2 if late else 0
            model[layer_index].weight.register_post_accumulate_grad_hook(halve)
            for _ in range(4):
                backward(loss_of(model, *data()[:BATCH]))
                gradients = torch.autograd.grad(
                    loss_of(model, *data()[:BATCH]), model[layer_index].weight
                )
                torch.testing.assert_close(model[layer_index].weight.grad, 0.5 * gradients[0])
                model.zero_grad()

        return body

    def run_with_hook(late: bool, name: str = "ring", **options: Any) -> None:
        job = function_job(2, strategy={"name": name, **options})
        call_on_ranks(train(late), job=job)

    for late in (False, True):
        run_with_hook(late, overlap=False)
        run_with_hook(late, "ps-sync")
    with pytest.raises(SpecError, match=r"'2.weight' in backward, after it was sent"):
        run_with_hook(True, bucket_mb=0.0001)


def no_op(_: Tensor) -> None:
    """A hook without an effect."""


HOOKS: dict[str, Callable[[Any], object]] = {
    "a hook": lambda model: model[0].weight.register_hook(
        lambda gradient: gradient.clamp(-0.1, 0.1)
    ),
    "a post-accumulate hook": lambda model: model[2].bias.register_post_accumulate_grad_hook(no_op),
    "none": lambda model: model[1].register_full_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("hook_name", HOOKS)
@pytest.mark.parametrize(("strategy", "workers"), [("ring", 2), ("ps-sync", 2), ("ring", 1)])
def test_hook_on_a_local_gradient_warns_once(
    hook_name: str, late: bool, strategy: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of()
        if not late:
            HOOKS[hook_name](model)
        model = distplat.prepare(model)
        if late:
            HOOKS[hook_name](model)
        for _ in range(2):
            backward(loss_of(model, *data()[:BATCH]))

    call_on_ranks(train, job=function_job(workers, strategy=strategy))
    warning = f"{hook_name} on the parameter" if hook_name != "none" else "on the parameter"
    assert caplog.text.count(warning) == (workers > 1 and hook_name != "none")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layer_and_its_model_require_one_prepare_call(strategy: Any) -> None:
    def train(config: Mapping[str, Any], *, one_call: bool = True) -> None:
        model = model_of()
        if one_call:
            _, model = distplat.prepare(model.get_submodule("0"), model)
        else:
            distplat.prepare(model.get_submodule("0"))
            model = distplat.prepare(model)
        rank, batch = distplat.get_context().rank, data()[:BATCH]
        for _ in range(3):
            expected = torch.autograd.grad(loss_of(model, *batch), [*model.parameters()])
            backward(loss_of(model, *(tensor[rank::2] for tensor in batch)))
            for parameter, gradient in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, gradient)
            model.zero_grad()

    job = function_job(2, strategy=strategy)
    call_on_ranks(train, job=job)
    separate_calls = partial(train, one_call=False)
    if strategy == "ring":
        with pytest.raises(SpecError, match="to one call of prepare"):
            call_on_ranks(separate_calls, job=job)


def test_sparse_adam_is_refused_with_several_workers() -> None:
    def train(config: Mapping[str, Any]) -> None:
        table = nn.Embedding(8, 2, sparse=True)
        optimizer = torch.optim.SparseAdam(table.parameters())
        table, optimizer = distplat.prepare(table, optimizer)
        backward(table(torch.tensor([1, 2])).sum())
        optimizer.step()

    call_on_ranks(train, 1)
    for strategy in ("ring", "ps-sync"):
        with pytest.raises(SpecError, match="SparseAdam needs sparse gradients"):
            call_on_ranks(train, job=function_job(2, strategy=strategy))
