"""Data, buffers, parameters and schedules that must agree between the ranks of a train function."""

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


def model_of(*layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1), *layers)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def batches(size: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from distplat.prepare(DataLoader(data(), batch_size=size))


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = (model(inputs) - targets).square().mean()
    return loss


def split_by_rank() -> Dataset[Any]:
    return Subset(data(), range(rank(), SAMPLES, 2))


def random_split_by_rank() -> Dataset[Any]:
    distplat.prepare(model_of())
    # `prepare` seeds each rank like this if it has its own process.
    generator = torch.Generator().manual_seed(rank())
    return random_split(data(), [12, 12], generator)[0]


def longer_on_rank_1() -> Dataset[Any]:
    return data(SAMPLES + rank())


def concatenated_in_another_order() -> Dataset[Any]:
    parts = [data(), Subset(data(), range(3))]
    return ConcatDataset(parts[:: -1 if rank() else 1])


class Files(Dataset[Any]):
    """A data set with a file name and a class for each sample."""

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


class FilesOfUserModule(Files):
    """A class of a user's module named `datasets`."""

    __module__ = "datasets"


class WithValues(Dataset[Any]):
    """A data set with an attribute of per-sample values."""

    def __init__(self, values: Any, samples: int = SAMPLES) -> None:
        self.values, self.samples = values, samples

    def __len__(self) -> int:
        return self.samples


class LazyList(list[int]):
    """A list that counts reads of its entries."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return rank()


class Named(Dataset[Any]):
    """A data set indexed by name."""

    names: Any = ("one", "two", "three", "four")

    def __getitem__(self, name: str) -> Any:
        return torch.ones(1)


def recursive_list() -> list[Any]:
    values: list[Any] = [*range(SAMPLES - 1)]
    values.append(values)
    return values


def hugging_face_data(numbers: Sequence[int]) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"x": [[float(number)] for number in numbers]})


def numbers_of_rank() -> range:
    return range(rank(), SAMPLES, 2)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Files(numbers_of_rank()), "other samples on rank 1 than on rank 0"),
        (lambda: Files(numbers_of_rank(), table=True), "other samples on rank 1 than on rank 0"),
        (lambda: [torch.tensor(n) for n in numbers_of_rank()], "other samples on rank 1 than on"),
        (lambda: hugging_face_data(numbers_of_rank()), "other samples on rank 1 than on rank 0"),
        (
            lambda: Subset(Named(), Named.names[rank() :: 2]),
            "other samples on rank 1 than on rank 0",
        ),
        (
            lambda: WithValues([[10, n] for n in numbers_of_rank()], 12),
            "other samples on rank 1 than on rank 0",
        ),
        (split_by_rank, "other samples on rank 1 than on rank 0"),
        (random_split_by_rank, "other samples on rank 1 than on rank 0"),
        (longer_on_rank_1, "25 samples on rank 1, 24 on rank 0"),
        (concatenated_in_another_order, "other samples on rank 1 than on rank 0"),
    ],
)
def test_rejects_data_that_differs_between_ranks(
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
        lambda: hugging_face_data(range(SAMPLES)),
        lambda: Subset(Files(range(SAMPLES)), range(6)),
        lambda: Subset(Named(), Named.names),
        lambda: FilesOfUserModule(range(SAMPLES)),
        lambda: WithValues(np.ma.array(np.zeros(SAMPLES), mask=True)),
        lambda: WithValues(torch.ones(SAMPLES, dtype=torch.complex64).conj()),
        lambda: WithValues([[[object()]] * 2] * SAMPLES),
        lambda: WithValues(np.array([[object()] * 2] * SAMPLES)),
        lambda: WithValues(recursive_list()),
    ],
)
def test_accepts_equal_data_on_all_ranks(make: Callable[[], Any]) -> None:
    call_on_ranks(lambda config: distplat.prepare(DataLoader(make(), batch_size=2)), 2)


class CachingSamples(Dataset[Any]):
    """A data set that caches the samples it has read."""

    def __init__(self) -> None:
        self.numbers = [*range(SAMPLES)]
        self.read: list[Tensor | None] = [None] * SAMPLES
        self.counts = torch.zeros(SAMPLES)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        self.counts[index] += 1
        self.read[index] = sample = torch.rand(2)
        return sample


def test_comparison_does_not_read_lazy_lists() -> None:
    def train(config: Mapping[str, Any]) -> None:
        values = LazyList(range(SAMPLES))
        distplat.prepare(DataLoader(WithValues(values), batch_size=2))
        assert values.reads == 0

    call_on_ranks(train, 2)


def test_comparison_reads_a_part_of_large_samples() -> None:
    array = np.broadcast_to(np.ones(1), (1 << 20, 1 << 30))
    tensor = torch.ones(1).expand(1 << 20, 1 << 30)
    samples: Any = [array, tensor, [[*range(1 << 20)]] * 1000]
    call_on_ranks(lambda config: distplat.prepare(DataLoader(samples, batch_size=1)), 2)


def test_comparison_ignores_cached_samples() -> None:
    def train(config: Mapping[str, Any]) -> None:
        samples = CachingSamples()
        for _ in range(2):
            assert len([*distplat.prepare(DataLoader(samples, batch_size=2))]) == 6
        assert len([*distplat.prepare(DataLoader(Subset(samples, range(8)), batch_size=2))]) == 2

    call_on_ranks(train, 2)


def test_accepts_equal_subsets_on_all_ranks() -> None:
    def train(config: Mapping[str, Any]) -> None:
        part = random_split(data(), [12, 12], torch.Generator().manual_seed(5))[0]
        assert len(distplat.prepare(DataLoader(part, batch_size=3))) == 2

    call_on_ranks(train, 2)


def test_rejects_a_loader_without_batches() -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(DataLoader(data(5), batch_size=4, drop_last=True))

    call_on_ranks(train, 1)
    with pytest.raises(
        SpecError, match="of 5 samples each of 2 workers has less than a batch of 4"
    ):
        call_on_ranks(train, 2)


class Centered(nn.Module):
    """Replaces its buffer in each forward; initially the buffer is None."""

    def __init__(self) -> None:
        super().__init__()
        self.centre: Tensor | None
        self.register_buffer("centre", None)

    def forward(self, values: Tensor) -> Tensor:
        mean = values.detach().mean(0)
        self.centre = mean if self.centre is None else 0.9 * self.centre + 0.1 * mean
        return values - self.centre


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_replaced_buffers_are_those_of_rank_0(strategy: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(model_of(Centered()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _, (inputs, targets) in zip(range(3), batches(), strict=False):
            optimizer.zero_grad()
            backward(loss_of(model, inputs, targets))
            optimizer.step()

    run = call_on_ranks(train, job=function_job(2, strategy=strategy))
    for name, value in run.trained[0].items():
        assert torch.equal(run.trained[1][name], value), name


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_expanded_buffer_is_that_of_rank_0(strategy: str) -> None:
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
def test_rejects_state_that_cannot_be_broadcast(
    add: Callable[[nn.Module], object], text: str, strategy: str
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of()
        add(model)
        distplat.prepare(model)

    with pytest.raises(SpecError, match=text):
        call_on_ranks(train, job=function_job(2, strategy=strategy))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_rejects_a_layer_added_after_prepare(
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
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad


def by_both(model: nn.Sequential, loss: Tensor) -> None:
    own = torch.autograd.grad(loss, [model.get_parameter("0.weight")], retain_graph=True)[0]
    backward(loss)
    model[0].weight.grad = own


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("set_grads", [by_autograd_grad, by_both])
def test_rejects_unaveraged_gradients_with_small_steps(
    set_grads: Callable[[nn.Sequential, Tensor], None], strategy: str
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(model_of())
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
        for _, (inputs, targets) in zip(range(5), batches(), strict=False):
            optimizer.zero_grad()
            set_grads(model, loss_of(model, inputs, targets))
            optimizer.step()

    with pytest.raises(ValueError, match=r"at (step|backward) 3.* each rank trains its own"):
        call_on_ranks(train, job=function_job(2, strategy=strategy))


def test_hooks_are_disabled_under_torch_compile() -> None:
    """A loop may compile its whole step, with backward and update."""
    hooks: list[Any] = [OptimizerWatch._before_step, BucketAverage._average, ServerSum._exchange]
    hooks += [FusedSteps._before_step, FusedSteps._after_step]
    hooks += [ServerUpdates._before_step, ServerUpdates._after_step]
    flat = FlatModel(nn.Linear(1, 1))
    register_gradient_hooks(flat, lambda index, name: None)
    hooks += getattr(flat.parameters[0], "_post_accumulate_grad_hooks").values()  # noqa: B009
    assert len(hooks) == 8 and all(hook._torchdynamo_disable for hook in hooks)


def train_with_lbfgs(loader: Any, model: nn.Module, mean: Callable[[Tensor], Tensor]) -> None:
    """Train with line searches on the losses that a closure returns."""
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
def test_line_search_uses_the_mean_loss_of_all_ranks(strategy: str) -> None:
    job = function_job(2, strategy=strategy)
    as_double = TensorDataset(*(tensor.double() for tensor in data().tensors))
    plain = model_of().double()
    train_with_lbfgs(DataLoader(as_double, 12), plain, lambda loss: loss)

    def train(config: Mapping[str, Any], *, gathers: bool = True) -> None:
        loader = DataLoader(as_double, 6)
        model, loader = distplat.prepare(model_of().double(), loader)
        mean = lambda loss: distplat.gather_for_metrics(loss[None]).mean()  # noqa: E731
        train_with_lbfgs(loader, model, mean if gathers else lambda loss: loss)

    for trained in call_on_ranks(train, job=job).trained:
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-4)
    with pytest.raises((ValueError, MismatchError)):
        call_on_ranks(lambda config: train(config, gathers=False), job=job)


@pytest.mark.parametrize(
    ("once", "sets_epoch", "shuffle", "warnings"),
    [
        (False, False, True, 1),
        (True, False, True, 0),
        (False, True, True, 0),
        (False, False, False, 0),
    ],
)
def test_warns_about_prepare_in_each_epoch(
    once: bool, sets_epoch: bool, shuffle: bool, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        samples, first_loader = data(), None
        for epoch in range(5):
            loader = first_loader or distplat.prepare(DataLoader(samples, 4, shuffle=shuffle))
            first_loader = loader if once else None
            if sets_epoch:
                loader.set_epoch(epoch)
            assert len([*loader])

    call_on_ranks(train, 2)
    assert caplog.text.count("each starts with the order of epoch 0") == warnings


SCHEDULES: dict[str, tuple[Callable[[Any, Any], int], int, bool]] = {
    # 24 samples: the loader has 12 batches; the prepared one has 6 on each of two workers.
    "epochs of the original loader": (lambda original, loader: 2 * len(original), 1, True),
    "one more": (lambda original, loader: 2 * len(original) + 1, 1, True),
    "several batches a step": (lambda original, loader: 2 * (len(original) // 2), 2, True),
    "epochs of the prepared loader": (lambda original, loader: 2 * len(loader), 1, False),
    "half a wave": (lambda original, loader: 4 * len(loader), 1, False),
    "a number": (lambda original, loader: 26, 1, False),
    "by epochs": (lambda original, loader: 4, 6, False),
}
"""By name: the length of the schedule of a loop of two epochs, the batches of a step, and whether
the length is a mistake."""


@pytest.mark.parametrize("scheduler_name", ["OneCycleLR", "CosineAnnealingLR"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_warns_about_schedules_for_the_batches_of_all_workers(
    scheduler_name: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    length, batches_per_step, is_mistake = SCHEDULES[name]

    def train(config: Mapping[str, Any]) -> None:
        model, original = nn.Linear(4, 1), DataLoader(data(), 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = distplat.prepare(original)
        steps = length(original, loader)
        lr_scheduler = torch.optim.lr_scheduler
        scheduler: Any = lr_scheduler.CosineAnnealingLR(optimizer, steps)
        if scheduler_name == "OneCycleLR":
            scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        model, optimizer, scheduler = distplat.prepare(model, optimizer, scheduler)
        for _ in range(2):
            for number, (inputs, targets) in enumerate(loader, 1):
                backward(loss_of(model, inputs, targets))
                if number % batches_per_step == 0:
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            assert len(loader) == 6  # a length read after the schedule does not count

    call_on_ranks(train, 2)
    assert caplog.text.count(f"{scheduler_name} was built for") == is_mistake


def test_prepare_accepts_all_schedulers() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lr_scheduler = torch.optim.lr_scheduler
        first, second = lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)
        both = lr_scheduler.ChainedScheduler([first, second])
        schedulers = [both, lr_scheduler.SequentialLR(optimizer, [first, second], [1])]
        schedulers += [
            lr_scheduler.ReduceLROnPlateau(optimizer),
            lr_scheduler.CyclicLR(optimizer, 0.1, 0.2),
        ]
        assert distplat.prepare(model, *schedulers)[1:] == (*schedulers,)

    call_on_ranks(train, 2)
