"""Gradients that a train function keeps over its next backward, as in plain torch."""

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
        for one in model.parameters():
            one.copy_(torch.randn(one.shape, generator=generator))
    return model


Parameters = list[nn.Parameter]
Step = Callable[[nn.Module, Tensor, Tensor, Parameters], None]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = (model(inputs) - targets).square().mean()
    return loss


def of_two_losses(model: nn.Module, inputs: Tensor, targets: Tensor, every: Parameters) -> None:
    """Keep the gradients of one loss while another one's are computed (PCGrad, GradNorm)."""
    backward(loss_of(model, inputs, targets))
    first = [one.grad for one in every]
    model.zero_grad()
    backward(model(inputs).square().mean())
    for one, kept in zip(every, first, strict=True):
        assert one.grad is not None and kept is not None
        one.grad = one.grad + (2.0 if (one.grad * kept).sum() > 0 else 0.5) * kept


def of_parts(model: nn.Module, inputs: Tensor, targets: Tensor, every: Parameters) -> None:
    """Keep views of what a first part of the batch gave."""
    half = len(inputs) // 2
    backward(loss_of(model, inputs[:half], targets[:half]))
    kept = [one.grad.detach().view(-1) for one in every if one.grad is not None]
    model.zero_grad()
    backward(loss_of(model, inputs[half:], targets[half:]))
    for one, before in zip(every, kept, strict=True):
        assert one.grad is not None
        one.grad += before.view(one.shape)


def of_graphs(model: nn.Module, inputs: Tensor, targets: Tensor, every: Parameters) -> None:
    """Add a penalty on the gradients, which is differentiated again."""
    backward(loss_of(model, inputs, targets), create_graph=True)
    norm = torch.stack([one.grad.square().sum() for one in every if one.grad is not None]).sum()
    model.zero_grad()
    backward(loss_of(model, inputs, targets) + 0.1 * norm)


def trained(step: Step, world: int, prepare: Callable[..., Any]) -> nn.Module:
    model: nn.Module = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(data(), batch_size=BATCH // world)
    model, optimizer, loader = prepare(model, optimizer, loader)
    every = list(model.parameters())
    for _ in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad()
            step(model, inputs, targets, every)
            for one in every:
                one.grad = None if one.grad is None else one.grad.detach()
            optimizer.step()
    return model


@pytest.mark.parametrize("strategy", [*STRATEGIES, "ps-sync"], ids=str)
@pytest.mark.parametrize("step", [of_two_losses, of_parts])
def test_they_stay_as_they_are(step: Step, strategy: Any) -> None:
    def train(config: Mapping[str, Any]) -> None:
        trained(step, 2, distplat.prepare)

    run = call_on_ranks(train, job=function_job(2, strategy=strategy))
    wanted = trained(step, 1, lambda *things: things).state_dict()
    for rank in range(2):
        for name, value in wanted.items():
            torch.testing.assert_close(run.trained[rank][name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_gradients_with_a_graph_are_told_where_they_are_averaged(strategy: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        trained(of_graphs, distplat.get_context().get_world_size(), distplat.prepare)

    alone = call_on_ranks(train, job=function_job(1, strategy=strategy)).trained[0]
    for name, value in trained(of_graphs, 1, lambda *things: things).state_dict().items():
        torch.testing.assert_close(alone[name], value, rtol=1e-9, atol=1e-9)
    with pytest.raises(SpecError, match=r"(?s)'0.weight'.grad has no graph.*torch.autograd.grad"):
        call_on_ranks(train, job=function_job(2, strategy=strategy))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_those_of_before_a_step_are_there_after_the_next_backward(strategy: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(model_of())
        inputs, targets = data()[:BATCH]
        backward(loss_of(model, inputs, targets))
        kept = [one.grad for one in model.parameters()]
        copies = [one.clone() for one in kept if one is not None]
        model.zero_grad()
        backward(loss_of(model, 2 * inputs, targets))
        for one, copy in zip(kept, copies, strict=True):
            torch.testing.assert_close(one, copy, rtol=0, atol=0)

    call_on_ranks(train, job=function_job(2, strategy=strategy))


def test_a_hook_behind_ours_changes_what_is_sent_or_is_told() -> None:
    def train(late: bool) -> Callable[[Mapping[str, Any]], object]:
        def halve(one: Tensor) -> None:
            assert one.grad is not None
            one.grad.mul_(0.5)

        def body(config: Mapping[str, Any]) -> None:
            model = distplat.prepare(model_of())
            place = 2 if late else 0
            model[place].weight.register_post_accumulate_grad_hook(halve)
            for _ in range(4):
                backward(loss_of(model, *data()[:BATCH]))
                whole = torch.autograd.grad(loss_of(model, *data()[:BATCH]), model[place].weight)
                torch.testing.assert_close(model[place].weight.grad, 0.5 * whole[0])
                model.zero_grad()

        return body

    def told(late: bool, name: str = "ring", **options: Any) -> None:
        job = function_job(2, strategy={"name": name, **options})
        call_on_ranks(train(late), job=job)

    for late in (False, True):
        told(late, overlap=False)
        told(late, "ps-sync")
    with pytest.raises(SpecError, match=r"'2.weight' in backward, after it was sent"):
        told(True, bucket_mb=0.0001)


def look(_: Tensor) -> None:
    """Look at a parameter, and change nothing."""


HOOKS: dict[str, Callable[[Any], object]] = {
    "a hook": lambda model: model[0].weight.register_hook(lambda one: one.clamp(-0.1, 0.1)),
    "a post-accumulate hook": lambda model: model[2].bias.register_post_accumulate_grad_hook(look),
    "none": lambda model: model[1].register_full_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("strategy", "workers"), [("ring", 2), ("ps-sync", 2), ("ring", 1)])
def test_a_hook_that_sees_a_workers_gradient_is_warned_of_once(
    kind: str, late: bool, strategy: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of()
        if not late:
            HOOKS[kind](model)
        model = distplat.prepare(model)
        if late:
            HOOKS[kind](model)
        for _ in range(2):
            backward(loss_of(model, *data()[:BATCH]))

    call_on_ranks(train, job=function_job(workers, strategy=strategy))
    said = f"{kind} on the parameter" if kind != "none" else "on the parameter"
    assert caplog.text.count(said) == (workers > 1 and kind != "none")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_layer_and_its_model_are_prepared_in_one_call(strategy: Any) -> None:
    def train(config: Mapping[str, Any], *, together: bool = True) -> None:
        model = model_of()
        if together:
            _, model = distplat.prepare(model.get_submodule("0"), model)
        else:
            distplat.prepare(model.get_submodule("0"))
            model = distplat.prepare(model)
        rank, whole = distplat.get_context().rank, data()[:BATCH]
        for _ in range(3):
            wanted = torch.autograd.grad(loss_of(model, *whole), [*model.parameters()])
            backward(loss_of(model, *(one[rank::2] for one in whole)))
            for one, grad in zip(model.parameters(), wanted, strict=True):
                torch.testing.assert_close(one.grad, grad)
            model.zero_grad()

    job = function_job(2, strategy=strategy)
    call_on_ranks(train, job=job)
    apart = partial(train, together=False)
    if strategy == "ring":
        with pytest.raises(SpecError, match="to one call of prepare"):
            call_on_ranks(apart, job=job)


def test_gradients_that_stay_sparse_are_told() -> None:
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
