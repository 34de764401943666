"""A train function under `ring` against a plain loop over the same global batches."""

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
    plain,
    resumable,
)
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils.data import (
    DataLoader,
)

import distplat
from distplat.platform.errors import NonFiniteError, SpecError
from distplat.platform.progress import StepReport


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("make", [adam, momentum, adagrad])
def test_parameters_are_those_of_a_plain_loop(world: int, make: Make) -> None:
    run = call_on_ranks(function_of(make, world), world)
    for rank in range(world):
        assert_equal(run.trained[rank], plain(make))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_clipping_sees_averaged_gradients(world: int) -> None:
    run = call_on_ranks(function_of(momentum, world, clip=0.1), world)
    assert_equal(run.trained[0], plain(momentum, clip=0.1))


@pytest.mark.parametrize("overlap", [True, False])
def test_gradients_may_be_kept_and_set_to_zero(overlap: bool) -> None:
    job = function_job(2, strategy={"name": "ring", "overlap": overlap, "bucket_mb": 1e-5})
    run = call_on_ranks(function_of(adam, 2, set_to_none=False), job=job)
    assert_equal(run.trained[1], plain(adam))


@pytest.mark.parametrize("world", [1, 2])
def test_no_sync_accumulates(world: int) -> None:
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


def test_a_parameter_without_gradient_rests() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = Branches()
        start = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        model, optimizer = distplat.prepare(model, optimizer)
        start = {k: v.clone() for k, v in model.state_dict().items()}
        for step in range(3):
            rank = distplat.get_context().rank
            backward(model(torch.ones(2, 4).double(), both=rank == 1 and step == 1).sum())
            has = [one.weight.grad is not None for one in model.branches]
            assert has == [True, step == 1, False]
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(model.branches[2].weight, start["branches.2.weight"])
        mean = torch.full((1, 4), 1.0).double()  # two samples of ones on one of two ranks
        before = start["branches.1.weight"]
        torch.testing.assert_close(
            model.branches[1].weight.detach(), before - 0.1 * (mean + 0.1 * before)
        )

    call_on_ranks(train, 2)


def test_two_models_as_a_gan_has_them() -> None:
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
    wanted = {f"0.{k}": v for k, v in g.state_dict().items()}
    wanted |= {f"1.{k}": v for k, v in d.state_dict().items()}
    assert_equal(call_on_ranks(train, 2).trained[1], wanted)


def test_a_frozen_model_is_rank_0s_and_a_step_has_its_help() -> None:
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


def test_buffers_are_those_of_rank_0() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)))
        backward(model(torch.randn(4, 2) + distplat.get_context().rank).sum())

    first, second = call_on_ranks(train, 2).trained
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def strange_updates(kind: str) -> Callable[[Any], None]:
    """Loops that are right on one process, and would train other models on each of several."""

    def train(config: Any) -> None:
        model, head = model_of(), nn.Linear(1, 1, bias=False).double()
        loader = distplat.prepare(DataLoader(data_of(), batch_size=6))
        if kind != "nothing prepared":
            model = distplat.prepare(model)
        parameters = [*model.parameters(), *(head.parameters() if kind == "a head" else ())]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for step, batch in enumerate(loader):
            if kind == "autograd.grad":
                found = torch.autograd.grad(loss_of(model, batch), parameters)
                with torch.no_grad():
                    for one, gradient in zip(parameters, found, strict=True):
                        one.sub_(gradient, alpha=0.1)
                continue
            if kind == "a head later" and step == 2:
                optimizer.add_param_group({"params": [*head.parameters()]})
            backward((head(model(batch[0])) - batch[1]).square().mean())
            if kind == "written":
                with torch.no_grad():
                    parameters[0].add_(distplat.get_context().rank)
            optimizer.step()
            optimizer.zero_grad()

    return train


@pytest.mark.parametrize(
    ("kind", "text"),
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
def test_ranks_that_would_train_models_of_their_own_are_told(kind: str, text: str) -> None:
    call_on_ranks(strange_updates(kind), 1)  # nobody else is there: all of it is right
    with pytest.raises((SpecError, ValueError), match=text):
        call_on_ranks(strange_updates(kind), 2)


def test_optimizers_of_other_threads_are_not_looked_at() -> None:
    """What a test or a notebook trains beside a run in memory is its own."""
    met = threading.Barrier(3, timeout=30)

    def train(config: Any) -> None:
        distplat.prepare(model_of())
        met.wait()
        met.wait()

    runs = threading.Thread(target=call_on_ranks, args=(train, 2))
    runs.start()
    met.wait()
    mine = nn.Linear(1, 1)
    backward(mine(torch.ones(1, 1)).sum())
    torch.optim.SGD(mine.parameters(), lr=1.0).step()
    met.wait()
    runs.join(30)
    assert not runs.is_alive()


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_gradients_from_before_prepare_count_as_in_one_process(strategy: str) -> None:
    def steps(model: nn.Module, optimizer: Any) -> None:
        inputs, targets = data_of().tensors
        for _ in range(2):
            backward((model(inputs) - targets).square().mean())
            optimizer.step()

    def made() -> tuple[nn.Module, Any]:
        model = model_of()
        model.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
        for number, one in enumerate(model.parameters()):
            one.grad = torch.full_like(one, number)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    whole = made()
    steps(*whole)
    job = function_job(1 if strategy == "ps-async" else 2, strategy=strategy)
    found = call_on_ranks(lambda config: steps(*distplat.prepare(*made())), job=job).trained[0]
    for name, value in whole[0].state_dict().items():
        assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-12), name


