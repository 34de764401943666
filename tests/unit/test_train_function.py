"""Train functions under `ring`, compared with a plain loop over the same global batches."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from function_ranks import call_on_ranks, function_job
from plain_functions import (
    SAMPLES,
    Branches,
    Make,
    adagrad,
    adam,
    assert_equal,
    data_of,
    function_of,
    loss_of,
    model_of,
    momentum,
    resumable,
    train_plain,
)
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils.data import (
    DataLoader,
)

import distplat
from distplat.platform.errors import NonFiniteError, SpecError
from distplat.platform.progress import StepReport
from distplat.strategies.function.gradient_average import compares_after


@pytest.mark.sweep(3)
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("make", [adam, momentum, adagrad])
def test_parameters_match_plain_loop(world: int, make: Make) -> None:
    run = call_on_ranks(function_of(make, world), world)
    for rank in range(world):
        assert_equal(run.trained[rank], train_plain(make))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_clipping_uses_averaged_gradients(world: int) -> None:
    run = call_on_ranks(function_of(momentum, world, clip=0.1), world)
    assert_equal(run.trained[0], train_plain(momentum, clip=0.1))


@pytest.mark.parametrize("overlap", [True, False])
def test_zero_grad_without_set_to_none_matches_plain_loop(overlap: bool) -> None:
    job = function_job(2, strategy={"name": "ring", "overlap": overlap, "bucket_mb": 1e-5})
    run = call_on_ranks(function_of(adam, 2, set_to_none=False), job=job)
    assert_equal(run.trained[1], train_plain(adam))


@pytest.mark.parametrize("world", [1, 2])
def test_no_sync_accumulates_gradients(world: int) -> None:
    def train(config: Mapping[str, Any]) -> None:
        parts = SAMPLES // world // 2
        model = model_of()
        optimizer = momentum(model.parameters())
        loader = DataLoader(data_of(), batch_size=2)
        model, optimizer, loader = distplat.prepare(model, optimizer, loader)
        for number, batch in enumerate(loader, 1):
            if number < parts:
                with distplat.no_sync():
                    backward(loss_of(model, batch) / parts)
            else:
                backward(loss_of(model, batch) / parts)
        optimizer.step()

    model = model_of()
    optimizer = momentum(model.parameters())
    backward(loss_of(model, data_of()[:]))
    optimizer.step()
    assert_equal(call_on_ranks(train, world).trained[0], model.state_dict())


def test_each_backward_adds_its_average_as_in_ddp() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(model_of())
        rank = distplat.get_context().rank
        for part in (0, 2):
            backward(loss_of(model, data_of()[part + rank : part + rank + 1]))
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    model = model_of()
    for part in (0, 2):
        backward(loss_of(model, data_of()[part : part + 2]))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_equal(call_on_ranks(train, 2).trained[1], model.state_dict())


def test_parameter_without_gradient_is_not_updated() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = Branches()
        start = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        model, optimizer = distplat.prepare(model, optimizer)
        start = {k: v.clone() for k, v in model.state_dict().items()}
        for step in range(3):
            rank = distplat.get_context().rank
            backward(model(torch.ones(2, 4).double(), both=rank == 1 and step == 1).sum())
            has_gradient = [branch.weight.grad is not None for branch in model.branches]
            assert has_gradient == [True, step == 1, False]
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(model.branches[2].weight, start["branches.2.weight"])
        mean = torch.full((1, 4), 1.0).double()  # average of two ones of one rank over two ranks
        before = start["branches.1.weight"]
        torch.testing.assert_close(
            model.branches[1].weight.detach(), before - 0.1 * (mean + 0.1 * before)
        )

    call_on_ranks(train, 2)


def test_gan_with_two_models_matches_plain_loop() -> None:
    def step(g: nn.Module, d: nn.Module, og: Any, od: Any, batch: Tensor) -> None:
        backward(d(torch.cat([batch, g(batch).detach()])).square().mean())
        od.step()
        od.zero_grad()
        backward(d(g(batch)).mean())
        og.step()
        og.zero_grad()
        od.zero_grad()

    def make() -> tuple[nn.Module, nn.Module, Any, Any]:
        g = nn.Linear(4, 4).double()
        nn.init.eye_(g.weight)
        nn.init.zeros_(g.bias)
        d = model_of()
        return g, d, adam(g.parameters()), momentum(d.parameters())

    def train(config: Mapping[str, Any]) -> None:
        g, d, og, od = distplat.prepare(*make())
        rank = distplat.get_context().rank
        for number in range(3):
            step(g, d, og, od, data_of().tensors[0][4 * number + 2 * rank :][:2])

    g, d, og, od = make()
    for number in range(3):
        step(g, d, og, od, data_of().tensors[0][4 * number :][:4])
    expected = {f"0.{k}": v for k, v in g.state_dict().items()}
    expected |= {f"1.{k}": v for k, v in d.state_dict().items()}
    assert_equal(call_on_ranks(train, 2).trained[1], expected)


def test_frozen_model_is_broadcast_from_rank_0() -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        teacher = model_of(rank + 5).requires_grad_(False)
        model = model_of()
        optimizer = momentum(model.parameters())
        model, teacher, optimizer = distplat.prepare(model, teacher, optimizer)
        inputs = data_of().tensors[0][2 * rank :][:2]
        backward((model(inputs) - teacher(inputs)).square().mean())
        optimizer.step()

    model, teacher = model_of(), model_of(5)
    optimizer = momentum(model.parameters())
    inputs = data_of().tensors[0][:4]
    backward((model(inputs) - teacher(inputs).detach()).square().mean())
    optimizer.step()
    assert_equal(call_on_ranks(train, 2).trained[1], model.state_dict())


def test_buffers_are_broadcast_from_rank_0() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)))
        backward(model(torch.randn(4, 2) + distplat.get_context().rank).sum())

    first, second = call_on_ranks(train, 2).trained
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def diverging_updates(variant: str) -> Callable[[Any], None]:
    """Return a train function that is correct on one rank, and diverges on several ranks."""

    def train(config: Any) -> None:
        model, head = model_of(), nn.Linear(1, 1, bias=False).double()
        loader = distplat.prepare(DataLoader(data_of(), batch_size=6))
        if variant != "nothing prepared":
            model = distplat.prepare(model)
        parameters = [*model.parameters(), *(head.parameters() if variant == "a head" else ())]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for step, batch in enumerate(loader):
            if variant == "autograd.grad":
                gradients = torch.autograd.grad(loss_of(model, batch), parameters)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.sub_(gradient, alpha=0.1)
                continue
            if variant == "a head later" and step == 2:
                optimizer.add_param_group({"params": [*head.parameters()]})
            backward((head(model(batch[0])) - batch[1]).square().mean())
            if variant == "written":
                with torch.no_grad():
                    parameters[0].add_(distplat.get_context().rank)
            optimizer.step()
            optimizer.zero_grad()

    return train


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        (
            "nothing prepared",
            r"would update 4 parameters .* \[6, 4\], \[6\], \[1, 6\], \.\.\.: each",
        ),
        ("a head", r"SGD\.step\(\) would update a parameter .* shape \[1, 1\]: each worker"),
        ("a head later", r"SGD\.step\(\) would update a parameter .* shape \[1, 1\]: each worker"),
        ("autograd.grad", r"at the end '0\.weight' of rank 1 is not that of rank 0"),
        ("written", r"at backward 3 '0\.weight' of rank 1 is not that of rank 0"),
    ],
)
def test_diverging_updates_are_rejected(variant: str, text: str) -> None:
    call_on_ranks(diverging_updates(variant), 1)  # valid on one rank
    with pytest.raises((SpecError, ValueError), match=text):
        call_on_ranks(diverging_updates(variant), 2)


def test_parameters_are_compared_in_long_loops_too() -> None:
    compared = [count for count in range(100_000) if compares_after(count)]
    assert compared == [3, 30, 300, 3_000, 30_000]


@pytest.mark.slow
def test_late_divergence_is_found_before_the_end() -> None:
    def train(config: Any) -> None:
        model = distplat.prepare(model_of())
        rank = distplat.get_context().rank
        for number in range(4_000):
            backward(model(torch.ones(1, 4).double()).sum())
            model.zero_grad()
            if number == 1_000:
                with torch.no_grad():
                    model[0].weight += rank

    with pytest.raises(ValueError, match=r"at backward 3000 '0\.weight' of rank 1 is not that"):
        call_on_ranks(train, 2)


def test_optimizers_of_other_threads_are_ignored() -> None:
    """A test or a notebook may train another model during a run in memory."""
    barrier = threading.Barrier(3, timeout=30)

    def train(config: Any) -> None:
        distplat.prepare(model_of())
        barrier.wait()
        barrier.wait()

    thread = threading.Thread(target=call_on_ranks, args=(train, 2))
    thread.start()
    barrier.wait()
    other = nn.Linear(1, 1)
    backward(other(torch.ones(1, 1)).sum())
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    barrier.wait()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_gradients_from_before_prepare_are_kept(strategy: str) -> None:
    def steps(model: nn.Module, optimizer: Any) -> None:
        inputs, targets = data_of().tensors
        for _ in range(2):
            backward((model(inputs) - targets).square().mean())
            optimizer.step()

    def make() -> tuple[nn.Module, Any]:
        model = model_of()
        model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, number)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    reference = make()
    steps(*reference)
    job = function_job(1 if strategy == "ps-async" else 2, strategy=strategy)
    actual = call_on_ranks(lambda config: steps(*distplat.prepare(*make())), job=job).trained[0]
    for name, value in reference[0].state_dict().items():
        assert torch.allclose(actual[name], value, rtol=1e-10, atol=1e-12), name


def test_steps_and_losses_are_those_of_rank_0() -> None:
    def train(config: Mapping[str, Any]) -> None:
        loader = distplat.prepare(DataLoader(data_of(), batch_size=4))
        eval_loader = distplat.prepare(DataLoader(data_of(), batch_size=4))
        for number, _ in enumerate(loader):
            with torch.no_grad():  # samples of an evaluation are not counted
                assert len([*eval_loader]) == 6
            rank = distplat.get_context().rank
            figures = {"loss": number + 10 * rank, "accuracy": torch.tensor(0.5)}
            distplat.report(figures)

    reports = [r for r in call_on_ranks(train, 2).reports if isinstance(r, StepReport)]
    assert [report.step for report in reports] == [*range(6)]
    assert [report.loss for report in reports] == [*range(6)]
    assert {report.samples for report in reports} == {8}
    assert reports[0].figures == {"accuracy": 0.5}


def test_resumed_run_is_bit_identical() -> None:
    reference = call_on_ranks(resumable(4), 2)
    half = call_on_ranks(resumable(2), 2)
    assert sorted(half.checkpoints) == [1, 2]
    resumed = call_on_ranks(resumable(4), 2, saved=half.checkpoints[2])
    for name, value in reference.trained[0].items():
        assert torch.equal(resumed.trained[1][name], value), name
    assert [report.step for report in resumed.reports] == [2, 3]


def test_context_has_world_and_local_ranks() -> None:
    contexts: list[tuple[int, ...]] = []

    def train() -> None:
        context = distplat.get_context()
        distplat.barrier()
        contexts.append(
            (
                context.get_world_rank(),
                context.get_world_size(),
                context.get_local_rank(),
                context.get_local_world_size(),
                context.is_main_process,
            )
        )

    call_on_ranks(train, 3, nodes=lambda rank: "a" if rank == 1 else "b")  # type: ignore[arg-type]
    assert sorted(contexts) == [(0, 3, 0, 2, True), (1, 3, 0, 1, False), (2, 3, 1, 2, False)]


@pytest.mark.parametrize("workers", [1, 2])
def test_infinite_gradient_fails_the_run_unless_ignored(workers: int) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(model_of())
        optimizer = momentum(model.parameters())
        backward(loss_of(model, data_of()[:2]) * float("inf"))
        optimizer.step()
        assert config, "the step raises"

    with pytest.raises(NonFiniteError, match="weight"):
        call_on_ranks(train, workers)
    job = function_job(workers, failure={"non_finite": "ignore"}, task_args={"ignored": True})
    call_on_ranks(train, job=job)


def test_infinite_gradient_of_a_manual_update_fails_the_run() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(model_of())
        backward(loss_of(model, data_of()[:2]) * float("inf"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad)

    with pytest.raises((NonFiniteError, ValueError)):
        call_on_ranks(train, 2)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_infinite_gradient_of_one_model_does_not_block_another(strategy: str) -> None:
    """The gradients of `second` are reset before its step."""

    def train(config: Mapping[str, Any]) -> None:
        first, second = distplat.prepare(model_of(), nn.Linear(1, 1).double())
        first_optimizer, second_optimizer = (
            momentum(first.parameters()),
            momentum(second.parameters()),
        )
        inputs = data_of().tensors[0][:2]
        backward(second(first(inputs).detach()).sum() * float("inf"))
        backward(first(inputs).sum())
        first_optimizer.step()
        second_optimizer.zero_grad()
        backward(second(first(inputs)).sum())
        second_optimizer.step()

    call_on_ranks(train, job=function_job(2, strategy=strategy))


def model_with_complex_buffer() -> nn.Module:
    model = model_of()
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))
    return model


UNSUPPORTED: list[tuple[Callable[[], Any], str]] = [
    (lambda: DataLoader(data_of(), batch_size=None), "batch_size=None"),
    (lambda: 3, "prepare() got a int"),
    (
        model_with_complex_buffer,
        "a model that prepare() got has the state 'phases' of type complex128",
    ),
]


@pytest.mark.parametrize(("make", "text"), UNSUPPORTED)
def test_prepare_rejects_unsupported_objects(make: Callable[[], Any], text: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(make())

    with pytest.raises(SpecError) as caught:
        call_on_ranks(train)
    assert text in str(caught.value)


def test_models_that_differ_between_ranks_are_rejected() -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(nn.Linear(2, 1 + distplat.get_context().rank // 2))

    with pytest.raises(SpecError, match="another model on rank 2"):
        call_on_ranks(train, 3)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"a": object()},
        {"a": [{1.5: 2}]},
        {"a": torch.zeros(1, dtype=torch.complex128)},
        {"a": torch.eye(2).to_sparse()},
        {"a": np.array(["x"])},
    ],
    ids=["object", "key", "complex", "sparse", "texts"],
)
def test_unsupported_checkpoint_values_are_rejected(checkpoint: Any) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.report({"loss": 1.0}, checkpoint=checkpoint)

    with pytest.raises(SpecError, match=r"checkpoint\['a'\]"):
        call_on_ranks(train)


def test_report_rejects_a_number_without_a_name() -> None:
    with pytest.raises(SpecError, match="got a float: it takes numbers by name"):
        call_on_ranks(lambda config: distplat.report(0.5))  # type: ignore[arg-type]


def test_api_outside_a_run_is_an_error() -> None:
    for function in (distplat.get_checkpoint, distplat.barrier, distplat.get_context):
        with pytest.raises(SpecError, match="train function"):
            function()


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_all_ranks_stop_at_the_same_step(strategy: str) -> None:
    steps = [0, 0, 0]

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        model = distplat.prepare(model_of())
        while not distplat.should_stop():
            backward(loss_of(model, data_of()[:2]))
            steps[rank] += 1

    def ending(rank: int) -> bool:
        return steps[rank] >= (3 if rank == 0 else 1)

    call_on_ranks(train, job=function_job(3, strategy=strategy), ending=ending)
    assert steps == [3, 3, 3]


def test_ps_async_stops_each_rank_on_its_own() -> None:
    steps = [0, 0]

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        while not distplat.should_stop():
            steps[rank] += 1

    job = function_job(2, strategy="ps-async")
    call_on_ranks(train, job=job, ending=lambda rank: steps[rank] > 3 * rank)
    assert steps == [1, 4]
