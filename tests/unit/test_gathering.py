"""`all_gather` in a task: a loss over all samples of a batch matches one process."""

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
"""Two epochs with two batches of 6 and one of 1, in which all ranks but one have no samples."""
DATA = TensorDataset(
    torch.randn(SAMPLES, 4, dtype=WIDE, generator=torch.Generator().manual_seed(1)),
    torch.randn(SAMPLES, 4, dtype=WIDE, generator=torch.Generator().manual_seed(2)),
)


class Pairs(Task):
    """A contrastive loss of each sample against the batch, in one direction."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(WIDE)

    def train_data(self) -> TensorDataset:
        return DATA

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        queries, keys = model(batch[0]), model(batch[1])
        scores = torch.logsumexp(queries @ distplat.all_gather(keys).T, 1)
        loss: Tensor = (scores - (queries * keys).sum(1)).mean()
        return loss


class BothDirections(Pairs):
    """The loss of the whole batch in both directions, on every worker."""

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        first = distplat.all_gather(model(batch[0]))
        second = distplat.all_gather(model(batch[1]))
        keep = distplat.all_gather(batch[0][:, 0] > -9)
        scores = first[keep] @ second.T
        labels = torch.arange(len(scores))
        loss = nn.functional.cross_entropy(scores, labels)
        return loss + nn.functional.cross_entropy(scores.T, labels) + first.square().mean()


class WithoutGather(Pairs):
    """A loss without `all_gather`."""

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1][:, :3])


def job(strategy: Any, workers: int, **fields: Any) -> Job:
    options = {"epochs": EPOCHS, "seed": 4, **fields}
    optimizer = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    return job_of(strategy, workers, optimizer=optimizer, global_batch_size=BATCH, **options)


def plain(task_cls: type[Task]) -> dict[str, Tensor]:
    """Train in one process, where `all_gather` returns the tensor."""
    torch.manual_seed(4)
    task = task_cls()
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sampler = Sampler(SAMPLES, BATCH, world=1, seed=4)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(task.step(model, DATA[sampler.batch_ids(step).tolist()]))
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


RING = {"name": "ring", "bucket_mb": 1e-4}
"""With a bucket for about each parameter."""
SHARDED = {"name": "ring", "shard_optimizer": True}
TWO_SERVERS = {"name": "ps-sync", "num_servers": 2}
WORLDS: list[tuple[Any, int]] = [(s, n) for s in (RING, "ps-sync") for n in (1, 2, 3)]
WORLDS += [(SHARDED, 2), (TWO_SERVERS, 2)]
REPLICAS = {"name": "hybrid", "pipeline": 1}
WORLDS += [({**REPLICAS, "bucket_mb": 1e-4}, 3), ({**REPLICAS, "data_strategy": "ps-sync"}, 2)]
WORLDS += [({**REPLICAS, "recompute": True}, 2), ({**RING, "overlap": False}, 3)]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("task_cls", [Pairs, BothDirections, WithoutGather])
@pytest.mark.parametrize(("strategy", "workers"), WORLDS)
def test_matches_plain_loop(strategy: Any, workers: int, task_cls: type[Task]) -> None:
    run = train(job(strategy, workers), task_cls)
    for rank in range(workers):
        for name, value in plain(task_cls).items():
            assert torch.allclose(run.parameters(rank)[name], value, rtol=0, atol=1e-10), name


@pytest.mark.parametrize(
    "strategy", [RING, {**REPLICAS, "bucket_mb": 1e-4}], ids=["ring", "hybrid"]
)
@pytest.mark.parametrize("said", [False, True])
def test_hooks_do_not_block_if_a_rank_has_no_samples(
    strategy: Any, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_starts(monkeypatch, start_waits=said)
    trained, expected = train(job(strategy, 3), Pairs).parameters(), plain(Pairs)
    for name, value in expected.items():
        assert torch.allclose(trained[name], value, rtol=0, atol=1e-10), name


def test_result_differs_without_all_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distplat, "all_gather", lambda tensor: tensor, raising=False)
    trained, expected = train(job(RING, 2), Pairs).parameters(), plain(Pairs)
    assert not torch.allclose(trained["0.weight"], expected["0.weight"], rtol=0, atol=1e-4)


UNSUPPORTED: list[tuple[Any, dict[str, Any], str]] = [
    ("ring", {"gradient_accumulation": 2}, "gradient_accumulation: all_gather.*hint: set it to 1"),
    ("ps-async", {}, "with the strategy 'ps-async'.*hint: use `strategy: ring` or `ps-sync`"),
    ({"name": "ps-sync", "backup_workers": 1}, {}, "with `backup_workers`: workers are not in"),
    ({"name": "hybrid", "pipeline": 1, "micro_batches": 2}, {}, "strategy.micro_batches: all_gath"),
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("strategy", "fields", "message"), UNSUPPORTED)
def test_rejects_strategies_without_the_whole_batch(
    strategy: Any, fields: dict[str, Any], message: str, workers: int
) -> None:
    if "backup_workers" in strategy:
        workers = 2
    with pytest.raises(SpecError, match=f"(?s){message}"):
        train(job(strategy, workers, **fields), Pairs)


class PairsAsLoss(Task):
    """`Pairs` with `forward` and `loss` instead of `step`."""

    def model(self) -> nn.Module:
        return Pairs().model()

    def train_data(self) -> TensorDataset:
        return DATA

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]), model(batch[1])

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        queries, keys = outputs
        scores = torch.logsumexp(queries @ distplat.all_gather(keys).T, 1)
        loss: Tensor = (scores - (queries * keys).sum(1)).mean()
        return loss


@pytest.mark.parametrize("strategy", [RING, REPLICAS], ids=str)
def test_no_warning_about_a_loss_that_is_not_a_mean(
    strategy: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The check would call `all_gather` on one worker only."""
    trained = train(job(strategy, 2), PairsAsLoss).parameters()
    assert not any("mean" in message for message in caplog.messages)
    for name, value in plain(Pairs).items():
        assert torch.allclose(trained[name], value, rtol=0, atol=1e-10), name


