"""A loss that looks at all samples of a batch is that of one process, however the batch was cut."""

from typing import Any

import pytest
import torch
from blocking_starts import block_starts
from jobs import job_of
from local_run import train
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import distplat
from distplat.platform.errors import SpecError
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.loop import session
from distplat.strategies.task import Task
from distplat.strategies.verification.references import references
from distplat.strategies.verification.switched import switched

WIDE = torch.float64
SAMPLES, BATCH, EPOCHS, STEPS = 13, 6, 2, 6
"""Two batches of 6 and one of 1, where all ranks but one have nothing; twice."""
DATA = TensorDataset(
    torch.randn(SAMPLES, 4, dtype=WIDE, generator=torch.Generator().manual_seed(1)),
    torch.randn(SAMPLES, 4, dtype=WIDE, generator=torch.Generator().manual_seed(2)),
)


class Pairs(Task):
    """Each sample against all of the batch, in one direction: two towers of one shape."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(WIDE)

    def train_data(self) -> TensorDataset:
        return DATA

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        mine, theirs = model(batch[0]), model(batch[1])
        scores = torch.logsumexp(mine @ distplat.all_gather(theirs).T, 1)
        loss: Tensor = (scores - (mine * theirs).sum(1)).mean()
        return loss


class Both(Pairs):
    """The loss of the whole batch, computed by every worker; and a spread."""

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        first = distplat.all_gather(model(batch[0]))
        second = distplat.all_gather(model(batch[1]))
        keep = distplat.all_gather(batch[0][:, 0] > -9)
        scores = first[keep] @ second.T
        labels = torch.arange(len(scores))
        both = nn.functional.cross_entropy(scores, labels)
        return both + nn.functional.cross_entropy(scores.T, labels) + first.square().mean()


class Plain(Pairs):
    """Gathers nothing."""

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1][:, :3])


def job(strategy: Any, workers: int, **fields: Any) -> Job:
    given = {"epochs": EPOCHS, "seed": 4, **fields}
    optimizer = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    return job_of(strategy, workers, optimizer=optimizer, global_batch_size=BATCH, **given)


def plain(kind: type[Task]) -> dict[str, Tensor]:
    """Train in one process; there `all_gather` gives the tensor itself."""
    torch.manual_seed(4)
    task = kind()
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sampler = Sampler(SAMPLES, BATCH, world=1, seed=4)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(task.step(model, DATA[sampler.batch_ids(step).tolist()]))
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


RING = {"name": "ring", "bucket_mb": 1e-4}
"""With a bucket for each parameter, or nearly."""
SHARDED = {"name": "ring", "shard_optimizer": True}
TWO = {"name": "ps-sync", "num_servers": 2}
WORLDS: list[tuple[Any, int]] = [(s, n) for s in (RING, "ps-sync") for n in (1, 2, 3)]
WORLDS += [(SHARDED, 2), (TWO, 2)]
REPLICAS = {"name": "hybrid", "pipeline": 1}
WORLDS += [({**REPLICAS, "bucket_mb": 1e-4}, 3), ({**REPLICAS, "data_strategy": "ps-sync"}, 2)]
WORLDS += [({**REPLICAS, "recompute": True}, 2), ({**RING, "overlap": False}, 3)]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", [Pairs, Both, Plain])
@pytest.mark.parametrize(("strategy", "workers"), WORLDS)
def test_the_batch_is_one(strategy: Any, workers: int, kind: type[Task]) -> None:
    run = train(job(strategy, workers), kind)
    for rank in range(workers):
        for name, value in plain(kind).items():
            assert torch.allclose(run.parameters(rank)[name], value, rtol=0, atol=1e-10), name


@pytest.mark.parametrize(
    "strategy", [RING, {**REPLICAS, "bucket_mb": 1e-4}], ids=["ring", "hybrid"]
)
@pytest.mark.parametrize("said", [False, True])
def test_gradients_wait_where_a_rank_has_no_samples(
    strategy: Any, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_starts(monkeypatch, said=said)
    found, wanted = train(job(strategy, 3), Pairs).parameters(), plain(Pairs)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-10), name


def test_without_it_the_result_would_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distplat, "all_gather", lambda tensor: tensor, raising=False)
    found, expected = train(job(RING, 2), Pairs).parameters(), plain(Pairs)
    assert not torch.allclose(found["0.weight"], expected["0.weight"], rtol=0, atol=1e-4)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ("ring", {"gradient_accumulation": 2}, "gradient_accumulation: all_gather.*hint: set it to 1"),
    ("ps-async", {}, "with the strategy 'ps-async'.*hint: use `strategy: ring` or `ps-sync`"),
    ({"name": "ps-sync", "backup_workers": 1}, {}, "with `backup_workers`: workers are not in"),
    ({"name": "hybrid", "pipeline": 1, "micro_batches": 2}, {}, "strategy.micro_batches: all_gath"),
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("strategy", "more", "text"), REFUSED)
def test_where_the_batch_is_not_at_hand_it_is_refused(
    strategy: Any, more: dict[str, Any], text: str, workers: int
) -> None:
    if "backup_workers" in strategy:
        workers = 2
    with pytest.raises(SpecError, match=f"(?s){text}"):
        train(job(strategy, workers, **more), Pairs)


class ByLoss(Task):
    """As `Pairs`, by a loss of outputs."""

    def model(self) -> nn.Module:
        return Pairs().model()

    def train_data(self) -> TensorDataset:
        return DATA

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]), model(batch[1])

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        mine, theirs = outputs
        scores = torch.logsumexp(mine @ distplat.all_gather(theirs).T, 1)
        loss: Tensor = (scores - (mine * theirs).sum(1)).mean()
        return loss


@pytest.mark.parametrize("strategy", [RING, REPLICAS], ids=str)
def test_whether_it_is_a_mean_over_samples_is_not_looked_at(
    strategy: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It is none, and need not be; and the other workers would have to take part."""
    found = train(job(strategy, 2), ByLoss).parameters()
    assert not any("mean" in one for one in caplog.messages)
    for name, value in plain(Pairs).items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-10), name


