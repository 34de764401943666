"""
Buffers, frozen parameters and writes in forward: as in one process, and equal on all ranks.

The reference is a plain loop over whole batches. The last batch has one sample, so some ranks
have an empty part.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from local_run import LocalRun, train
from plain_loss import mean_loss
from rank_threads import on_ranks
from teacher_task import BATCH, SAMPLES, STEPS, WIDE, Data, Teacher, job
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.errors import SpecError, StateLost
from distplat.platform.sampler import Sampler
from distplat.strategies.fakes import Fabric
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.model_state import ModelState, Shares
from distplat.strategies.task import Task


def plain_loop(task_class: type[Task]) -> dict[str, Tensor]:
    """Train in one process with a plain loop."""
    torch.manual_seed(0)
    task = task_class()
    model, data = task.model(), task.train_data()
    sampler = Sampler(SAMPLES, BATCH, 1, 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for step in range(STEPS):
        inputs, targets = data[sampler.batch_ids(step).tolist()]
        optimizer.zero_grad()
        torch.autograd.backward(mean_loss(task, model.train()(inputs), targets))
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(
    run: LocalRun, expected_values: Mapping[str, Tensor], tolerance: float = 1e-10
) -> None:
    for rank in range(len(run.ranks)):
        found = run.parameters(rank)
        assert found.keys() == expected_values.keys()
        for name, value in expected_values.items():
            close = torch.allclose(found[name], value, rtol=0, atol=tolerance)
            assert close, f"{name!r} on rank {rank}: {found[name]} instead of {value}"


@pytest.mark.sweep(3)
@pytest.mark.parametrize("first_write", [0, 5])
@pytest.mark.parametrize("way", ["in place", "data in place", "data assigned"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_teacher_updated_in_forward_matches_plain_loop(
    strategy: str, world: int, way: str, first_write: int
) -> None:
    if first_write and way == "data in place":
        pytest.skip("writes through `.data` are detected in the first steps only")

    class Momentum(Data):
        def model(self) -> nn.Module:
            return Teacher(way, first_write)

    assert_same(train(job(strategy, world), Momentum), plain_loop(Momentum))


class Capped(Data):
    """`max_norm` scales rows of the embedding at lookup."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(9, 6, max_norm=0.5, dtype=WIDE)
                self.out = nn.Linear(6, 3, dtype=WIDE)

            def forward(self, x: Tensor) -> Tensor:
                outputs: Tensor = self.out(self.table((x.abs() * 4).long().clamp(max=8)).mean(1))
                return outputs

        return Net()

    def eval_data(self) -> TensorDataset:
        return self.train_data()


