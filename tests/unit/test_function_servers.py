"""A train function under `ps-sync` and `ps-async`: real servers in this process."""

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
    plain,
    resumable,
    steps_of,
    under,
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
def test_ps_sync_gives_the_bits_of_ring_and_the_result_of_a_plain_loop(
    world: int, make: Make, home: str
) -> None:
    loop = function_of(make, world, clip=0.5)
    found = under(SYNC, loop, world, home=home).trained
    ring = call_on_ranks(loop, world).trained[0]
    for rank in range(world):
        assert_equal(found[rank], plain(make, clip=0.5))
        assert all(torch.equal(found[rank][name], value) for name, value in ring.items())


def part_of(step: int, rank: int, world: int) -> list[Tensor]:
    return [one[12 * step :][:12][rank::world] for one in data_of().tensors]


def accumulated(model: nn.Module, rank: int, world: int) -> None:
    optimizer = momentum(model.parameters())
    for step in range(4):
        with distplat.no_sync() if step < 3 and world > 1 else nullcontext():
            backward(loss_of(model, part_of(step, rank, world)) / 4)
    optimizer.step()


def accumulated_in_every_backward(model: nn.Module, rank: int, world: int) -> None:
    optimizer = momentum(model.parameters())
    for step in range(4):
        backward(loss_of(model, part_of(step, rank, world)) / 4)
    optimizer.step()
    optimizer.step()


def scaled(model: nn.Module, rank: int, world: int) -> None:
    """The gradient of one rank overflows in one step."""
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
@pytest.mark.parametrize("loop", [accumulated, accumulated_in_every_backward, scaled])
def test_between_backward_and_step_gradients_are_those_of_all_ranks(
    loop: Callable[[nn.Module, int, int], None], strategy: Mapping[str, Any]
) -> None:
    def train(config: Any) -> None:
        context = distplat.get_context()
        loop(distplat.prepare(model_of()), context.rank, context.world)

    whole = model_of()
    loop(whole, 0, 1)
    assert_equal(under(strategy, train, 2).trained[1], whole.state_dict())