class Centering(nn.Module):
    """A layer that gathers in forward."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - distplat.all_gather(inputs).mean(0)


class InStages(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), Centering(), nn.Linear(4, 4)).to(WIDE)

    def train_data(self) -> TensorDataset:
        return DATA

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


def test_pipeline_stages_cannot_gather() -> None:
    spec = job({"name": "hybrid", "pipeline": 2, "cut": "even", "micro_batches": 1}, 2)
    with pytest.raises(SpecError, match=r"workers have parts of the model\n.*use `strategy: ring`"):
        train(spec, InStages)


class Single(Pairs):
    def train_data(self) -> Any:
        return Subset(DATA, range(1))


@pytest.fixture
def undetected_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a call of `all_gather` that the code analysis does not find."""
    monkeypatch.setattr(session, "uses_all_gather", lambda task, model: False)


@pytest.mark.usefixtures("undetected_gather")
def test_undetected_gather_is_found_in_a_full_step() -> None:
    trained = train(job(RING, 2), Pairs).parameters()
    for name, value in plain(Pairs).items():
        assert torch.allclose(trained[name], value, rtol=0, atol=1e-10), name


@pytest.mark.usefixtures("undetected_gather")
def test_undetected_gather_fails_if_a_worker_has_no_samples() -> None:
    with pytest.raises(SpecError, match=r"(?s)worker has no samples.*data\.drop_last: true"):
        train(job(RING, 2), Single)


class Uneven(Pairs):
    def step(self, model: nn.Module, batch: Any) -> Tensor:
        width = 1 + int(bool((batch[0] == DATA[0][0]).all(1).any()))
        return distplat.all_gather(model(batch[0])[:, :width]).sum()


def test_error_names_different_shapes() -> None:
    with pytest.raises(RuntimeError, match=r"make different calls of all_gather\(\)") as caught:
        train(job("ring", 2, data={"shuffle": False}), Uneven)
    assert "rank 0 makes call 1 with rows of float64 [2], rank 1 makes call 1" in str(caught.value)


class OnOneRank(Pairs):
    """Calls `all_gather` only on the rank with the first sample."""

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        if (batch[0] == DATA[0][0]).all(1).any():
            outputs = distplat.all_gather(outputs)
        return nn.functional.mse_loss(outputs, torch.zeros_like(outputs))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_call_on_one_rank_fails_without_a_timeout(strategy: str) -> None:
    with pytest.raises(RuntimeError, match=r"make different calls of all_gather\(\)") as caught:
        train(job(strategy, 2, data={"shuffle": False}), OnOneRank)
    assert "rank 1 makes no more calls" in str(caught.value)


def test_rejects_scalars() -> None:
    class Scalar(Pairs):
        def step(self, model: nn.Module, batch: Any) -> Tensor:
            return distplat.all_gather(model(batch[0]).mean())

    with pytest.raises(
        ValueError, match="requires 1 to 8 dimensions, rows first; got a tensor with 0"
    ):
        train(job("ring", 1), Scalar)


def test_verify_computes_the_whole_batch() -> None:
    result = references(
        job_of("ring", 2, steps=STEPS, seed=4, global_batch_size=BATCH),
        lambda switches: switched(Pairs, switches)(),
    )
    assert result.whole is not None
    assert not result.whole.differs