class Clipped(Data):
    """Each forward clips a weight through `.data`."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(6, 3, dtype=WIDE)

            def forward(self, x: Tensor) -> Tensor:
                self.layer.weight.data.clamp_(-0.2, 0.2)
                outputs: Tensor = self.layer(x)
                return outputs

        return Net()


@pytest.mark.parametrize("task_class", [Capped, Clipped])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_trained_parameter_written_in_forward_matches_plain_loop(
    world: int, task_class: type[Task]
) -> None:
    run = train(job("ring", world, evaluation={"every_epochs": 1}), task_class)
    assert_same(run, plain_loop(task_class))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_sharing_server_memory_scale_rows_once(world: int) -> None:
    run = train(job("ps-sync", world, evaluation={"every_epochs": 1}), Capped)
    assert_same(run, plain_loop(Capped))


class Replaced(Data):
    """A step assigns `.data` of a weight."""

    def model(self) -> nn.Module:
        return nn.Linear(6, 3, dtype=WIDE)

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        weight = model.get_parameter("weight")
        weight.data = weight.data.clamp(-0.2, 0.2)
        return self.loss(model(batch[0]), batch[1])


class Follower(Data):
    """The task has a teacher of the model that is not frozen."""

    def model(self) -> nn.Module:
        self.teacher = nn.Linear(6, 3, dtype=WIDE)
        return nn.Linear(6, 3, dtype=WIDE)

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        pairs = zip(self.teacher.parameters(), model.parameters(), strict=True)
        with torch.no_grad():
            for teacher_parameter, parameter in pairs:
                teacher_parameter.lerp_(parameter, 0.3)
            targets = self.teacher(batch[0])
        return self.loss(model(batch[0]), batch[1]) + self.loss(model(batch[0]), targets)


NAMES: dict[type[Task], str] = {
    Capped: "table.weight",
    Clipped: "layer.weight",
    Replaced: "weight",
    Follower: "task:teacher.weight",
}
SERVED = ["ps-sync", {"name": "ps-sync", "backup_workers": 1}, "ps-async"]


@pytest.mark.parametrize("task_class", NAMES)
@pytest.mark.parametrize("strategy", SERVED)
def test_written_parameter_on_servers_is_rejected_by_name(
    strategy: Any, task_class: type[Task]
) -> None:
    with pytest.raises(SpecError, match=rf"'{NAMES[task_class]}', which servers keep(.|\n)*ring"):
        train(job(strategy, 2), task_class, remote_servers=True)


@pytest.mark.parametrize("task_class", [Replaced, Follower])
def test_written_parameter_on_workers_matches_one_process(task_class: type[Task]) -> None:
    single, double = (train(job("ring", world), task_class) for world in (1, 2))
    assert_same(double, single.parameters())


class Unseeded(Data):
    """A frozen projection and a buffer from an unseeded generator."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            shift: Tensor

            def __init__(self) -> None:
                super().__init__()
                draw = np.random.default_rng().standard_normal
                self.frozen = nn.Parameter(torch.from_numpy(draw((6, 8))), requires_grad=False)
                self.register_buffer("shift", torch.from_numpy(draw(8)))
                self.out = nn.Linear(8, 3, dtype=WIDE)

            def forward(self, x: Tensor) -> Tensor:
                outputs: Tensor = self.out(torch.cos(x @ self.frozen + self.shift))
                return outputs

        return Net()


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_frozen_parameters_and_buffers_come_from_rank_0(strategy: str) -> None:
    initial = {}

    def save_initial(rank: int, prepared: Any) -> None:
        initial[rank] = {k: v.clone() for k, v in prepared.flat.model.state_dict().items()}

    run = train(job(strategy, 3), Unseeded, before=save_initial)
    for rank in range(3):
        for name in ("frozen", "shift"):
            assert torch.equal(run.parameters(rank)[name], initial[0][name])
            assert not torch.equal(initial[1][name], initial[0][name])


def test_ps_async_rejects_different_frozen_parameters() -> None:
    """The second rank to connect compares, so either rank may raise the error."""
    message = (
        "'frozen' of the model has other values on worker-. than on worker-., and this strategy"
    )
    with pytest.raises(SpecError, match=message):
        train(job("ps-async", 2), Unseeded)


class Statistics(nn.Module):
    """Buffers that depend on the samples: one is replaced, one grows, one starts as None."""

    mean: Tensor
    count: Tensor
    queue: Tensor
    last: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3, dtype=WIDE)
        self.register_buffer("mean", torch.zeros(6, dtype=WIDE))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("queue", torch.zeros(0, 6, dtype=WIDE))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        self.count += len(x)
        self.queue, self.last = torch.cat([self.queue, x[:1]]), x[0]
        outputs: Tensor = self.out(x)
        return outputs


