"""Runs in memory: sharded embeddings match `nn.Embedding` in one process."""

import time
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from embedding_jobs import LocalWords, job, table
from local_run import Attempt, LocalRun, train
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate
from words import ROWS, WIDTH, Net, Words

from distplat import Task, Trainer
from distplat.nn import ShardedEmbedding, ShardedEmbeddingBag, connect
from distplat.platform.errors import CollectiveError, StorageError
from distplat.platform.progress import StepReport
from distplat.strategies.loop.control import StepControl
from distplat.strategies.ring import Ring, RingOptions
from distplat.strategies.ring_worker import RingWorker
from distplat.strategies.sparse.lookups import Lookups


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return train(job(LocalWords, 1), LocalWords).parameters()


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, {}),
        (2, {}),
        (3, {"gradient_accumulation": 2}),
        (2, {"strategy": "ps-sync"}),
        (2, {"servers": 3}),
    ],
    ids=str,
)
def test_matches_one_process_with_local_tables(
    reference: dict[str, Tensor], world: int, options: dict[str, Any]
) -> None:
    run = train(job(Words, world, **options), Words)
    for name, value in run.parameters().items():
        torch.testing.assert_close(value, reference[name], rtol=1e-5, atol=1e-6)
    for number, name in enumerate(("words", "tags")):
        rows = torch.from_numpy(table(run, number))
        exists = ~rows[:, 0].isnan()
        assert exists.sum() in (21, 22, 23)
        # The padding, and an id of the evaluation only.
        assert not exists[0 if name == "tags" else 39]
        torch.testing.assert_close(
            rows[exists], reference[f"{name}.weight"][exists], rtol=1e-5, atol=1e-6
        )


class Incomplete(Words):
    """Every third sample is None, and `collate` drops it."""

    def train_data(self) -> Any:
        data: Any = super().train_data()
        return [None if n % 3 == 1 else data[n] for n in range(len(data))]

    def collate(self, samples: list[Any]) -> Any:
        return default_collate([sample for sample in samples if sample is not None])


class LocalIncomplete(Incomplete, LocalWords):
    """The same with `nn.Embedding`."""


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_rows_have_the_mean_over_the_samples_that_collate_keeps(strategy: str, world: int) -> None:
    in_order: dict[str, Any] = {"data": {"shuffle": False}}
    local = train(job(LocalWords, 1, **in_order), LocalIncomplete).parameters()
    run = train(job(Words, world, strategy=strategy, **in_order), Incomplete)
    for name, value in run.parameters().items():
        torch.testing.assert_close(value, local[name], rtol=1e-5, atol=1e-6)
    for number, name in enumerate(("words", "tags")):
        rows = torch.from_numpy(table(run, number))
        exists = ~rows[:, 0].isnan()
        assert exists.sum() > 15
        torch.testing.assert_close(
            rows[exists], local[f"{name}.weight"][exists], rtol=1e-5, atol=1e-6
        )


class Attacked(Words):
    """Runs a backward in its evaluations, as adversarial attacks do."""

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        ids, targets = batch
        if not model.training:
            with torch.enable_grad():
                torch.autograd.backward(nn.functional.cross_entropy(model(ids), targets))
        return nn.functional.cross_entropy(model(ids), targets)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_backward_in_an_evaluation_does_not_train_rows(strategy: str) -> None:
    more: dict[str, Any] = {"strategy": strategy, "evaluation": {"every_steps": 1}}
    run, plain = train(job(Words, 2, **more), Attacked), train(job(Words, 2, **more), Words)
    for number in range(2):
        assert table(run, number).tobytes() == table(plain, number).tobytes()


class Weighted(Words):
    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        weights = targets + 1.0
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return (losses * weights).sum(), weights.sum()


class LocalWeighted(Weighted, LocalWords):
    """The same with `nn.Embedding`."""


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_rows_have_the_weighted_mean(strategy: str) -> None:
    """Two of three ranks have no sample in the last step of an epoch."""
    local = train(job(LocalWords, 1), LocalWeighted).parameters()
    run = train(job(Words, 3, strategy=strategy), Weighted)
    for number, name in enumerate(("words", "tags")):
        rows = torch.from_numpy(table(run, number))
        exists = ~rows[:, 0].isnan()
        expected = local[f"{name}.weight"][exists]
        torch.testing.assert_close(rows[exists], expected, rtol=1e-5, atol=1e-6)


