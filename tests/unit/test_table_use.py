"""Tables without lookups, tables used by one rank and frozen tables, compared with plain torch."""

from collections import deque
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from jobs import job_of
from local_run import LocalRun, train
from local_servers import TableServers
from lost_ranks import LossyRun, RankLoss, train_with_lost_ranks
from rank_threads import on_ranks
from table_rows import table_rows
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from distplat import Task
from distplat.nn import ShardedEmbedding
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.sparse.lookups import Lookups
from distplat.strategies.sparse.modules import tables_of
from distplat.strategies.sparse.rows import initial_rows

ROWS, WIDTH, SAMPLES, BATCH, STEPS = 11, 4, 36, 9, 12
OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "SGD", "lr": 0.3},
    {"name": "Adagrad", "lr": 0.3},
    {"name": "SparseAdam", "lr": 0.1},
]
FROZEN = ["table", "parent", "parameters", "no_grad", "detach", "unfrozen", "refrozen", "eval"]


class Net(nn.Module):
    """
    Four tables: used in every step, in some steps, by few samples, never.

    Args:
        make: creates a table.
        how: `skips` does not call a table that no sample of the batch needs; `empty` calls it with
            no ids; the others name the method of freezing the first table.
    """

    def __init__(self, make: Any, how: str) -> None:
        super().__init__()
        self.how, self.steps = how, 0
        self.inner = nn.ModuleDict({"always": make(ROWS, WIDTH), "dense": nn.Linear(WIDTH, WIDTH)})
        self.sometimes, self.rarely, self.never = (
            make(ROWS, WIDTH, padding_idx=2) for _ in range(3)
        )
        self.head = nn.Linear(WIDTH, 3)
        if how == "table":
            self.inner["always"].requires_grad_(False)
        elif how == "parameters":
            for parameter in self.inner["always"].parameters():
                parameter.requires_grad = False
        elif how == "parent":
            self.inner.requires_grad_(False)

    def forward(self, samples: Tensor) -> Tensor:
        ids = samples[:, 2:]
        hidden = self.inner["dense"](self._frozen_lookup(ids)).mean(1)
        for column, table in enumerate((self.sometimes, self.rarely)):
            has_column = samples[:, column] == 1
            if self.how == "empty" or has_column.any():
                hidden = hidden.index_add(
                    0, has_column.nonzero()[:, 0], table(ids[has_column]).sum(1)
                )
        with torch.no_grad():
            self.never(ids)
        return self.head(hidden)  # type: ignore[no-any-return]

    def _frozen_lookup(self, ids: Tensor) -> Tensor:
        table = self.inner["always"]
        if self.training:
            self.steps += 1
            if self.how in ("unfrozen", "refrozen"):
                table.requires_grad_((self.steps > 4) == (self.how == "unfrozen"))
        table.train(self.how != "eval")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            hidden: Tensor = table(ids)
        return hidden.detach() if self.how == "detach" else hidden


class SparseUseTask(Task):
    """One batch of four uses `sometimes` in all samples; two batches use `rarely` in one sample."""

    def __init__(self, how: str = "skips") -> None:
        self.how = how

    def model(self) -> nn.Module:
        return Net(ShardedEmbedding, self.how)

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(0, ROWS, (SAMPLES, 3), generator=generator)
        needs = torch.zeros(SAMPLES, 2, dtype=torch.int64)
        needs[BATCH : 2 * BATCH, 0] = 1
        needs[[2 * BATCH + 1, 3 * BATCH + 8], 1] = 1
        return TensorDataset(torch.cat([needs, ids], 1), torch.randint(0, 3, (SAMPLES,)))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


def job(optimizer_config: dict[str, Any], how: str = "skips", world: int = 2, **more: Any) -> Any:
    tables = {"servers": 2, "optimizer": optimizer_config, **more.pop("embeddings", {})}
    fields: dict[str, Any] = {
        "optimizer": {"name": "SGD", "lr": 0.5},
        "embeddings": tables,
        "global_batch_size": BATCH,
        "steps": STEPS,
        "data": {"shuffle": False},
        "task_args": {"how": how},
        **more,
    }
    return job_of(workers=world, **fields)


def train_plain(optimizer_config: dict[str, Any], how: str) -> nn.Module:
    """Train one process with `nn.Embedding(sparse=True)` from the same first values."""
    torch.manual_seed(0)
    sharded = SparseUseTask(how).model()
    make_embedding = partial(nn.Embedding, sparse=True)
    net = Net(make_embedding, how)
    net.load_state_dict(sharded.state_dict(), strict=False)
    specs = Lookups(sharded, job(optimizer_config)).specs
    tables: list[Any] = [net.get_submodule(spec.name).weight for spec in specs]
    for spec, weight in zip(specs, tables, strict=True):
        weight.data.copy_(torch.from_numpy(initial_rows(spec, 0, np.arange(ROWS))))
        if spec.name != "inner.always":
            weight.data[2] = 0.0
    rest = [p for p in net.parameters() if all(p is not weight for weight in tables)]
    options = {k: v for k, v in optimizer_config.items() if k != "name"}
    optimizers = [
        torch.optim.SGD(rest, 0.5),
        getattr(torch.optim, optimizer_config["name"])(tables, **options),
    ]
    torch.manual_seed(0)
    data: Any = SparseUseTask(how).train_data()
    for step in range(STEPS):
        first = step * BATCH % SAMPLES
        inputs, targets = default_collate([data[i] for i in range(first, first + BATCH)])
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(net(inputs), targets))
        for optimizer in optimizers:
            optimizer.step()
    return net