def expected_buffers(rule: Callable[[str], str | None], world: int) -> list[dict[str, Tensor]]:
    """Simulate the ranks one after the other."""
    data, sampler = Unseeded().train_data().tensors[0], Sampler(SAMPLES, BATCH, world, 0)
    ranks = [Statistics() for _ in range(world)]
    for step in range(STEPS):
        parts = [data[sampler.rank_ids(step, rank).tolist()] for rank in range(world)]
        for module, part in zip(ranks, parts, strict=True):
            if len(part):
                module(part)
        shares = [len(part) / sum(map(len, parts)) for part in parts]
        means = [share * module.mean for share, module in zip(shares, ranks, strict=True)]
        mean = torch.stack(means).sum(0)
        for module in ranks:
            for name, _ in [*module.named_buffers()]:
                if rule(name) is None:
                    setattr(module, name, getattr(ranks[0], name).clone())
            if rule("mean") == "mean":
                module.mean = mean.clone()
    return [dict(module.named_buffers()) for module in ranks]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("rule_of_mean", [None, "mean", "local"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_buffers_follow_the_rule_of_the_task(
    strategy: str, world: int, rule_of_mean: str | None
) -> None:
    class Watching(Data):
        def model(self) -> nn.Module:
            return Statistics()

        def buffers(self, name: str) -> str | None:
            return rule_of_mean if name == "mean" else None

    run = train(job(strategy, world), Watching)
    expected_values = expected_buffers(lambda name: rule_of_mean if name == "mean" else None, world)
    for rank, buffers in enumerate(expected_values):
        found = dict(run.ranks[rank].prepared.flat.model.named_buffers())
        for name, value in buffers.items():
            assert torch.allclose(found[name], value, rtol=0, atol=1e-12), name


def test_unknown_buffer_rule_is_rejected() -> None:
    class Odd(Data):
        def model(self) -> nn.Module:
            return Statistics()

        def buffers(self, name: str) -> str | None:
            return "average"

    with pytest.raises(ValueError, match="must give one of"):
        train(job("ring", 2), Odd)


def shares_and_flat(model: nn.Module, *samples: int) -> tuple[Shares, FlatModel]:
    return Shares(lambda step: samples, lambda step: [min(1, s) for s in samples]), FlatModel(model)


def test_rank_without_samples_is_left_out_of_the_mean() -> None:
    """Rank 0 has no samples, so it does not send its buffers either."""
    fabric, layers = Fabric(3), [nn.BatchNorm1d(2) for _ in range(3)]

    def body(rank: int) -> None:
        shares, flat = shares_and_flat(nn.Sequential(layers[rank]), 0, 1, 3)
        state = ModelState(flat, shares)
        state.connect(fabric.collective(rank))
        state.keep(0)
        if rank:
            mean, count = layers[rank].running_mean, layers[rank].num_batches_tracked
            assert mean is not None and count is not None
            mean.fill_(rank)
            count.fill_(rank * 10)
        state.synchronize(0)

    on_ranks(3, body)
    for layer in layers:
        assert layer.running_mean is not None and layer.num_batches_tracked is not None
        assert layer.running_mean.tolist() == pytest.approx([1.75, 1.75])
        assert int(layer.num_batches_tracked) == 10


def test_constant_buffers_are_not_copied_or_sent() -> None:
    fabric, sent = Fabric(2), []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(2, 2)
            self.register_buffer("constant", torch.zeros(100_000))

    def body(rank: int) -> None:
        shares, flat = shares_and_flat(Net(), 1, 1)
        state, group = ModelState(flat, shares), fabric.collective(rank)
        state.connect(group)
        state.keep(0)
        for step in range(9):
            before = group.traffic.sent_bytes
            state.synchronize(step, changed=state.changed(step))
            state.keep(step + 1)
            sent.append(group.traffic.sent_bytes - before)

    on_ranks(2, body)
    assert not any(sent)


def test_repeated_step_starts_from_the_state_before_it() -> None:
    shares, flat = shares_and_flat(Teacher("data assigned"), 1)
    state, model = ModelState(flat, shares), flat.model
    state.connect(None)
    state.keep(0)
    for step in range(3):
        before = copy.deepcopy(model.state_dict())
        for _ in range(2):  # the first one is interrupted
            model(torch.randn(2, 6, dtype=WIDE))
            state.restore_version(step)
            for name, value in before.items():
                assert torch.equal(model.state_dict()[name], value), name
        model(torch.randn(2, 6, dtype=WIDE))
        state.synchronize(step)
        state.keep(step + 1)


def test_skipped_step_leaves_the_state_unchanged() -> None:
    shares, flat = shares_and_flat(Teacher("in place"), 1)
    state, model = ModelState(flat, shares), flat.model
    state.connect(None)
    state.keep(0)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 6, dtype=WIDE))
    state.synchronize(0)
    state.finish(1, skipped=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert state.restore_version(1)


def test_restore_raises_state_lost_without_a_copy() -> None:
    large = nn.Parameter(torch.zeros(1 << 19), requires_grad=False)
    model = nn.Linear(2, 2)
    model.register_parameter("large", large)
    shares, flat = shares_and_flat(model, 1)
    state = ModelState(flat, shares)
    state.connect(None)
    state.keep(0)
    large.add_(1)
    with pytest.raises(StateLost, match="'large' as it was before the step in flight"):
        state.restore_version(0)