class WeightedBySome(Words):
    """Some batches have a weighted loss, and others a mean."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        loss = super().loss(outputs, targets)
        return (loss * 7.0, 7.0) if int(targets[0]) == 1 else loss


def test_loss_with_weights_for_some_batches_is_an_error() -> None:
    with pytest.raises(ValueError, match="return the same form for every batch"):
        train(job(Words, 3), WeightedBySome)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("optimizer", ["Adagrad", "SparseAdam", "RowWiseAdagrad"])
def test_repeated_runs_are_bit_identical(optimizer: str) -> None:
    embeddings = {"servers": 2, "optimizer": {"name": optimizer, "lr": 0.1}}
    spec = job(Words, 3, embeddings=embeddings)
    first, second = train(spec, Words), train(spec, Words)
    for number in range(2):
        assert table(first, number).tobytes() == table(second, number).tobytes()


def test_asynchronous_tables_with_one_rank_match_synchronous() -> None:
    runs = []
    for strategy, asynchronous in (("ring", False), ("ring", True), ("ps-async", True)):
        optimizer = {"name": "Adagrad", "lr": 0.5}
        embeddings = {"optimizer": optimizer, "asynchronous": asynchronous, "servers": 2}
        runs.append(train(job(Words, 1, strategy=strategy, embeddings=embeddings), Words))
    for number in range(2):
        first, second, third = (table(run, number).tobytes() for run in runs)
        assert first == second == third


def test_asynchronous_ranks_reduce_the_loss() -> None:
    embeddings = {"optimizer": {"name": "SGD", "lr": 0.5}, "asynchronous": True, "servers": 2}
    spec = job(Words, 3, strategy="ps-async", embeddings=embeddings, epochs=20)
    run = train(spec, Words)
    reports = [r for of_rank in run.reports for r in of_rank if isinstance(r, StepReport)]
    steps = run.ranks[0].prepared.total_steps
    assert sorted((r.step, r.rank) for r in reports) == [
        (step, rank) for step in range(steps) for rank in range(3)
    ]
    first, last = (mean([r.loss for r in reports if r.step == step]) for step in (0, steps - 1))
    assert last < 0.3 * first
    assert {service.store.ledger.steps for service in run.tables.table_servers} == {steps}
    assert {r.figures["rows"] > 0 for r in reports if r.samples} == {True}


def test_hash_and_range_partition_are_bit_identical() -> None:
    runs = []
    for partition in ("hash", "range"):
        embeddings = {
            "servers": 3,
            "partition": partition,
            "optimizer": {"name": "SGD", "lr": 0.5},
        }
        runs.append(train(job(Words, 2, embeddings=embeddings), Words))
    first, second = (table(run, 0) for run in runs)
    assert first.tobytes() == second.tobytes()


def test_unbounded_ids() -> None:
    class UnboundedWords(Words):
        def model(self) -> nn.Module:
            return Net(ShardedEmbedding(None, WIDTH), ShardedEmbeddingBag(None, WIDTH))

        def train_data(self) -> Dataset[Any]:
            ids, targets = super().train_data().tensors  # type: ignore[attr-defined]
            return TensorDataset(ids * 2**57 + 1, targets)

    run = train(job(Words, 2), UnboundedWords)
    assert sum(rows for s in run.tables.table_servers for _, rows in s.sizes()) in range(40, 47)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (Words, {"embeddings": None}, r"rows on servers \(words, tags\).*add the field"),
        (LocalWords, {"embeddings": {"optimizer": {"name": "SGD", "lr": 1}}}, "has no distplat.nn"),
    ],
)
def test_job_and_model_must_agree(task: type[Task], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(job(task, 1, **options), task)


def test_range_partition_needs_num_embeddings() -> None:
    embeddings = {"partition": "range", "optimizer": {"name": "SGD", "lr": 1}}
    net = nn.ModuleDict({"a": ShardedEmbedding(None, 4)})
    with pytest.raises(ValueError, match="but a has no num_embeddings"):
        Lookups(net, job(Words, 1, embeddings=embeddings))


class FailingWorker(RingWorker):
    """Fails in the exchange of a step, after the tables have applied the rows' gradients."""

    fails_at = 5

    def exchange(self, step: int, local: StepControl) -> StepControl:
        total = super().exchange(step, local)
        if step == self.fails_at:
            time.sleep(0.2)  # by now the tables have applied the step
            raise CollectiveError("world", "all_reduce", step, (1,), "as if a rank were lost")
        return total


class UntilFailure(Attempt):
    """An attempt in which all ranks fail in a step."""

    ends = (CollectiveError,)


def test_recovery_applies_a_step_to_the_tables_once() -> None:
    lossy = LocalRun(job(Words, 2), Words, rewinds=True)
    failing = [FailingWorker(Ring(RingOptions())) for _ in range(2)]
    for rank, strategy in zip(lossy.ranks, failing, strict=True):
        rank.strategy = strategy
    first = UntilFailure(lossy)
    assert not first.make()
    assert (first.starts, len(first.errors)) == ([0, 0], 2)
    assert {service.store.ledger.steps for service in lossy.tables.table_servers} == {6}
    for strategy in failing:
        strategy.fails_at = -1
    second = Attempt(lossy)
    assert second.make()
    assert second.starts == [5, 5]
    lossy.close()
    whole = train(job(Words, 2), Words)
    for number in range(2):
        assert table(lossy, number).tobytes() == table(whole, number).tobytes()
    for name, value in whole.parameters().items():
        assert torch.equal(lossy.parameters()[name], value)


def test_trained_model_works_outside_of_the_run(tmp_path: Path) -> None:
    spec = job(Words, 0).model_copy(update={"storage_path": str(tmp_path)})
    result = Trainer(spec, Words).fit()
    assert result.checkpoint is not None
    model = Words().model()
    model.load_state_dict(load_file(result.checkpoint))
    connect(model.eval(), result.path)
    inputs, targets = Words().eval_data().tensors
    with torch.no_grad():
        loss = float(Words().loss(model(inputs), targets))
    assert loss == pytest.approx(result.evaluations[-1].metrics["loss"], rel=1e-5)
    parts = [load_file(path)["ids"] for path in sorted(result.path.glob("embeddings.*-words.*"))]
    assert len(parts) == 2
    assert all((part.diff() > 0).all() for part in parts)
    other = Net(ShardedEmbedding(ROWS, WIDTH + 1), ShardedEmbeddingBag(ROWS, WIDTH))
    with pytest.raises(StorageError, match=r"table 'words' of .* is another"):
        connect(other, result.path)