class Gathered(nn.Module):
    """Gathers in a forward, and not in the loss."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - distplat.all_gather(inputs).mean(0)


class InStages(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), Gathered(), nn.Linear(4, 4)).to(WIDE)

    def train_data(self) -> TensorDataset:
        return DATA

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


def test_workers_that_have_parts_of_the_model_do_not_gather() -> None:
    of = job({"name": "hybrid", "pipeline": 2, "cut": "even", "micro_batches": 1}, 2)
    with pytest.raises(SpecError, match=r"workers have parts of the model\n.*use `strategy: ring`"):
        train(of, InStages)


class Single(Pairs):
    def train_data(self) -> Any:
        return Subset(DATA, range(1))


@pytest.fixture
def unexpected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the code named it in some way that is not found."""
    monkeypatch.setattr(session, "uses_all_gather", lambda task, model: False)


@pytest.mark.usefixtures("unexpected")
def test_one_that_nobody_expects_is_learnt_of_in_a_full_step() -> None:
    found = train(job(RING, 2), Pairs).parameters()
    for name, value in plain(Pairs).items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-10), name


@pytest.mark.usefixtures("unexpected")
def test_one_that_nobody_expects_is_told_where_a_worker_has_nothing() -> None:
    with pytest.raises(SpecError, match=r"(?s)worker has no samples.*data\.drop_last: true"):
        train(job(RING, 2), Single)


class Uneven(Pairs):
    def step(self, model: nn.Module, batch: Any) -> Tensor:
        width = 1 + int(bool((batch[0] == DATA[0][0]).all(1).any()))
        return distplat.all_gather(model(batch[0])[:, :width]).sum()


def test_workers_that_do_not_call_it_alike_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"make different calls of all_gather\(\)") as caught:
        train(job("ring", 2, data={"shuffle": False}), Uneven)
    assert "rank 0 makes call 1 with rows of float64 [2], rank 1 makes call 1" in str(caught.value)


class OneAlone(Pairs):
    """Calls it on the rank that has the first sample."""

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        if (batch[0] == DATA[0][0]).all(1).any():
            outputs = distplat.all_gather(outputs)
        return nn.functional.mse_loss(outputs, torch.zeros_like(outputs))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_call_that_one_worker_makes_alone_is_told_and_waited_for_by_nobody(strategy: str) -> None:
    with pytest.raises(RuntimeError, match=r"make different calls of all_gather\(\)") as caught:
        train(job(strategy, 2, data={"shuffle": False}), OneAlone)
    assert "rank 1 makes no more calls" in str(caught.value)


def test_a_number_has_no_rows() -> None:
    class Number(Pairs):
        def step(self, model: nn.Module, batch: Any) -> Tensor:
            return distplat.all_gather(model(batch[0]).mean())

    with pytest.raises(
        ValueError, match="requires 1 to 8 dimensions, rows first; got a tensor with 0"
    ):
        train(job("ring", 1), Number)


def test_verify_computes_the_batch_as_one() -> None:
    found = references(
        job_of("ring", 2, steps=STEPS, seed=4, global_batch_size=BATCH),
        lambda switches: switched(Pairs, switches)(),
    )
    assert found.whole is not None
    assert not found.whole.differs