class Wrapping(torch.optim.SGD):
    """As Lightning and Accelerate have it: of the optimizer's class, and not the optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize("strategy", [{"name": "ring"}, SYNC, ASYNC])
@pytest.mark.parametrize("named", [False, True])
def test_a_step_may_ask_for_the_loss(strategy: Mapping[str, Any], named: bool) -> None:
    """Lightning has every optimizer do so."""
    losses: list[float] = []

    def loop(model: nn.Module, optimizer: Any) -> None:
        for step in range(3):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, part_of(step, 0, 1))
                backward(loss)
                return loss

            found = optimizer.step(closure=closure) if named else optimizer.step(closure)
            losses.append(float(found.detach()))

    def train(config: Any) -> None:
        model = model_of()
        optimizer = momentum(model.parameters())
        distplat.prepare(model, Wrapping(optimizer))
        loop(model, optimizer)

    whole = model_of()
    loop(whole, momentum(whole.parameters()))
    assert_equal(under(strategy, train, 1).trained[0], whole.state_dict())
    assert losses[3:] == pytest.approx(losses[:3])


@pytest.mark.parametrize("strategy", [{"name": "ring"}, SYNC, ASYNC])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_leaves_a_step_out_whoever_updates(
    fused: bool, strategy: Mapping[str, Any]
) -> None:
    def loop(model: nn.Module) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=fused)
        if distplat_runs():
            model, optimizer = distplat.prepare(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(4):
            loss = loss_of(model, part_of(step, 0, 1)) * (float("inf") if step == 1 else 1.0)
            backward(scaler.scale(loss))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    def distplat_runs() -> bool:
        return whole is not None

    whole: nn.Module | None = None
    plainly = model_of()
    loop(plainly)
    whole = plainly
    run = under(strategy, lambda config: loop(model_of()), 1)
    assert_equal(run.trained[0], whole.state_dict())


def test_two_models_of_several_types_and_parameters_without_gradient() -> None:
    def train(config: Any) -> None:
        first = distplat.prepare(Branches())
        second = distplat.prepare(nn.Linear(1, 1).float())
        rest(first, second, distplat.get_context().rank, 2)

    def rest(first: nn.Module, second: nn.Module, rank: int, world: int) -> None:
        with torch.no_grad():
            for one in [*first.parameters(), *second.parameters()]:
                one.fill_(0.5)
        optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], 0.1, 0.9)
        inputs = data_of().tensors[0][:4]
        for step in range(3):
            both = step == 1 and world > 1 and rank == 1
            found = first(inputs[rank::world], both=both) if world > 1 else _whole(first, step)
            backward(second(found.float()).square().mean())
            has = [one.weight.grad is not None for one in first.branches]  # type: ignore[union-attr]
            assert has == [True, step == 1, False]
            optimizer.step()
            optimizer.zero_grad()

    def _whole(first: nn.Module, step: int) -> Tensor:
        inputs = data_of().tensors[0][:4]
        halves = [first(inputs[r::2], both=step == 1 and r == 1) for r in range(2)]
        return torch.cat(halves)

    one, two = Branches(), nn.Linear(1, 1).float()
    rest(one, two, 0, 1)
    wanted = {f"0.{k}": v for k, v in one.state_dict().items()}
    wanted |= {f"1.{k}": v for k, v in two.state_dict().items()}
    found = under(SYNC, train, 2).trained[1]
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", [{"name": "ring"}, SYNC, ASYNC])
def test_data_that_a_loop_replaces_before_its_first_backward_is_the_models(
    strategy: dict[str, Any],
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of()
        optimizer = momentum(model.parameters())
        model, optimizer = distplat.prepare(model, optimizer)
        for one in model.parameters():
            one.data = torch.full_like(one, 0.5)
        backward(loss_of(model, data_of()[:12]))
        optimizer.step()

    model = model_of()
    with torch.no_grad():
        for one in model.parameters():
            one.fill_(0.5)
    backward(loss_of(model, data_of()[:12]))
    momentum(model.parameters()).step()
    assert_equal(under(strategy, train, 1).trained[0], model.state_dict())


def in_groups(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """Two groups with a schedule that changes lr and momentum."""
    weights = [one for one in model.parameters() if one.ndim > 1]
    biases = [one for one in model.parameters() if one.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "nesterov": True}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.8)
    rates = [0.05, 0.02]
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=4)


@pytest.mark.parametrize("home", [HERE, ELSEWHERE])
def test_one_rank_of_ps_async_is_a_plain_loop(home: str) -> None:
    for make in (adam, momentum, adagrad, lambda p: torch.optim.RMSprop(p, lr=0.01)):
        run = under(ASYNC, function_of(make, 1, clip=0.5), 1, home=home)
        assert_equal(run.trained[0], plain(make, clip=0.5))

    def loop(model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        for _ in range(4):
            steps_of(model, optimizer, 1)
            scheduler.step()

    def train(config: Any) -> None:
        model = model_of()
        loop(*distplat.prepare(model, *in_groups(model)))

    whole = model_of()
    loop(whole, *in_groups(whole))
    assert_equal(under(ASYNC, train, 1, home=home).trained[0], whole.state_dict())


@pytest.mark.parametrize("freezes", [False, True])
def test_two_optimizers_of_two_models_step_by_turns_on_servers(freezes: bool) -> None:
    def loop(first: nn.Module, second: nn.Module, one: Any, two: Any) -> None:
        for step in range(4):
            second.requires_grad_(not freezes or step % 2 == 1)  # in the first step, too
            backward(second(first(data_of().tensors[0][:6])).square().mean())
            (two if step % 2 else one).step()
            one.zero_grad()
            two.zero_grad()

    def make() -> tuple[Any, ...]:
        first, second = model_of(3), nn.Linear(1, 1).double()
        nn.init.ones_(second.weight)
        nn.init.zeros_(second.bias)
        return first, second, adam(first.parameters()), adam(second.parameters())

    whole = make()
    loop(*whole)
    wanted = {f"{n}.{k}": v for n in (0, 1) for k, v in whole[n].state_dict().items()}
    run = under(ASYNC, lambda config: loop(*distplat.prepare(*make())), 1)
    assert_equal(run.trained[0], wanted)


def test_the_state_of_a_checkpoint_goes_from_one_strategy_to_another() -> None:
    """The servers' state is in `state_dict()`, as torch has it."""
    whole = call_on_ranks(resumable(4)).trained[0]
    strategies: list[Mapping[str, Any]] = [{"name": "ring"}, SYNC, ASYNC]
    for before in strategies:
        half = under(before, resumable(2), 1)
        for after in strategies:
            rest = under(after, resumable(4), 1, saved=half.checkpoints[2])
            assert_equal(rest.trained[0], whole)


