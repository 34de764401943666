"""A train function under `ps-sync` and `ps-async`, with real servers in this process."""

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks
from local_servers import ELSEWHERE
from plain_functions import (
    ASYNC,
    SYNC,
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
    run_under,
    train_plain,
    train_steps,
)
from torch import Tensor, nn
from torch.autograd import backward
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.utils.data import DataLoader

import distplat
from distplat.actors.local_actors import HERE
from distplat.platform.progress import StepReport


@pytest.mark.sweep(2)
@pytest.mark.parametrize("home", [HERE, ELSEWHERE])
@pytest.mark.parametrize("make", [adam, momentum, adagrad])
@pytest.mark.parametrize("world", [1, 3])
def test_ps_sync_has_the_bits_of_ring_and_matches_plain_loop(
    world: int, make: Make, home: str
) -> None:
    loop = function_of(make, world, clip=0.5)
    trained = run_under(SYNC, loop, world, home=home).trained
    ring = call_on_ranks(loop, world).trained[0]
    for rank in range(world):
        assert_equal(trained[rank], train_plain(make, clip=0.5))
        assert all(torch.equal(trained[rank][name], value) for name, value in ring.items())


def part_of(step: int, rank: int, world: int) -> list[Tensor]:
    return [tensor[12 * step :][:12][rank::world] for tensor in data_of().tensors]


def with_no_sync(model: nn.Module, rank: int, world: int) -> None:
    optimizer = momentum(model.parameters())
    for step in range(4):
        with distplat.no_sync() if step < 3 and world > 1 else nullcontext():
            backward(loss_of(model, part_of(step, rank, world)) / 4)
    optimizer.step()


def without_no_sync(model: nn.Module, rank: int, world: int) -> None:
    optimizer = momentum(model.parameters())
    for step in range(4):
        backward(loss_of(model, part_of(step, rank, world)) / 4)
    optimizer.step()
    optimizer.step()


