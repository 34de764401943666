"""A train function under `ring` against a plain loop over the same global batches."""

import copy
import random
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from function_ranks import call_on_ranks, function_job
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

import distplat
from distplat.platform.errors import MismatchError, NonFiniteError, SpecError
from distplat.platform.progress import StepReport
from distplat.strategies.function import function_session
from distplat.strategies.loop.seeding import seed_again, seed_function, seed_rank, seeded_itself

GLOBAL = 12
SAMPLES = 48


def model_of(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(torch.randn(one.shape, generator=generator, dtype=torch.float64))
    return model


def data_of() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.square().sum(1, keepdim=True))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


Change = Callable[[nn.Module], object]
Make = Callable[[Any], torch.optim.Optimizer]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.1)


def plain(make: Make, *, epochs: int = 2, clip: float | None = None) -> dict[str, Tensor]:
    model = model_of()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(epochs):
        for batch in DataLoader(data_of(), batch_size=GLOBAL):
            backward(loss_of(model, batch))
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    return model.state_dict()


def function_of(
    make: Make,
    world: int,
    *,
    clip: float | None = None,
    set_to_none: bool = True,
) -> Callable[[Mapping[str, Any]], object]:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of(seed=distplat.get_context().rank)  # rank 0's is everybody's
        optimizer = make(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        loader = DataLoader(data_of(), batch_size=GLOBAL // world)
        model, optimizer, loader, scheduler = distplat.prepare(model, optimizer, loader, scheduler)
        for _ in range(2):
            for batch in loader:
                loss = loss_of(model, batch)
                backward(loss)
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
                distplat.report({"loss": loss.item()})
            scheduler.step()

    return train


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


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


class Branches(nn.Module):
    """The second branch is used on some ranks, the third nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 1).double() for _ in range(3))

    def forward(self, x: Tensor, *, both: bool) -> Tensor:
        found: Tensor = self.branches[0](x)
        return found + self.branches[1](x) if both else found


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


def test_the_loops_own_distributed_sampler_says_which_epoch_it_is() -> None:
    def train(config: Mapping[str, Any]) -> None:
        sampler: DistributedSampler[int] = DistributedSampler(Odd(), 1, 0)
        loader = distplat.prepare(DataLoader(Odd(), batch_size=2, sampler=sampler))
        seen: dict[int, list[int]] = {}
        for epoch in (3, 4, 3):
            sampler.set_epoch(epoch)
            order = [number for batch in loader for number in batch.tolist()]
            assert seen.setdefault(epoch, order) == order
        assert seen[3] != seen[4]

    call_on_ranks(train)


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
        ("nothing prepared", r"would move 4 parameters .* \[6, 4\], \[6\], \[1, 6\], \.\.\.: each"),
        ("a head", r"SGD\.step\(\) would move a parameter .* shape \[1, 1\]: each worker"),
        ("a head later", r"SGD\.step\(\) would move a parameter .* shape \[1, 1\]: each worker"),
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


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronized_batch_norm_is_over_all_ranks(world: int, momentum: float | None) -> None:
    """Two models have it, one behind the other: each its own statistics."""

    def models() -> tuple[nn.Module, nn.Module]:
        wide, narrow = (nn.BatchNorm1d(n, momentum=momentum).double() for n in (6, 1))
        first, _, last = model_of().children()
        return nn.Sequential(first, wide, nn.Tanh(), last), narrow

    def steps(first: nn.Module, second: nn.Module, rank: int = 0, world: int = 1) -> None:
        optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
        for _ in range(4):
            inputs, targets = (one[rank::world] for one in data_of().tensors)
            backward((second(first(inputs)) - targets).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    def train(config: Any) -> None:
        made = map(nn.SyncBatchNorm.convert_sync_batchnorm, models())
        context = distplat.get_context()
        first, second = distplat.prepare(*made)
        steps(first, second, context.rank, context.world)

    whole = models()
    steps(*whole)
    expected = {f"{n}.{k}": v for n, one in enumerate(whole) for k, v in one.state_dict().items()}
    for found in call_on_ranks(train, world).trained:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-12), name


def with_norm(*, synced: bool = False) -> nn.Module:
    first, _, last = model_of().children()
    norm = nn.SyncBatchNorm(6) if synced else nn.BatchNorm1d(6)
    return nn.Sequential(first, norm.double(), nn.Tanh(), last)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_copy_of_a_model_with_sync_batch_norm_is_computed_like_it(strategy: str) -> None:
    """A teacher that is in training mode, and follows its student."""

    def steps(student: nn.Module, rank: int = 0, world: int = 1) -> None:
        teacher = copy.deepcopy(student).requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(4):
            inputs, targets = (one[rank::world] for one in data_of().tensors)
            backward((student(inputs) - 0.1 * teacher(inputs) - targets).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
                    mine.lerp_(other, 0.1)

    def train(config: Any) -> None:
        place = distplat.get_context()
        model = distplat.prepare(with_norm(synced=True))
        steps(model, place.rank, place.world)

    whole = with_norm()
    steps(whole)
    for found in call_on_ranks(train, job=function_job(2, strategy=strategy)).trained:
        for name, value in whole.state_dict().items():
            assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-12), name


def test_a_model_may_keep_a_copy_of_its_sync_batch_norm() -> None:
    """Such as the teacher of BYOL, in a module of the student's."""

    def train(config: Any) -> None:
        model = distplat.prepare(with_norm(synced=True))
        model[0].teacher = copy.deepcopy(model).requires_grad_(False)
        inputs, _ = data_of().tensors
        backward((model(inputs) - model[0].teacher(inputs) - 1).square().mean())

    call_on_ranks(train, 2)


def test_sync_batch_norm_that_comes_behind_prepare_is_refused() -> None:
    def train(config: Any) -> None:
        convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
        model = convert(distplat.prepare(with_norm()))
        inputs, targets = data_of().tensors
        backward((model(inputs) - targets).square().mean())

    with pytest.raises(SpecError, match=r"'1' of the model became nn\.SyncBatchNorm after prepare"):
        call_on_ranks(train, 2)
    call_on_ranks(train, 1)


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


def resumable(steps: int) -> Callable[[Mapping[str, Any]], object]:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of()
        optimizer = adam(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        loader = DataLoader(data_of(), batch_size=24, shuffle=True)
        model, optimizer, loader = distplat.prepare(model, optimizer, loader)
        first = 0
        if (saved := distplat.get_checkpoint()) is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            np.random.RandomState().set_state(saved["numpy"])
            first = saved["epoch"]
        for epoch in range(first, steps):
            loader.set_epoch(epoch)
            for batch in loader:
                loss = loss_of(model, batch)
                backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "epoch": epoch + 1,
                "best": (0.5, None, [True, "x"]),
                "numpy": np.random.RandomState(3).get_state(),
            }
            distplat.report({"loss": loss}, checkpoint=state)

    return train


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


class Odd(Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_epoch_has_every_sample_in_an_order_of_its_own(shuffle: bool) -> None:
    seen: dict[tuple[int, int], list[int]] = {}

    def train(config: Mapping[str, Any]) -> None:
        loader = distplat.prepare(DataLoader(Odd(), batch_size=2, shuffle=shuffle))
        rank = distplat.get_context().rank
        for epoch in range(2):
            seen[rank, epoch] = [number for batch in loader for number in batch.tolist()]
        loader.set_epoch(0)
        assert [number for batch in loader for number in batch.tolist()] == seen[rank, 0]

    call_on_ranks(train, 2)
    for epoch in range(2):
        assert sorted(seen[0, epoch] + seen[1, epoch]) == [*range(10)]
    assert (seen[0, 0] != seen[0, 1]) == shuffle


class Metrics(NamedTuple):
    numbers: Tensor
    loss: Tensor


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 2), (3, 2), (4, 2)])
def test_gathered_metrics_are_of_every_sample_once(world: int, batch: int, drop_last: bool) -> None:
    def train(config: Mapping[str, Any]) -> None:
        context = distplat.get_context()
        loader = DataLoader(Odd(), batch_size=batch, shuffle=True, drop_last=drop_last)
        other = distplat.prepare(DataLoader(Odd(), batch_size=1))
        loader = distplat.prepare(loader)
        for _ in range(2):
            found: list[int] = []
            for numbers in loader:
                given = {"all": [Metrics(numbers, torch.tensor(0.5))], "rank": context.rank}
                every = distplat.gather_for_metrics(given)
                assert every["all"][0].loss.tolist() == [0.5] * world
                assert every["rank"].tolist() == [*range(world)]
                found += every["all"][0].numbers.tolist()
            assert len(found) == len({*found})
            assert len(found) == 10 if not drop_last else len(found) >= 10 - world * batch
        seen = [distplat.gather_for_metrics(numbers) for numbers in other]
        assert sorted(torch.cat(seen).tolist()) == [*range(10)], "the loader that was read last"

    call_on_ranks(train, world)


