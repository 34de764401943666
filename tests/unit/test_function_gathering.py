"""`distplat.all_gather` in a train function: a loss over all ranks' samples is one process's."""

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
    """Two towers and a temperature, as CLIP has them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.towers = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.double()
        with torch.no_grad():
            for one in self.towers.parameters():
                one.copy_(torch.randn(one.shape, generator=generator, dtype=torch.float64))

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, texts = (
            nn.functional.normalize(tower(one))
            for tower, one in zip(self.towers, batch, strict=True)
        )
        return images * self.scale.exp(), texts


Loss = Callable[[Tensor, Tensor], Tensor]
"""Of this rank's images and texts."""


def own_rows(images: Tensor, texts: Tensor) -> Tensor:
    """Each rank's rows against those of all, in both directions, as open_clip's local loss."""
    first = len(images) * distplat.get_context().rank
    labels = torch.arange(first, first + len(images))
    there = nn.functional.cross_entropy(images @ distplat.all_gather(texts).T, labels)
    return there + nn.functional.cross_entropy(texts @ distplat.all_gather(images).T, labels)


def all_rows(images: Tensor, texts: Tensor) -> Tensor:
    """The loss of the whole batch, computed by every rank."""
    return whole(distplat.all_gather(images), distplat.all_gather(texts))


def whole(images: Tensor, texts: Tensor) -> Tensor:
    labels, scores = torch.arange(len(images)), images @ texts.T
    there = nn.functional.cross_entropy(scores, labels)
    return there + nn.functional.cross_entropy(scores.T, labels)


def data_of() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(*torch.randn(2, 4 * BATCH, 4, generator=generator, dtype=torch.float64))


def steps(model: nn.Module, optimizer: Any, loader: Any, *, loss: Loss) -> list[Tensor]:
    """Train an epoch; give the gradients of all steps."""
    found = []
    for batch in loader:
        backward(loss(*model(batch)))
        found += [one.grad.clone() for one in model.parameters() if one.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return found


def parts_of(world: int) -> tuple[Clip, Any, DataLoader[Any]]:
    model = Clip()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, DataLoader(data_of(), BATCH // world)


@pytest.mark.parametrize("loss", [own_rows, all_rows])
@pytest.mark.parametrize(
    ("strategy", "world"), [("ring", 1), ("ring", 2), ("ring", 3), ("ps-sync", 2), ("ps-sync", 3)]
)
def test_gradients_are_those_of_one_process_on_the_whole_batch(
    strategy: str, world: int, loss: Loss
) -> None:
    grads: dict[int, list[Tensor]] = {}

    def train(config: Mapping[str, Any]) -> None:
        prepared = distplat.prepare(*parts_of(world))
        grads[distplat.get_context().rank] = steps(*prepared, loss=loss)

    run = call_on_ranks(train, job=function_job(world, strategy=strategy))
    model, *others = parts_of(1)
    wanted = steps(model, *others, loss=whole)
    for rank in range(world):
        assert_equal(run.trained[rank], model.state_dict())
        for found, one in zip(grads[rank], wanted, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-10, atol=1e-12)


def test_without_gradient_it_gathers_rows_of_any_number() -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        with torch.no_grad():
            found = distplat.all_gather(torch.full((rank, 2), rank))
        assert found.tolist() == [[1, 1], [2, 2], [2, 2]]
        assert distplat.all_gather(torch.tensor([rank > 0])).tolist() == [False, True, True]

    call_on_ranks(train, 3)


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_written_into_the_rows_is_not_in_the_tensor(world: int) -> None:
    def train(config: Mapping[str, Any]) -> None:
        given = torch.arange(3.0)
        distplat.all_gather(given).add_(1)
        assert given.tolist() == [0, 1, 2]

    call_on_ranks(train, world)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.complex64])
def test_a_type_that_it_does_not_take_is_told(world: int, kind: torch.dtype) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.all_gather(torch.zeros(2, dtype=kind))

    with pytest.raises(
        ValueError, match=rf"{kind}: convert the tensor, .* with \.long\(\), .* float32, "
    ):
        call_on_ranks(train, world)


def in_another_thread(work: Callable[[], object]) -> None:
    """Do some work in a thread of its own; raises what it raises."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(timeout=60)


def test_in_another_thread_it_is_refused() -> None:
    """Autograd's own threads compute checkpointed parts again on a GPU."""

    def train(config: Mapping[str, Any]) -> None:
        rows = torch.ones(2, 3, requires_grad=True)
        again: Any = checkpoint(distplat.all_gather, rows, use_reentrant=True)
        with pytest.raises(SpecError, match=r"outside the training thread"):
            in_another_thread(again.sum().backward)
        assert len(distplat.all_gather(rows)) == 4, "in its own thread it gathers"

    call_on_ranks(train, 2)
    call_on_ranks(lambda config: in_another_thread(lambda: distplat.all_gather(torch.ones(1))))
    in_another_thread(lambda: distplat.all_gather(torch.ones(1)))  # nothing is under way


def accumulated(images: Tensor, texts: Tensor) -> None:
    with distplat.no_sync():
        backward(own_rows(images, texts) / 4, retain_graph=True)
    backward(own_rows(images, texts) * 3 / 4)


def in_two_backwards(images: Tensor, texts: Tensor) -> None:
    loss = own_rows(images, texts)
    backward(loss / 4, retain_graph=True)
    backward(loss * 3 / 4)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("step", [accumulated, in_two_backwards])
def test_the_gradient_may_come_in_parts(
    strategy: str, step: Callable[[Tensor, Tensor], None]
) -> None:
    grads: dict[int, list[Any]] = {}

    def train(config: Mapping[str, Any]) -> None:
        rank, model = distplat.get_context().rank, distplat.prepare(Clip())
        part = [one[:BATCH][BATCH // 2 * rank :][: BATCH // 2] for one in data_of().tensors]
        step(*model(part))
        grads[rank] = [one.grad for one in model.parameters()]

    call_on_ranks(train, job=function_job(2, strategy=strategy))
    model = Clip()
    backward(whole(*model([one[:BATCH] for one in data_of().tensors])))
    for rank in range(2):
        for found, one in zip(grads[rank], model.parameters(), strict=True):
            torch.testing.assert_close(found, one.grad, rtol=1e-10, atol=1e-12)


def test_ranks_that_call_it_otherwise_are_named() -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.all_gather(torch.zeros(2, 1 + distplat.get_context().rank))

    with pytest.raises(RuntimeError, match=r"rank 0 makes call 1 .*\[1\], rank 1 makes call 1"):
        call_on_ranks(train, 2)


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_at_their_own_pace_cannot_gather(world: int) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.all_gather(torch.zeros(1))

    with pytest.raises(SpecError, match=r"(?s)with 'ps-async'.*hint: use `strategy: ring`"):
        call_on_ranks(train, job=function_job(world, strategy="ps-async"))