def with_grad_scaler(model: nn.Module, rank: int, world: int) -> None:
    """Train with a `GradScaler`; the gradient of one rank overflows in one step."""
    optimizer = momentum(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(4):
        loss = loss_of(model, part_of(step, rank, world))
        loss = loss * float("inf") if step == 1 and rank == 0 else loss
        backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize("strategy", [{"name": "ring"}, SYNC])
@pytest.mark.parametrize("loop", [with_no_sync, without_no_sync, with_grad_scaler])
def test_gradients_are_averaged_before_the_step(
    loop: Callable[[nn.Module, int, int], None], strategy: Mapping[str, Any]
) -> None:
    def train(config: Any) -> None:
        context = distplat.get_context()
        loop(distplat.prepare(model_of()), context.rank, context.world_size)

    whole = model_of()
    loop(whole, 0, 1)
    assert_equal(run_under(strategy, train, 2).trained[1], whole.state_dict())


class OptimizerWrapper(torch.optim.SGD):
    """A wrapper that inherits from the optimizer's class, as in Lightning and Accelerate."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize("strategy", [{"name": "ring"}, SYNC, ASYNC])
@pytest.mark.parametrize("as_keyword", [False, True])
def test_step_with_closure_matches_plain_loop(
    strategy: Mapping[str, Any], as_keyword: bool
) -> None:
    """Lightning passes a closure to every optimizer."""
    losses: list[float] = []

    def loop(model: nn.Module, optimizer: Any) -> None:
        for step in range(3):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, part_of(step, 0, 1))
                backward(loss)
                return loss

            loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
            losses.append(float(loss.detach()))

    def train(config: Any) -> None:
        model = model_of()
        optimizer = momentum(model.parameters())
        distplat.prepare(model, OptimizerWrapper(optimizer))
        loop(model, optimizer)

    whole = model_of()
    loop(whole, momentum(whole.parameters()))
    assert_equal(run_under(strategy, train, 1).trained[0], whole.state_dict())
    assert losses[3:] == pytest.approx(losses[:3])


@pytest.mark.parametrize("strategy", [{"name": "ring"}, SYNC, ASYNC])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_a_step(fused: bool, strategy: Mapping[str, Any]) -> None:
    def loop(model: nn.Module) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=fused)
        if in_distplat():
            model, optimizer = distplat.prepare(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(4):
            loss = loss_of(model, part_of(step, 0, 1)) * (float("inf") if step == 1 else 1.0)
            backward(scaler.scale(loss))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    def in_distplat() -> bool:
        return whole is not None

    whole: nn.Module | None = None
    plain_model = model_of()
    loop(plain_model)
    whole = plain_model
    run = run_under(strategy, lambda config: loop(model_of()), 1)
    assert_equal(run.trained[0], whole.state_dict())


def test_two_models_of_different_dtypes_with_unused_parameters() -> None:
    def train(config: Any) -> None:
        first = distplat.prepare(Branches())
        second = distplat.prepare(nn.Linear(1, 1).float())
        train_loop(first, second, distplat.get_context().rank, 2)

    def train_loop(first: nn.Module, second: nn.Module, rank: int, world: int) -> None:
        with torch.no_grad():
            for parameter in [*first.parameters(), *second.parameters()]:
                parameter.fill_(0.5)
        optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], 0.1, 0.9)
        inputs = data_of().tensors[0][:4]
        for step in range(3):
            both = step == 1 and world > 1 and rank == 1
            outputs = (
                first(inputs[rank::world], both=both) if world > 1 else _whole_batch(first, step)
            )
            backward(second(outputs.float()).square().mean())
            has_grad = [branch.weight.grad is not None for branch in first.branches]  # type: ignore[union-attr]
            assert has_grad == [True, step == 1, False]
            optimizer.step()
            optimizer.zero_grad()

    def _whole_batch(first: nn.Module, step: int) -> Tensor:
        inputs = data_of().tensors[0][:4]
        halves = [first(inputs[r::2], both=step == 1 and r == 1) for r in range(2)]
        return torch.cat(halves)

    reference, reference_head = Branches(), nn.Linear(1, 1).float()
    train_loop(reference, reference_head, 0, 1)
    expected = {f"0.{k}": v for k, v in reference.state_dict().items()}
    expected |= {f"1.{k}": v for k, v in reference_head.state_dict().items()}
    trained = run_under(SYNC, train, 2).trained[1]
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", [{"name": "ring"}, SYNC, ASYNC])
def test_data_replaced_before_the_first_backward_is_used(
    strategy: dict[str, Any],
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of()
        optimizer = momentum(model.parameters())
        model, optimizer = distplat.prepare(model, optimizer)
        for parameter in model.parameters():
            parameter.data = torch.full_like(parameter, 0.5)
        backward(loss_of(model, data_of()[:12]))
        optimizer.step()

    model = model_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    backward(loss_of(model, data_of()[:12]))
    momentum(model.parameters()).step()
    assert_equal(run_under(strategy, train, 1).trained[0], model.state_dict())


def with_groups(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """Return an optimizer with two groups, and a schedule that changes lr and momentum."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "nesterov": True}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.8)
    rates = [0.05, 0.02]
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=4)