@pytest.mark.parametrize("left", [False, True])
def test_what_was_counted_over_a_pass_is_gathered_whole(left: bool) -> None:
    """It may be as long as the last batch, of which some ranks have repeated samples."""

    def train(config: Mapping[str, Any]) -> None:
        samples: Any = range(18)
        loader, other = distplat.prepare(DataLoader(samples, 5), DataLoader(samples, 4))
        for batch in other:
            for _ in loader:  # an evaluation, of one batch
                if left:
                    break
            assert distplat.gather_for_metrics(torch.ones(5)).sum() == 20
            assert len(distplat.gather_for_metrics(batch)) == {4: 16, 1: 2}[len(batch)]
        assert distplat.gather_for_metrics(torch.ones(1)).sum() == 4

    call_on_ranks(train, 4)


def test_a_pass_that_is_over_late_leaves_the_next_one() -> None:
    """An iterator that the loop still holds may be closed in the middle of another pass."""

    def train(config: Mapping[str, Any]) -> None:
        samples: Any = range(18)
        loader = distplat.prepare(DataLoader(samples, 5))
        first = iter(loader)
        next(first)
        for batch in loader:
            first.close()
            assert len(distplat.gather_for_metrics(batch)) == 18

    call_on_ranks(train, 4)


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class NotSized(Unsized):
    def __len__(self) -> int:
        raise NotImplementedError


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("data", [Unsized, NotSized])
def test_data_without_a_length_has_that_of_its_sampler(data: Any, world: int) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank, given = distplat.get_context().rank, DataLoader(data(), 3, sampler=range(12))
        assert torch.cat([*distplat.prepare(given)]).tolist() == [*range(rank, 12, world)]

    call_on_ranks(train, world)


