"""Tables that rest, that one rank uses, or that are frozen, against a plain loop of torch."""

from collections import deque
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from jobs import job_of
from local_run import LocalRun, train
from local_servers import TableServers
from lost_ranks import Loss, LossyRun, train_lossy
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
    Four tables: used in each step, in some, by few samples, never.

    Args:
        make: makes a table.
        how: `skips` leaves a table alone where no sample of the batch needs it, `empty` then looks
            up no ids; others freeze the first table in this way.
    """

    def __init__(self, make: Any, how: str) -> None:
        super().__init__()
        self.how, self.steps = how, 0
        self.inner = nn.ModuleDict({"always": make(ROWS, WIDTH), "dense": nn.Linear(WIDTH, WIDTH)})
        self.rests, self.alone, self.never = (make(ROWS, WIDTH, padding_idx=2) for _ in range(3))
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
        found = self.inner["dense"](self._first(ids)).mean(1)
        for column, table in enumerate((self.rests, self.alone)):
            chosen = samples[:, column] == 1
            if self.how == "empty" or chosen.any():
                found = found.index_add(0, chosen.nonzero()[:, 0], table(ids[chosen]).sum(1))
        with torch.no_grad():
            self.never(ids)
        return self.head(found)  # type: ignore[no-any-return]

    def _first(self, ids: Tensor) -> Tensor:
        table = self.inner["always"]
        if self.training:
            self.steps += 1
            if self.how in ("unfrozen", "refrozen"):
                table.requires_grad_((self.steps > 4) == (self.how == "unfrozen"))
        table.train(self.how != "eval")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            found: Tensor = table(ids)
        return found.detach() if self.how == "detach" else found


class Uses(Task):
    """Batches in order; in one of four all samples need `rests`, in two one needs `alone`."""

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


def job(rule: dict[str, Any], how: str = "skips", world: int = 2, **more: Any) -> Any:
    tables = {"servers": 2, "optimizer": rule, **more.pop("embeddings", {})}
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


def plain(rule: dict[str, Any], how: str) -> nn.Module:
    """Train one process with `nn.Embedding(sparse=True)` from the same first values."""
    torch.manual_seed(0)
    sharded = Uses(how).model()
    made = partial(nn.Embedding, sparse=True)
    net = Net(made, how)
    net.load_state_dict(sharded.state_dict(), strict=False)
    specs = Lookups(sharded, job(rule)).specs
    tables: list[Any] = [net.get_submodule(spec.name).weight for spec in specs]
    for spec, weight in zip(specs, tables, strict=True):
        weight.data.copy_(torch.from_numpy(initial_rows(spec, 0, np.arange(ROWS))))
        if spec.name != "inner.always":
            weight.data[2] = 0.0
    rest = [p for p in net.parameters() if all(p is not weight for weight in tables)]
    options = {k: v for k, v in rule.items() if k != "name"}
    optimizers = [torch.optim.SGD(rest, 0.5), getattr(torch.optim, rule["name"])(tables, **options)]
    torch.manual_seed(0)
    data: Any = Uses(how).train_data()
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
    """Compare dense part and tables; rows that never had a gradient are not there."""
    expected = net.state_dict()
    for name, value in run.parameters().items():
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=2e-6)
    for number, name in enumerate(tables_of(run.ranks[0].prepared.flat.model)):
        mine = torch.from_numpy(table_rows(run.tables, number, ROWS))
        there = ~mine[:, 0].isnan()
        theirs = expected[f"{name}.weight"]
        torch.testing.assert_close(mine[there], theirs[there], rtol=2e-5, atol=2e-6)
        spec = run.tables.table_servers[0].sizes()[number][0]
        first = torch.from_numpy(initial_rows(spec, 0, np.arange(ROWS)))
        first[2] = theirs[2] if name != "inner.always" else first[2]
        assert torch.equal(theirs[~there], first[~there])


@pytest.mark.sweep(4)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("rule", OPTIMIZERS, ids=lambda rule: str(rule["name"]))
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
def test_tables_that_rest_move_as_in_torch(
    rule: dict[str, Any], how: str, world: int, more: dict[str, Any]
) -> None:
    more = {key: dict(value) if isinstance(value, dict) else value for key, value in more.items()}
    run = train(job(rule, how, world, **more), Uses)
    assert_equal(run, plain(rule, how))
    counts = [
        [table.updates for table in service.store.tables] for service in run.tables.table_servers
    ]
    rests, alone = (STEPS, STEPS) if how == "empty" else (STEPS // 4, STEPS // 2)
    assert counts == [[STEPS, rests, alone, 0]] * len(counts)


@pytest.mark.sweep(4)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("how", FROZEN)
def test_a_frozen_table_is_one_in_torch(how: str, strategy: str) -> None:
    run = train(job(OPTIMIZERS[2], how, strategy=strategy), Uses)
    assert_equal(run, plain(OPTIMIZERS[2], how))
    updates = {"unfrozen": STEPS - 4, "refrozen": 4, "eval": STEPS}.get(how, 0)
    assert {service.store.tables[0].updates for service in run.tables.table_servers} == {updates}


@pytest.mark.parametrize("servers", [1, 2, 3])
def test_a_resumed_run_counts_on(servers: int) -> None:
    spec = partial(job, OPTIMIZERS[2], checkpoint={"every_steps": 5})
    whole = train(spec(), Uses)
    resumed = train(spec(embeddings={"servers": servers}), Uses, saved=whole.checkpoints[5])
    for number in range(4):
        mine, theirs = (table_rows(run.tables, number, ROWS) for run in (resumed, whole))
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    updates = {tuple(t.updates for t in s.store.tables) for s in resumed.tables.table_servers}
    assert updates == {tuple(t.updates for t in whole.tables.table_servers[0].store.tables)}


def updates(run: LossyRun) -> list[list[int]]:
    """Give the updates of each table, by server."""
    return [
        [table.updates for table in service.store.tables]
        for service in run.run.tables.table_servers
    ]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("tables", [0, 1, 2])
@pytest.mark.parametrize("step", [5, 6, 7])  # `rests`, `alone` on one rank, and on the other
def test_a_lost_rank_leaves_the_count_as_it_was(step: int, tables: int) -> None:
    spec = job(OPTIMIZERS[2], strategy="ps-sync")
    whole = train_lossy(spec, Uses, [])
    run = train_lossy(spec, Uses, [Loss(step, 1, tables, shards=0)])
    assert updates(run) == updates(whole) == [[STEPS, STEPS // 4, STEPS // 2, 0]] * 2
    for number in range(4):
        assert run.rows(number, ROWS).tobytes() == whole.rows(number, ROWS).tobytes()


class Ranks:
    """
    Two ranks that look rows up and push by hand.

    Args:
        asynchronous: whether their pushes are applied apart.
    """

    def __init__(self, *, asynchronous: bool = False) -> None:
        tables = {"asynchronous": asynchronous}
        self.job = job(OPTIMIZERS[2], embeddings=tables)
        self.group = TableServers(self.job, rewinds=True)
        self.nets = [Uses().model() for _ in range(2)]
        self.lookups = [Lookups(net, self.job) for net in self.nets]
        self.attempt(0, 0)

    def attempt(self, number: int, version: int) -> None:
        for rank, lookups in enumerate(self.lookups):
            lookups.connect(self.group.tables(rank, attempt=number), STEPS)
        for lookups in self.lookups:
            lookups.begin(version)

    def backward(self, used: str = "rests", factor: float = 1.0) -> None:
        """Leave gradients on rank 1 alone."""
        table = self.nets[1].get_submodule(used)
        (table(torch.arange(3, 6)).square().sum() * factor).backward()

    def push(self, step: int, skip: tuple[bool, bool] = (False, False)) -> None:
        on_ranks(2, lambda rank: self.lookups[rank].push(step, skip=skip[rank]).wait())

    def state(self) -> list[Any]:
        """Give all that the servers have of the tables."""
        tables = [table for service in self.group.table_servers for table in service.store.tables]
        columns = [{k: v.tolist() for k, v in table.copy().items()} for table in tables]
        return [columns, [table.updates for table in tables]]


@pytest.mark.parametrize("skip", [(True, False), (False, True), (True, True)])
def test_a_step_that_one_rank_skips_leaves_no_trace(skip: tuple[bool, bool]) -> None:
    ranks, others = Ranks(), Ranks()
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
        others.backward()
        others.push(step)
    assert ranks.state() == others.state()


def test_a_skipped_step_is_taken_back_and_made() -> None:
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


def test_an_asynchronous_push_is_skipped_alone() -> None:
    ranks = Ranks(asynchronous=True)
    ranks.backward()
    ranks.push(0, skip=(True, False))
    assert max(ranks.state()[1]) == 1
    ranks.backward()
    ranks.push(1, skip=(False, True))
    assert max(ranks.state()[1]) == 1
    assert {service.store.ledger.steps for service in ranks.group.table_servers} == {2}


def test_updates_go_back_where_the_last_step_had_some() -> None:
    ranks = Ranks()
    for step, used in enumerate(("rests", "alone")):
        ranks.backward(used)
        ranks.push(step)
    ranks.attempt(1, 1)
    assert ranks.state()[1] == [0, 1, 0, 0] * 2
    ranks.backward("alone")
    ranks.push(1)
    assert ranks.state()[1] == [0, 1, 1, 0] * 2


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 3e38])
def test_a_row_with_a_gradient_that_is_not_finite_is_named(factor: float) -> None:
    ranks = Ranks()
    mine = ranks.lookups[1]
    assert mine.first_non_finite() is None
    ranks.backward()
    assert mine.first_non_finite() is None
    ranks.push(0)
    ranks.backward()
    for _ in range(2):  # their sum may be too large
        ranks.backward("alone", factor)
    assert mine.first_non_finite() in ("alone, id 3", "alone, id 4", "alone, id 5")
    ranks.push(1, skip=(False, True))
    assert mine.first_non_finite() is None


def test_an_empty_batch_of_ids_has_no_gradient_to_look_at() -> None:
    ranks = Ranks()
    ranks.nets[1].get_submodule("rests")(torch.arange(0)).sum().backward()
    assert ranks.lookups[1].first_non_finite() is None
    ranks.push(0)
    assert ranks.state()[1] == [0, 1, 0, 0] * 2


def test_the_switch_of_a_table_is_in_no_state_and_in_no_vector() -> None:
    net = Uses().model()
    names = {name for name, _ in net.named_parameters()}
    assert {"rests.table", "inner.always.table"} <= names
    assert not any(key.endswith("table") for key in net.state_dict())
    for assign in (False, True):
        assert not any(deque(net.load_state_dict(net.state_dict(), assign=assign)))
    slots = {slot.name for slot in FlatModel(net.double()).slots}
    assert slots == {"inner.dense.weight", "inner.dense.bias", "head.weight", "head.bias"}