def test_torchs_checkpoints_read_the_state_and_change_nothing() -> None:
    """Where an optimizer has no state they step once with gradients of 0, to have it made."""

    def loop(model: nn.Module, optimizer: Any) -> Mapping[str, Any]:
        found: Mapping[str, Any] = {}
        for batch in [*DataLoader(data_of(), batch_size=4)][:3]:
            backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
            _, found = get_state_dict(model, optimizer)
        state: Mapping[str, Any] = found["state"]["0.weight"]
        return state

    def train(config: Any) -> None:
        model = model_of()
        state.update(loop(*distplat.prepare(model, torch.optim.Adam(model.parameters(), lr=0.1))))

    whole, state = model_of(), dict[str, Any]()
    expected = loop(whole, torch.optim.Adam(whole.parameters(), lr=0.1))
    assert_equal(under(ASYNC, train, 1).trained[0], whole.state_dict())
    assert_equal(state, expected)


@pytest.mark.parametrize("bound", [0, 2])
def test_ranks_run_no_further_apart_than_the_bound_and_learn(bound: int) -> None:
    made = [0, 0, 0]
    apart: list[int] = []
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
                    made[rank] += 1
                    apart.append(max(made) - min(made))
                distplat.report({"loss": loss})

    run = under({**ASYNC, "staleness": bound}, train, 3)
    # Who is counted as one behind may have its answer already.
    assert max(apart) <= bound + 1
    reports = [one for one in run.reports if isinstance(one, StepReport)]
    learned = model_of()
    learned.load_state_dict(run.trained[0])
    assert loss_of(learned, data_of()[:]) < 0.8 * loss_of(model_of(), data_of()[:])
    assert reports[-1].figures["staleness"] >= 0.0
    assert all(torch.equal(run.trained[0][k], v) for k, v in run.trained[2].items()), "the newest"


def test_a_rank_that_is_done_holds_nobody_up() -> None:
    def train(config: Any) -> None:
        rank = distplat.get_context().rank
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model, optimizer = distplat.prepare(model, optimizer)
        steps_of(model, optimizer, 3 * rank)

    first, second, _ = under({**ASYNC, "staleness": 0}, train, 3).trained
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.parametrize("through_data", [False, True])
def test_best_weights_that_a_loop_loads_at_its_end_are_the_result(through_data: bool) -> None:
    def train(config: Any) -> None:
        model = model_of()
        optimizer = adam(model.parameters())
        model, optimizer = distplat.prepare(model, optimizer)
        steps_of(model, optimizer, 2)
        model.load_state_dict({} if through_data else model_of(7).state_dict(), strict=False)
        for one, best in zip(model.parameters(), model_of(7).parameters(), strict=True):
            if through_data:
                one.data.copy_(best.data)

    assert_equal(under(ASYNC, train, 1).trained[0], model_of(7).state_dict())