@pytest.mark.parametrize("ends", [False, True])
def test_a_pass_that_the_loop_has_left_goes_on_there_or_is_over(ends: bool) -> None:
    """A loop that was stopped goes on there; one that takes a part of each epoch says so."""

    def train(config: Mapping[str, Any]) -> None:
        samples: Any = range(24)

        def made() -> Any:
            return distplat.prepare(DataLoader(samples, 2, shuffle=True))

        loader, whole, again = made(), made(), made()
        next(batch for number, batch in enumerate(loader) if number == 2)
        if ends:
            loader.set_epoch(1)
        again.load_state_dict(loader.state_dict())
        epochs = [[batch.tolist() for batch in whole] for _ in range(2)]
        rest = [batch.tolist() for batch in again]
        assert rest == (epochs[1] if ends else epochs[0][3:])

    call_on_ranks(train, 2)


@pytest.mark.parametrize("sampler", [None, RandomSampler])
@pytest.mark.parametrize("now", [6, 14])
def test_data_whose_length_changes_is_refused(now: int, sampler: Any) -> None:
    def train(config: Mapping[str, Any]) -> None:
        samples = [*range(10)]
        own = None if sampler is None else sampler(samples, replacement=True)
        loader = distplat.prepare(DataLoader(samples, 2, sampler=own))  # type: ignore[arg-type]
        assert len([*loader]) == 3
        samples[:] = range(now)
        with pytest.raises(SpecError, match=f"{now} samples now, and had 10"):
            next(iter(loader))

    call_on_ranks(train, 2)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.bool, torch.int64, torch.float64])
def test_tensors_of_any_type_and_length_are_gathered(kind: torch.dtype) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        found = distplat.gather_for_metrics(torch.ones(rank, 2, dtype=kind))
        assert (found.dtype, found.shape) == (kind, (3, 2))
        assert bool(found.all())

    call_on_ranks(train, 3)


def test_what_cannot_be_gathered_is_named() -> None:
    with pytest.raises(SpecError, match="got a str"):
        call_on_ranks(lambda config: distplat.gather_for_metrics({"a": "text"}))


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