def assert_equal(run: LocalRun, net: nn.Module) -> None:
    """Compare dense parameters and tables; servers hold no row that never had a gradient."""
    expected = net.state_dict()
    for name, value in run.parameters().items():
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=2e-6)
    for number, name in enumerate(tables_of(run.ranks[0].prepared.flat.model)):
        actual = torch.from_numpy(table_rows(run.tables, number, ROWS))
        has_row = ~actual[:, 0].isnan()
        expected_rows = expected[f"{name}.weight"]
        torch.testing.assert_close(actual[has_row], expected_rows[has_row], rtol=2e-5, atol=2e-6)
        spec = run.tables.table_servers[0].sizes()[number][0]
        first = torch.from_numpy(initial_rows(spec, 0, np.arange(ROWS)))
        first[2] = expected_rows[2] if name != "inner.always" else first[2]
        assert torch.equal(expected_rows[~has_row], first[~has_row])


@pytest.mark.sweep(8)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "optimizer_config", OPTIMIZERS, ids=lambda optimizer_config: str(optimizer_config["name"])
)
@pytest.mark.parametrize("how", ["skips", "empty"])
@pytest.mark.parametrize(
    ("world", "more"),
    [
        (2, {}),
        (3, {"gradient_accumulation": 2, "embeddings": {"servers": 3}}),
        (3, {"strategy": "ps-sync"}),
        (1, {"strategy": "ps-async", "embeddings": {"asynchronous": True}}),
    ],
    ids=str,
)
def test_tables_match_sparse_embeddings_of_torch(
    optimizer_config: dict[str, Any], how: str, world: int, more: dict[str, Any]
) -> None:
    more = {key: dict(value) if isinstance(value, dict) else value for key, value in more.items()}
    run = train(job(optimizer_config, how, world, **more), SparseUseTask)
    assert_equal(run, train_plain(optimizer_config, how))
    counts = [
        [table.updates for table in service.store.tables] for service in run.tables.table_servers
    ]
    sometimes, rarely = (STEPS, STEPS) if how == "empty" else (STEPS // 4, STEPS // 2)
    assert counts == [[STEPS, sometimes, rarely, 0]] * len(counts)


@pytest.mark.sweep(8)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("how", FROZEN)
def test_frozen_table_matches_torch(how: str, strategy: str) -> None:
    run = train(job(OPTIMIZERS[2], how, strategy=strategy), SparseUseTask)
    assert_equal(run, train_plain(OPTIMIZERS[2], how))
    updates = {"unfrozen": STEPS - 4, "refrozen": 4, "eval": STEPS}.get(how, 0)
    assert {service.store.tables[0].updates for service in run.tables.table_servers} == {updates}


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_resumed_run_continues_the_update_counts(servers: int) -> None:
    spec = partial(job, OPTIMIZERS[2], checkpoint={"every_steps": 5})
    reference = train(spec(), SparseUseTask)
    resumed = train(
        spec(embeddings={"servers": servers}), SparseUseTask, saved=reference.checkpoints[5]
    )
    for number in range(4):
        actual, expected_rows = (
            table_rows(run.tables, number, ROWS) for run in (resumed, reference)
        )
        np.testing.assert_allclose(actual, expected_rows, rtol=1e-5, atol=1e-6)
    updates = {tuple(t.updates for t in s.store.tables) for s in resumed.tables.table_servers}
    assert updates == {tuple(t.updates for t in reference.tables.table_servers[0].store.tables)}


def updates(run: LossyRun) -> list[list[int]]:
    """Return the number of updates of each table, by server."""
    return [
        [table.updates for table in service.store.tables]
        for service in run.run.tables.table_servers
    ]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("tables", [0, 1, 2])
@pytest.mark.parametrize("step", [5, 6, 7])  # `sometimes`; `rarely` on one rank; on the other
def test_lost_rank_does_not_change_update_counts(step: int, tables: int) -> None:
    spec = job(OPTIMIZERS[2], strategy="ps-sync")
    reference = train_with_lost_ranks(spec, SparseUseTask, [])
    run = train_with_lost_ranks(spec, SparseUseTask, [RankLoss(step, 1, tables, shards=0)])
    assert updates(run) == updates(reference) == [[STEPS, STEPS // 4, STEPS // 2, 0]] * 2
    for number in range(4):
        assert run.rows(number, ROWS).tobytes() == reference.rows(number, ROWS).tobytes()


class Ranks:
    """
    Two ranks whose lookups and pushes the test calls.

    Args:
        asynchronous: whether each push is applied on its own.
    """

    def __init__(self, *, asynchronous: bool = False) -> None:
        tables = {"asynchronous": asynchronous}
        self.job = job(OPTIMIZERS[2], embeddings=tables)
        self.group = TableServers(self.job, rewinds=True)
        self.nets = [SparseUseTask().model() for _ in range(2)]
        self.lookups = [Lookups(net, self.job) for net in self.nets]
        self.attempt(0, 0)

    def attempt(self, number: int, version: int) -> None:
        for rank, lookups in enumerate(self.lookups):
            lookups.connect(self.group.tables(rank, attempt=number), STEPS)
        for lookups in self.lookups:
            lookups.begin(version)

    def backward(self, used: str = "sometimes", factor: float = 1.0) -> None:
        """Compute gradients on rank 1 only."""
        table = self.nets[1].get_submodule(used)
        (table(torch.arange(3, 6)).square().sum() * factor).backward()

    def push(self, step: int, skip: tuple[bool, bool] = (False, False)) -> None:
        on_ranks(2, lambda rank: self.lookups[rank].push(step, skip=skip[rank]).wait())

    def state(self) -> list[Any]:
        """Return the servers' columns and update counts of the tables."""
        tables = [table for service in self.group.table_servers for table in service.store.tables]
        columns = [{k: v.tolist() for k, v in table.copy().items()} for table in tables]
        return [columns, [table.updates for table in tables]]


@pytest.mark.parametrize("skip", [(True, False), (False, True), (True, True)])
def test_step_skipped_by_one_rank_changes_nothing(skip: tuple[bool, bool]) -> None:
    ranks, reference = Ranks(), Ranks()
    for step in range(4):
        ranks.backward()
        if step == 1:
            before = ranks.state()
            ranks.push(step, skip)
            assert ranks.state() == before
            assert {service.store.ledger.steps for service in ranks.group.table_servers} == {2}
            continue
        ranks.push(step)
    for step in range(3):
        reference.backward()
        reference.push(step)
    assert ranks.state() == reference.state()


def test_skipped_step_can_be_rewound_and_repeated() -> None:
    ranks = Ranks()
    ranks.backward()
    ranks.push(0)
    before = ranks.state()
    ranks.backward()
    ranks.push(1, skip=(True, False))
    ranks.attempt(1, 1)
    assert ranks.state() == before
    ranks.backward()
    ranks.push(1)
    assert max(ranks.state()[1]) == 2


def test_asynchronous_skip_affects_one_push_only() -> None:
    ranks = Ranks(asynchronous=True)
    ranks.backward()
    ranks.push(0, skip=(True, False))
    assert max(ranks.state()[1]) == 1
    ranks.backward()
    ranks.push(1, skip=(False, True))
    assert max(ranks.state()[1]) == 1
    assert {service.store.ledger.steps for service in ranks.group.table_servers} == {2}


def test_rewind_decrements_counts_of_tables_updated_last() -> None:
    ranks = Ranks()
    for step, used in enumerate(("sometimes", "rarely")):
        ranks.backward(used)
        ranks.push(step)
    ranks.attempt(1, 1)
    assert ranks.state()[1] == [0, 1, 0, 0] * 2
    ranks.backward("rarely")
    ranks.push(1)
    assert ranks.state()[1] == [0, 1, 1, 0] * 2


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 3e38])
def test_first_non_finite_names_table_and_row(factor: float) -> None:
    ranks = Ranks()
    lookups = ranks.lookups[1]
    assert lookups.first_non_finite() is None
    ranks.backward()
    assert lookups.first_non_finite() is None
    ranks.push(0)
    ranks.backward()
    for _ in range(2):  # two finite gradients may overflow in their sum
        ranks.backward("rarely", factor)
    assert lookups.first_non_finite() in ("rarely, id 3", "rarely, id 4", "rarely, id 5")
    ranks.push(1, skip=(False, True))
    assert lookups.first_non_finite() is None


def test_empty_lookup_has_no_non_finite_gradient() -> None:
    ranks = Ranks()
    ranks.nets[1].get_submodule("sometimes")(torch.arange(0)).sum().backward()
    assert ranks.lookups[1].first_non_finite() is None
    ranks.push(0)
    assert ranks.state()[1] == [0, 1, 0, 0] * 2


def test_placeholder_parameter_is_not_in_state_dict_or_flat_model() -> None:
    net = SparseUseTask().model()
    names = {name for name, _ in net.named_parameters()}
    assert {"sometimes.table", "inner.always.table"} <= names
    assert not any(key.endswith("table") for key in net.state_dict())
    for assign in (False, True):
        assert not any(deque(net.load_state_dict(net.state_dict(), assign=assign)))
    slots = {slot.name for slot in FlatModel(net.double()).slots}
    assert slots == {"inner.dense.weight", "inner.dense.bias", "head.weight", "head.bias"}