def test_steps_are_what_rank_0_reports() -> None:
    def train(config: Mapping[str, Any]) -> None:
        loader = distplat.prepare(DataLoader(data_of(), batch_size=4))
        every = distplat.prepare(DataLoader(data_of(), batch_size=4))
        for number, _ in enumerate(loader):
            with torch.no_grad():  # an evaluation trains on no sample
                assert len([*every]) == 6
            rank = distplat.get_context().rank
            figures = {"loss": number + 10 * rank, "accuracy": torch.tensor(0.5)}
            distplat.report(figures)

    reports = [one for one in call_on_ranks(train, 2).reports if isinstance(one, StepReport)]
    assert [one.step for one in reports] == [*range(6)]
    assert [one.loss for one in reports] == [*range(6)]
    assert {one.samples for one in reports} == {8}
    assert reports[0].figures == {"accuracy": 0.5}


def test_it_goes_on_from_a_checkpoint_with_the_same_bits() -> None:
    whole = call_on_ranks(resumable(4), 2)
    half = call_on_ranks(resumable(2), 2)
    assert sorted(half.checkpoints) == [1, 2]
    rest = call_on_ranks(resumable(4), 2, saved=half.checkpoints[2])
    for name, value in whole.trained[0].items():
        assert torch.equal(rest.trained[1][name], value), name
    assert [one.step for one in rest.reports] == [2, 3]


def test_the_context_tells_ranks_of_a_node() -> None:
    seen: list[tuple[int, ...]] = []

    def train() -> None:
        context = distplat.get_context()
        distplat.barrier()
        seen.append(
            (
                context.get_world_rank(),
                context.get_world_size(),
                context.get_local_rank(),
                context.get_local_world_size(),
                context.is_main_process,
            )
        )

    call_on_ranks(train, 3, nodes=lambda rank: "a" if rank == 1 else "b")  # type: ignore[arg-type]
    assert sorted(seen) == [(0, 3, 0, 2, True), (1, 3, 0, 1, False), (2, 3, 1, 2, False)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_infinite_gradient_ends_the_run_unless_it_is_to_be_ignored(workers: int) -> None:
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


def test_an_infinite_gradient_that_a_loop_applies_itself_is_found_at_the_end() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(model_of())
        backward(loss_of(model, data_of()[:2]) * float("inf"))
        with torch.no_grad():
            for one in model.parameters():
                one.sub_(one.grad)

    with pytest.raises((NonFiniteError, ValueError)):
        call_on_ranks(train, 2)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_what_is_infinite_in_one_model_keeps_no_other_from_its_step(strategy: str) -> None:
    """The first backward reaches both, the second one the first alone."""

    def train(config: Mapping[str, Any]) -> None:
        first, second = distplat.prepare(model_of(), nn.Linear(1, 1).double())
        one, two = momentum(first.parameters()), momentum(second.parameters())
        inputs = data_of().tensors[0][:2]
        backward(second(first(inputs).detach()).sum() * float("inf"))
        backward(first(inputs).sum())
        one.step()
        two.zero_grad()
        backward(second(first(inputs)).sum())
        two.step()

    call_on_ranks(train, job=function_job(2, strategy=strategy))


def with_phases() -> nn.Module:
    model = model_of()
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))
    return model


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: DataLoader(data_of(), batch_size=None), "batch_size=None"),
    (lambda: 3, "prepare() got a int"),
    (with_phases, "a model that prepare() got has the state 'phases' of type complex128"),
]


@pytest.mark.parametrize(("make", "text"), REFUSED)
def test_what_cannot_be_prepared_is_named(make: Callable[[], Any], text: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(make())

    with pytest.raises(SpecError) as caught:
        call_on_ranks(train)
    assert text in str(caught.value)


def test_ranks_with_other_models_are_named() -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(nn.Linear(2, 1 + distplat.get_context().rank // 2))

    with pytest.raises(SpecError, match="another model on rank 2"):
        call_on_ranks(train, 3)


@pytest.mark.parametrize(
    "bad",
    [
        {"a": object()},
        {"a": [{1.5: 2}]},
        {"a": torch.zeros(1, dtype=torch.complex128)},
        {"a": torch.eye(2).to_sparse()},
        {"a": np.array(["x"])},
    ],
    ids=["object", "key", "complex", "sparse", "texts"],
)
def test_what_a_checkpoint_cannot_hold_is_named(bad: Any) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.report({"loss": 1.0}, checkpoint=bad)

    with pytest.raises(SpecError, match=r"checkpoint\['a'\]"):
        call_on_ranks(train)


def test_a_report_without_names_is_told() -> None:
    with pytest.raises(SpecError, match="got a float: it takes numbers by name"):
        call_on_ranks(lambda config: distplat.report(0.5))  # type: ignore[arg-type]


def test_outside_of_a_run_the_words_say_so() -> None:
    for word in (distplat.get_checkpoint, distplat.barrier, distplat.get_context):
        with pytest.raises(SpecError, match="train function"):
            word()


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_all_ranks_stop_at_once_though_they_hear_of_it_apart(strategy: str) -> None:
    made = [0, 0, 0]

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        model = distplat.prepare(model_of())
        while not distplat.should_stop():
            backward(loss_of(model, data_of()[:2]))
            made[rank] += 1

    def ending(rank: int) -> bool:
        return made[rank] >= (3 if rank == 0 else 1)

    call_on_ranks(train, job=function_job(3, strategy=strategy), ending=ending)
    assert made == [3, 3, 3]


def test_under_ps_async_each_rank_stops_by_itself() -> None:
    made = [0, 0]

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        while not distplat.should_stop():
            made[rank] += 1

    job = function_job(2, strategy="ps-async")
    call_on_ranks(train, job=job, ending=lambda rank: made[rank] > 3 * rank)
    assert made == [1, 4]