def test_a_batch_sampler_of_torch_is_a_batch_size() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model, data = model_of(), data_of()
        optimizer = momentum(model.parameters())
        batches = BatchSampler(SequentialSampler(data), GLOBAL // 2, drop_last=True)
        loader = DataLoader(data, batch_sampler=batches)
        model, optimizer, loader = distplat.prepare(model, optimizer, loader)
        assert (len(loader), loader.batch_size) == (SAMPLES // GLOBAL, GLOBAL // 2)
        for batch in loader:
            backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()

    assert_equal(call_on_ranks(train, 2).trained[1], plain(momentum, epochs=1))


def test_a_prepared_loader_tells_what_the_given_one_does() -> None:
    def train(config: Mapping[str, Any]) -> None:
        given = DataLoader(data_of(), GLOBAL, num_workers=2, drop_last=True, prefetch_factor=3)
        loader = distplat.prepare(given)
        for name in ("num_workers", "drop_last", "prefetch_factor", "collate_fn", "pin_memory"):
            assert getattr(loader, name) == getattr(given, name)
        with pytest.raises(AttributeError, match="has no 'batch_sampler'"):
            _ = loader.batch_sampler  # it would be that of all ranks

    call_on_ranks(train, 1)


@pytest.mark.parametrize("last", ["backward", "barrier"])
def test_a_loop_that_ends_earlier_is_named(last: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        model = distplat.prepare(model_of())
        backward(loss_of(model, data_of()[:4]))
        if rank == 1:
            return
        if last == "barrier":
            distplat.barrier()  # is met by the end of rank 1

        backward(loss_of(model, data_of()[:4]))

    with pytest.raises(MismatchError, match=r"ranks 0, 2 in all_reduce; rank 1 in barrier"):
        call_on_ranks(train, 3)


@pytest.mark.parametrize(
    ("world", "prepared", "warned"), [(2, False, 1), (2, True, 0), (1, False, 0)]
)
def test_workers_that_may_train_on_the_same_samples_are_warned(
    world: int, prepared: bool, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model, loader = model_of(), DataLoader(data_of(), GLOBAL)
        first, *_, last = model.children()
        optimizers = [momentum(first.parameters()), adam(last.parameters())]
        model, *optimizers = distplat.prepare(model, *optimizers)
        read = distplat.prepare(loader) if prepared else loader
        for batch in read:
            backward(loss_of(model, batch))
            for optimizer in optimizers:
                optimizer.step()

    call_on_ranks(train, world)
    assert caplog.text.count("workers train on the same samples") == warned


def test_a_model_that_is_made_after_the_loader_begins_as_the_loop_has_seeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in scripts of Ray Train's. Ranks share a process here, and its generators."""
    seeded: list[tuple[int, int]] = []
    monkeypatch.setattr(function_session, "seed_rank", lambda seed, *of: seeded.append(of))

    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(DataLoader(data_of(), batch_size=6))
        distplat.barrier()
        assert seeded == []
        distplat.barrier()
        distplat.prepare(nn.Linear(4, 1))

    call_on_ranks(train, 2)
    assert sorted(seeded) == [(0, 0), (0, 1)]


@pytest.mark.parametrize("seed", [0, 3])
def test_a_loop_that_seeds_itself_keeps_its_numbers(seed: int) -> None:
    """As under DDP; with the job's seed, too. At import is early enough."""
    drawn: dict[int, list[float]] = {}

    def train(config: Mapping[str, Any]) -> None:
        context = distplat.get_context()
        distplat.barrier()
        if context.rank == 0:  # ranks share a process here, and its generators
            torch.manual_seed(seed)
        distplat.barrier()
        distplat.prepare(nn.Linear(4, 1))
        distplat.barrier()
        if context.rank == 0:
            drawn[0] = torch.rand(3).tolist()

    call_on_ranks(train, 2)
    torch.manual_seed(seed)
    nn.Linear(4, 1), nn.Linear(4, 1)
    assert drawn[0] == torch.rand(3).tolist()


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**40])
def test_a_function_draws_by_the_seed_of_the_job(seed: int) -> None:
    torch.manual_seed(seed)
    wanted = torch.rand(3).tolist()
    seed_function(seed)
    assert torch.rand(3).tolist() == wanted
    assert not seeded_itself(seed)
    torch.manual_seed(seed)
    assert seeded_itself(seed)


def draw(count: int) -> dict[str, list[float]]:
    """Give some numbers of each generator."""
    of_python = [random.random() for _ in range(count)]
    of_numpy = np.random.rand(count).tolist()
    return {"torch": torch.rand(count).tolist(), "numpy": of_numpy, "python": of_python}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("seeds", [(), ("numpy",), ("python",), ("numpy", "python"), ("torch",)])
@pytest.mark.parametrize("drawn", [0, 5, 4000])
def test_a_generator_that_the_loop_has_seeded_stays_as_it_is(
    seeds: tuple[str, ...], drawn: int
) -> None:
    """By the job's seed, too, and whatever was drawn before and after."""
    ways: dict[str, Any] = {
        "torch": torch.manual_seed,
        "numpy": np.random.seed,
        "python": random.seed,
    }

    def after(rank: int, *, at_import: bool) -> dict[str, list[float]]:
        seed_function(7)
        draw(drawn)
        for one in seeds if at_import else ():
            ways[one](7)
        seed_again(7)
        draw(drawn)
        for one in () if at_import else seeds:
            ways[one](7)
        draw(drawn)
        seed_rank(7, 0, rank)
        return draw(3)

    for at_import in (True, False):
        first, second = after(0, at_import=at_import), after(1, at_import=at_import)
        alike = {name for name in ways if first[name] == second[name]}
        assert alike == ({*ways} if "torch" in seeds else {*seeds})
        for one in seeds:
            ways[one](7)
            draw(2 * drawn if at_import else drawn)
            assert draw(3)[one] == first[one]
