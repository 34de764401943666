"""`distplat.all_gather` in a train function: a loss over all ranks' samples matches one process."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks, function_job
from plain_functions import assert_equal
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import distplat
from distplat.platform.errors import SpecError

BATCH = 12


class Clip(nn.Module):
    """Two towers and a temperature, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.towers = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.double()
        with torch.no_grad():
            for parameter in self.towers.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                )

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, texts = (
            nn.functional.normalize(tower(inputs))
            for tower, inputs in zip(self.towers, batch, strict=True)
        )
        return images * self.scale.exp(), texts


Loss = Callable[[Tensor, Tensor], Tensor]
"""Computes a loss from this rank's embeddings of images and texts."""


def own_rows(images: Tensor, texts: Tensor) -> Tensor:
    """This rank's rows against those of all ranks, in both directions: open_clip's local loss."""
    first = len(images) * distplat.get_context().rank
    labels = torch.arange(first, first + len(images))
    image_loss = nn.functional.cross_entropy(images @ distplat.all_gather(texts).T, labels)
    return image_loss + nn.functional.cross_entropy(texts @ distplat.all_gather(images).T, labels)


def all_rows(images: Tensor, texts: Tensor) -> Tensor:
    """The loss of the whole batch, on every rank."""
    return full_loss(distplat.all_gather(images), distplat.all_gather(texts))


def full_loss(images: Tensor, texts: Tensor) -> Tensor:
    labels, scores = torch.arange(len(images)), images @ texts.T
    image_loss = nn.functional.cross_entropy(scores, labels)
    return image_loss + nn.functional.cross_entropy(scores.T, labels)


def data_of() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(*torch.randn(2, 4 * BATCH, 4, generator=generator, dtype=torch.float64))


def steps(model: nn.Module, optimizer: Any, loader: Any, *, loss: Loss) -> list[Tensor]:
    """Train an epoch; return the gradients of all steps."""
    grads = []
    for batch in loader:
        backward(loss(*model(batch)))
        grads += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return grads


def training_objects(world: int) -> tuple[Clip, Any, DataLoader[Any]]:
    model = Clip()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, DataLoader(data_of(), BATCH // world)


@pytest.mark.parametrize("loss", [own_rows, all_rows])
@pytest.mark.parametrize(
    ("strategy", "world"), [("ring", 1), ("ring", 2), ("ring", 3), ("ps-sync", 2), ("ps-sync", 3)]
)
def test_gradients_match_one_process(strategy: str, world: int, loss: Loss) -> None:
    grads: dict[int, list[Tensor]] = {}

    def train(config: Mapping[str, Any]) -> None:
        prepared = distplat.prepare(*training_objects(world))
        grads[distplat.get_context().rank] = steps(*prepared, loss=loss)

    run = call_on_ranks(train, job=function_job(world, strategy=strategy))
    model, *others = training_objects(1)
    expected = steps(model, *others, loss=full_loss)
    for rank in range(world):
        assert_equal(run.trained[rank], model.state_dict())
        for actual, reference in zip(grads[rank], expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-10, atol=1e-12)


def test_without_gradient_gathers_different_numbers_of_rows() -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        with torch.no_grad():
            gathered = distplat.all_gather(torch.full((rank, 2), rank))
        assert gathered.tolist() == [[1, 1], [2, 2], [2, 2]]
        assert distplat.all_gather(torch.tensor([rank > 0])).tolist() == [False, True, True]

    call_on_ranks(train, 3)


@pytest.mark.parametrize("world", [1, 2])
def test_result_does_not_alias_the_tensor(world: int) -> None:
    def train(config: Mapping[str, Any]) -> None:
        tensor = torch.arange(3.0)
        distplat.all_gather(tensor).add_(1)
        assert tensor.tolist() == [0, 1, 2]

    call_on_ranks(train, world)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.complex64])
def test_rejects_unsupported_dtypes(world: int, dtype: torch.dtype) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.all_gather(torch.zeros(2, dtype=dtype))

    with pytest.raises(
        ValueError, match=rf"{dtype}: convert the tensor, .* with \.long\(\), .* float32, "
    ):
        call_on_ranks(train, world)


def run_in_thread(function: Callable[[], object]) -> None:
    """Call a function in another thread; raise its exception here."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result(timeout=60)


def test_rejects_other_threads() -> None:
    """On a GPU, autograd's threads recompute checkpointed parts."""

    def train(config: Mapping[str, Any]) -> None:
        rows = torch.ones(2, 3, requires_grad=True)
        recomputed: Any = checkpoint(distplat.all_gather, rows, use_reentrant=True)
        with pytest.raises(SpecError, match=r"outside the training thread"):
            run_in_thread(recomputed.sum().backward)
        assert len(distplat.all_gather(rows)) == 4, "the training thread gathers"

    call_on_ranks(train, 2)
    call_on_ranks(lambda config: run_in_thread(lambda: distplat.all_gather(torch.ones(1))))
    run_in_thread(lambda: distplat.all_gather(torch.ones(1)))  # outside of a train function


def with_no_sync(images: Tensor, texts: Tensor) -> None:
    with distplat.no_sync():
        backward(own_rows(images, texts) / 4, retain_graph=True)
    backward(own_rows(images, texts) * 3 / 4)


def with_two_backwards(images: Tensor, texts: Tensor) -> None:
    loss = own_rows(images, texts)
    backward(loss / 4, retain_graph=True)
    backward(loss * 3 / 4)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("step", [with_no_sync, with_two_backwards])
def test_gradient_may_be_accumulated(strategy: str, step: Callable[[Tensor, Tensor], None]) -> None:
    grads: dict[int, list[Any]] = {}

    def train(config: Mapping[str, Any]) -> None:
        rank, model = distplat.get_context().rank, distplat.prepare(Clip())
        part = [t[:BATCH][BATCH // 2 * rank :][: BATCH // 2] for t in data_of().tensors]
        step(*model(part))
        grads[rank] = [p.grad for p in model.parameters()]

    call_on_ranks(train, job=function_job(2, strategy=strategy))
    model = Clip()
    backward(full_loss(*model([tensor[:BATCH] for tensor in data_of().tensors])))
    for rank in range(2):
        for grad, parameter in zip(grads[rank], model.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-12)


def test_different_shapes_name_the_ranks() -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.all_gather(torch.zeros(2, 1 + distplat.get_context().rank))

    with pytest.raises(RuntimeError, match=r"rank 0 makes call 1 .*\[1\], rank 1 makes call 1"):
        call_on_ranks(train, 2)


@pytest.mark.parametrize("world", [1, 2])
def test_ps_async_cannot_gather(world: int) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.all_gather(torch.zeros(1))

    with pytest.raises(SpecError, match=r"(?s)with 'ps-async'.*hint: use `strategy: ring`"):
        call_on_ranks(train, job=function_job(world, strategy="ps-async"))
