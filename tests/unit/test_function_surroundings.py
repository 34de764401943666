"""What ranks of a train function must have alike: data, buffers, and no parameters of their own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from function_ranks import call_on_ranks, function_job
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

import distplat
from distplat.platform.errors import MismatchError, SpecError
from distplat.strategies.function.fused_kernel import FusedSteps
from distplat.strategies.function.gradient_average import BucketAverage
from distplat.strategies.function.loop_checks import OptimizerWatch
from distplat.strategies.function.server_sum import ServerSum
from distplat.strategies.function.server_updates import ServerUpdates
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.reduction.bucket_reducer import register_gradient_hooks

SAMPLES = 24


def data(samples: int = SAMPLES) -> TensorDataset:
    inputs = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


def rank() -> int:
    return distplat.get_context().get_world_rank()


def model_of(*more: nn.Module) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), *more)
    with torch.no_grad():
        for number, one in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            one.copy_(torch.randn(one.shape, generator=generator))
    return model


def batches(size: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from distplat.prepare(DataLoader(data(), batch_size=size))


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = (model(inputs) - targets).square().mean()
    return loss


def cut_by_rank() -> Dataset[Any]:
    return Subset(data(), range(rank(), SAMPLES, 2))


def split_at_random() -> Dataset[Any]:
    distplat.prepare(model_of())
    generator = torch.Generator().manual_seed(rank())  # as prepare(model) seeds in a process
    return random_split(data(), [12, 12], generator)[0]


def longer_on_rank_1() -> Dataset[Any]:
    return data(SAMPLES + rank())


def joined_in_another_order() -> Dataset[Any]:
    parts = [data(), Subset(data(), range(3))]
    return ConcatDataset(parts[:: -1 if rank() else 1])


class Files(Dataset[Any]):
    """Knows a file, and a class, for each sample."""

    def __init__(
        self, numbers: Sequence[int], folder: str = "/data", *, table: bool = False
    ) -> None:
        self.folder, self.opened = folder, rank()
        self.files = [(f"{folder}/{number}.png", number % 3) for number in numbers]
        self.frame: Any = None
        if table:
            pandas = pytest.importorskip("pandas")
            self.frame = pandas.DataFrame({"file": [*map(str, numbers)], "kind": 0})
            self.files = []

    def __len__(self) -> int:
        return len(self.files if self.frame is None else self.frame)

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("no sample is read to compare data sets")


class OfOwnModule(Files):
    """Of a user's own `datasets.py`."""

    __module__ = "datasets"


class Keeps(Dataset[Any]):
    """Has something by sample."""

    def __init__(self, values: Any, samples: int = SAMPLES) -> None:
        self.values, self.samples = values, samples

    def __len__(self) -> int:
        return self.samples