@pytest.mark.parametrize("home", [HERE, ELSEWHERE])
def test_one_rank_of_ps_async_matches_plain_loop(home: str) -> None:
    for make in (adam, momentum, adagrad, lambda p: torch.optim.RMSprop(p, lr=0.01)):
        run = run_under(ASYNC, function_of(make, 1, clip=0.5), 1, home=home)
        assert_equal(run.trained[0], train_plain(make, clip=0.5))

    def loop(model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        for _ in range(4):
            train_steps(model, optimizer, 1)
            scheduler.step()

    def train(config: Any) -> None:
        model = model_of()
        loop(*distplat.prepare(model, *with_groups(model)))

    whole = model_of()
    loop(whole, *with_groups(whole))
    assert_equal(run_under(ASYNC, train, 1, home=home).trained[0], whole.state_dict())


@pytest.mark.parametrize("freezes", [False, True])
def test_two_optimizers_step_alternately(freezes: bool) -> None:
    def loop(first: nn.Module, second: nn.Module, first_adam: Any, second_adam: Any) -> None:
        for step in range(4):
            second.requires_grad_(not freezes or step % 2 == 1)  # also in the first step
            backward(second(first(data_of().tensors[0][:6])).square().mean())
            (second_adam if step % 2 else first_adam).step()
            first_adam.zero_grad()
            second_adam.zero_grad()

    def make() -> tuple[Any, ...]:
        first, second = model_of(3), nn.Linear(1, 1).double()
        nn.init.ones_(second.weight)
        nn.init.zeros_(second.bias)
        return first, second, adam(first.parameters()), adam(second.parameters())

    whole = make()
    loop(*whole)
    expected = {f"{n}.{k}": v for n in (0, 1) for k, v in whole[n].state_dict().items()}
    run = run_under(ASYNC, lambda config: loop(*distplat.prepare(*make())), 1)
    assert_equal(run.trained[0], expected)


def test_optimizer_state_resumes_under_another_strategy() -> None:
    """`state_dict()` contains the servers' state in torch's format."""
    whole = call_on_ranks(resumable(4)).trained[0]
    strategies: list[Mapping[str, Any]] = [{"name": "ring"}, SYNC, ASYNC]
    for before in strategies:
        half = run_under(before, resumable(2), 1)
        for after in strategies:
            rest = run_under(after, resumable(4), 1, saved=half.checkpoints[2])
            assert_equal(rest.trained[0], whole)


def test_get_state_dict_does_not_change_the_training() -> None:
    """If an optimizer has no state, torch steps it once with zero gradients to create the state."""

    def loop(model: nn.Module, optimizer: Any) -> Mapping[str, Any]:
        optimizer_state: Mapping[str, Any] = {}
        for batch in [*DataLoader(data_of(), batch_size=4)][:3]:
            backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            _, optimizer_state = get_state_dict(model, optimizer)
        state: Mapping[str, Any] = optimizer_state["state"]["0.weight"]
        return state

    def train(config: Any) -> None:
        model = model_of()
        state.update(loop(*distplat.prepare(model, torch.optim.Adam(model.parameters(), lr=0.1))))

    whole, state = model_of(), dict[str, Any]()
    expected = loop(whole, torch.optim.Adam(whole.parameters(), lr=0.1))
    assert_equal(run_under(ASYNC, train, 1).trained[0], whole.state_dict())
    assert_equal(state, expected)


@pytest.mark.parametrize("bound", [0, 2])
def test_staleness_bounds_the_distance_between_ranks(bound: int) -> None:
    steps_done = [0, 0, 0]
    distances: list[int] = []
    lock = threading.Lock()

    def train(config: Any) -> None:
        rank = distplat.get_context().rank
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loader = DataLoader(data_of(), batch_size=4)
        model, optimizer, loader = distplat.prepare(model, optimizer, loader)
        for _ in range(4):
            for batch in loader:
                loss = loss_of(model, batch)
                backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                with lock:
                    steps_done[rank] += 1
                    distances.append(max(steps_done) - min(steps_done))
                distplat.report({"loss": loss})

    run = run_under({**ASYNC, "staleness": bound}, train, 3)
    # A rank counted as one step behind may have received its response already.
    assert max(distances) <= bound + 1
    reports = [r for r in run.reports if isinstance(r, StepReport)]
    learned = model_of()
    learned.load_state_dict(run.trained[0])
    assert loss_of(learned, data_of()[:]) < 0.8 * loss_of(model_of(), data_of()[:])
    assert reports[-1].figures["staleness"] >= 0.0
    assert all(torch.equal(run.trained[0][k], v) for k, v in run.trained[2].items()), "ranks differ"


def test_finished_rank_does_not_block_others() -> None:
    def train(config: Any) -> None:
        rank = distplat.get_context().rank
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model, optimizer = distplat.prepare(model, optimizer)
        train_steps(model, optimizer, 3 * rank)

    first, second, _ = run_under({**ASYNC, "staleness": 0}, train, 3).trained
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_loaded_at_the_end_are_the_result(through_data: bool) -> None:
    def train(config: Any) -> None:
        model = model_of()
        optimizer = adam(model.parameters())
        model, optimizer = distplat.prepare(model, optimizer)
        train_steps(model, optimizer, 2)
        model.load_state_dict({} if through_data else model_of(7).state_dict(), strict=False)
        for parameter, best in zip(model.parameters(), model_of(7).parameters(), strict=True):
            if through_data:
                parameter.data.copy_(best.data)

    assert_equal(run_under(ASYNC, train, 1).trained[0], model_of(7).state_dict())