class Reads(list[int]):
    """Reads each of its entries from a file."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return rank()


class Named(Dataset[Any]):
    """Has samples by name."""

    names: Any = ("one", "two", "three", "four")

    def __getitem__(self, name: str) -> Any:
        return torch.ones(1)


def holding_itself() -> list[Any]:
    values: list[Any] = [*range(SAMPLES - 1)]
    values.append(values)
    return values


def of_hugging_face(numbers: Sequence[int]) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"x": [[float(number)] for number in numbers]})


def own_numbers() -> range:
    return range(rank(), SAMPLES, 2)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Files(own_numbers()), "other samples on rank 1 than on rank 0"),
        (lambda: Files(own_numbers(), table=True), "other samples on rank 1 than on rank 0"),
        (lambda: [torch.tensor(one) for one in own_numbers()], "other samples on rank 1 than on"),
        (lambda: of_hugging_face(own_numbers()), "other samples on rank 1 than on rank 0"),
        (
            lambda: Subset(Named(), Named.names[rank() :: 2]),
            "other samples on rank 1 than on rank 0",
        ),
        (
            lambda: Keeps([[10, n] for n in own_numbers()], 12),
            "other samples on rank 1 than on rank 0",
        ),
        (cut_by_rank, "other samples on rank 1 than on rank 0"),
        (split_at_random, "other samples on rank 1 than on rank 0"),
        (longer_on_rank_1, "25 samples on rank 1, 24 on rank 0"),
        (joined_in_another_order, "other samples on rank 1 than on rank 0"),
    ],
)
def test_data_of_one_rank_alone_are_not_dealt_out(
    make: Callable[[], Dataset[Any]], text: str
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(DataLoader(make(), batch_size=2))

    with pytest.raises(SpecError, match=text):
        call_on_ranks(train, 2)
    call_on_ranks(train, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Files(range(SAMPLES), f"/scratch/node-{rank()}"),
        lambda: Files(range(SAMPLES), table=True),
        lambda: [*range(SAMPLES)],
        lambda: of_hugging_face(range(SAMPLES)),
        lambda: Subset(Files(range(SAMPLES)), range(6)),
        lambda: Subset(Named(), Named.names),
        lambda: OfOwnModule(range(SAMPLES)),
        lambda: Keeps(np.ma.array(np.zeros(SAMPLES), mask=True)),
        lambda: Keeps(torch.ones(SAMPLES, dtype=torch.complex64).conj()),
        lambda: Keeps([[[object()]] * 2] * SAMPLES),
        lambda: Keeps(np.array([[object()] * 2] * SAMPLES)),
        lambda: Keeps(holding_itself()),
    ],
)
def test_the_same_data_on_all_ranks_are_dealt_out(make: Callable[[], Any]) -> None:
    call_on_ranks(lambda config: distplat.prepare(DataLoader(make(), batch_size=2)), 2)


class Remembers(Dataset[Any]):
    """Keeps samples that it has read, each rank its own."""

    def __init__(self) -> None:
        self.numbers = [*range(SAMPLES)]
        self.read: list[Tensor | None] = [None] * SAMPLES
        self.counts = torch.zeros(SAMPLES)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        self.counts[index] += 1
        self.read[index] = found = torch.rand(2)
        return found


def test_a_list_that_reads_its_entries_is_left_alone() -> None:
    def train(config: Mapping[str, Any]) -> None:
        values = Reads(range(SAMPLES))
        distplat.prepare(DataLoader(Keeps(values), batch_size=2))
        assert values.reads == 0

    call_on_ranks(train, 2)


def test_little_is_read_of_large_samples() -> None:
    array = np.broadcast_to(np.ones(1), (1 << 20, 1 << 30))
    tensor = torch.ones(1).expand(1 << 20, 1 << 30)
    samples: Any = [array, tensor, [[*range(1 << 20)]] * 1000]
    call_on_ranks(lambda config: distplat.prepare(DataLoader(samples, batch_size=1)), 2)


def test_what_ranks_have_read_meanwhile_is_not_compared() -> None:
    def train(config: Mapping[str, Any]) -> None:
        samples = Remembers()
        for _ in range(2):
            assert len([*distplat.prepare(DataLoader(samples, batch_size=2))]) == 6
        assert len([*distplat.prepare(DataLoader(Subset(samples, range(8)), batch_size=2))]) == 2

    call_on_ranks(train, 2)


def test_the_same_part_of_the_data_on_all_ranks_is_dealt_out() -> None:
    def train(config: Mapping[str, Any]) -> None:
        part = random_split(data(), [12, 12], torch.Generator().manual_seed(5))[0]
        assert len(distplat.prepare(DataLoader(part, batch_size=3))) == 2

    call_on_ranks(train, 2)


def test_a_loader_that_gives_no_batch_is_refused() -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(DataLoader(data(5), batch_size=4, drop_last=True))

    call_on_ranks(train, 1)
    with pytest.raises(
        SpecError, match="of 5 samples each of 2 workers has less than a batch of 4"
    ):
        call_on_ranks(train, 2)


class Centred(nn.Module):
    """Puts another tensor in the place of its buffer in each forward, which is None at first."""

    def __init__(self) -> None:
        super().__init__()
        self.centre: Tensor | None
        self.register_buffer("centre", None)

    def forward(self, values: Tensor) -> Tensor:
        mean = values.detach().mean(0)
        self.centre = mean if self.centre is None else 0.9 * self.centre + 0.1 * mean
        return values - self.centre


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_buffers_that_a_forward_replaces_are_rank_0s(strategy: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(model_of(Centred()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _, (inputs, targets) in zip(range(3), batches(), strict=False):
            optimizer.zero_grad()
            backward(loss_of(model, inputs, targets))
            optimizer.step()

    run = call_on_ranks(train, job=function_job(2, strategy=strategy))
    for name, value in run.trained[0].items():
        assert torch.equal(run.trained[1][name], value), name


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_an_expanded_buffer_is_rank_0s(strategy: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of()
        model.register_buffer("scale", torch.full((2, 1), 1.0 + rank()).expand(2, 3))
        distplat.prepare(model)
        assert model.get_buffer("scale").tolist() == [[1.0] * 3] * 2

    call_on_ranks(train, job=function_job(2, strategy=strategy))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
@pytest.mark.parametrize(
    ("add", "text"),
    [
        (lambda m: m.register_buffer("graph", torch.eye(2).to_sparse()), "the state 'graph'"),
        (lambda m: m.append(nn.LazyLinear(2)), "'3.weight', '3.bias' of the model have no shape"),
    ],
)
def test_what_ranks_cannot_take_over_is_named(
    add: Callable[[nn.Module], object], text: str, strategy: str
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of()
        add(model)
        distplat.prepare(model)

    with pytest.raises(SpecError, match=text):
        call_on_ranks(train, job=function_job(2, strategy=strategy))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_layer_that_came_after_prepare_is_refused_where_it_would_be_trained(
    strategy: str,
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(model_of())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        for step, (inputs, targets) in zip(range(8), batches(), strict=False):
            if step == 5:
                model.append(nn.Linear(1, 1))
                optimizer.add_param_group({"params": model[3].parameters()})
            optimizer.zero_grad()
            backward(loss_of(model, inputs, targets))
            optimizer.step()

    with pytest.raises(SpecError, match="would update 2 parameters of no model that prepare"):
        call_on_ranks(train, job=function_job(2, strategy=strategy))


def by_autograd_grad(model: nn.Sequential, loss: Tensor) -> None:
    every = list(model.parameters())
    for one, grad in zip(every, torch.autograd.grad(loss, every), strict=True):
        one.grad = grad


def by_both(model: nn.Sequential, loss: Tensor) -> None:
    own = torch.autograd.grad(loss, [model.get_parameter("0.weight")], retain_graph=True)[0]
    backward(loss)
    model[0].weight.grad = own


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("way", [by_autograd_grad, by_both])
def test_gradients_of_one_rank_are_found_however_small_the_steps(
    way: Callable[[nn.Sequential, Tensor], None], strategy: str
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(model_of())
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
        for _, (inputs, targets) in zip(range(5), batches(), strict=False):
            optimizer.zero_grad()
            way(model, loss_of(model, inputs, targets))
            optimizer.step()

    with pytest.raises(ValueError, match=r"at (step|backward) 3.* each rank trains its own"):
        call_on_ranks(train, job=function_job(2, strategy=strategy))


def test_a_loop_may_compile_its_whole_step() -> None:
    """With backward and the update: what of ours is called there stays out of it."""
    hooks: list[Any] = [OptimizerWatch._before_step, BucketAverage._average, ServerSum._exchange]
    hooks += [FusedSteps._before_step, FusedSteps._after_step]
    hooks += [ServerUpdates._before_step, ServerUpdates._after_step]
    flat = FlatModel(nn.Linear(1, 1))
    register_gradient_hooks(flat, lambda index, name: None)
    hooks += getattr(flat.parameters[0], "_post_accumulate_grad_hooks").values()  # noqa: B009
    assert len(hooks) == 8 and all(one._torchdynamo_disable for one in hooks)


def searched(loader: Any, model: nn.Module, mean: Callable[[Tensor], Tensor]) -> None:
    """Train by line searches, each of which goes by the losses that a closure gives."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=6, line_search_fn="strong_wolfe")
    for _ in range(2):
        for batch in loader:

            def closure(batch: Any = batch) -> Any:
                optimizer.zero_grad()
                loss = loss_of(model, *batch)
                backward(loss)
                return mean(loss.detach())

            optimizer.step(closure)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_line_search_goes_by_the_mean_loss_of_all_ranks(strategy: str) -> None:
    own = function_job(2, strategy=strategy)
    as_double = TensorDataset(*(one.double() for one in data().tensors))
    plain = model_of().double()
    searched(DataLoader(as_double, 12), plain, lambda loss: loss)

    def train(config: Mapping[str, Any], *, gathers: bool = True) -> None:
        loader = DataLoader(as_double, 6)
        model, loader = distplat.prepare(model_of().double(), loader)
        mean = lambda loss: distplat.gather_for_metrics(loss[None]).mean()  # noqa: E731
        searched(loader, model, mean if gathers else lambda loss: loss)

    for found in call_on_ranks(train, job=own).trained:
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    with pytest.raises((ValueError, MismatchError)):
        call_on_ranks(lambda config: train(config, gathers=False), job=own)


@pytest.mark.parametrize(
    ("once", "numbered", "shuffle", "warned"),
    [
        (False, False, True, 1),
        (True, False, True, 0),
        (False, True, True, 0),
        (False, False, False, 0),
    ],
)
def test_a_loader_that_is_prepared_anew_for_each_epoch_is_told(
    once: bool, numbered: bool, shuffle: bool, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        samples, kept = data(), None
        for epoch in range(5):
            loader = kept or distplat.prepare(DataLoader(samples, 4, shuffle=shuffle))
            kept = loader if once else None
            if numbered:
                loader.set_epoch(epoch)
            assert len([*loader])

    call_on_ranks(train, 2)
    assert caplog.text.count("each starts with the order of epoch 0") == warned


SCHEDULES: dict[str, tuple[Callable[[Any, Any], int], int, bool]] = {
    # Of 24 samples: 12 batches of the loader that the script has made, 6 of each of two workers.
    "epochs of what was given": (lambda given, loader: 2 * len(given), 1, True),
    "one more": (lambda given, loader: 2 * len(given) + 1, 1, True),
    "several batches a step": (lambda given, loader: 2 * (len(given) // 2), 2, True),
    "epochs of what is prepared": (lambda given, loader: 2 * len(loader), 1, False),
    "half a wave": (lambda given, loader: 4 * len(loader), 1, False),
    "a number": (lambda given, loader: 26, 1, False),
    "by epochs": (lambda given, loader: 4, 6, False),
}
"""By name the steps that a loop of two epochs makes a schedule for, the batches of a step, and
whether it is a mistake."""


@pytest.mark.parametrize("kind", ["OneCycleLR", "CosineAnnealingLR"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_for_the_batches_of_all_workers_is_told(
    kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    length, every, told = SCHEDULES[name]

    def train(config: Mapping[str, Any]) -> None:
        model, given = nn.Linear(4, 1), DataLoader(data(), 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = distplat.prepare(given)
        steps = length(given, loader)
        schedulers = torch.optim.lr_scheduler
        scheduler: Any = schedulers.CosineAnnealingLR(optimizer, steps)
        if kind == "OneCycleLR":
            scheduler = schedulers.OneCycleLR(optimizer, 0.1, total_steps=steps)
        model, optimizer, scheduler = distplat.prepare(model, optimizer, scheduler)
        for _ in range(2):
            for number, (inputs, targets) in enumerate(loader, 1):
                backward(loss_of(model, inputs, targets))
                if number % every == 0:
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            assert len(loader) == 6  # what is asked now has made no schedule

    call_on_ranks(train, 2)
    assert caplog.text.count(f"{kind} was built for") == told


def test_schedulers_of_every_kind_are_prepared() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kinds = torch.optim.lr_scheduler
        first, second = kinds.LinearLR(optimizer), kinds.ExponentialLR(optimizer, 0.9)
        both = kinds.ChainedScheduler([first, second])
        every = [both, kinds.SequentialLR(optimizer, [first, second], [1])]
        every += [kinds.ReduceLROnPlateau(optimizer), kinds.CyclicLR(optimizer, 0.1, 0.2)]
        assert distplat.prepare(model, *every)[1:] == (*every,)

    call_on_ranks(train, 2)
