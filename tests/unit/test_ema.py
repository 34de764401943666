"""The average of the weights is torch's, whoever keeps it, and goes through checkpoints."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_workers import UntilOneIsLost
from jobs import job_of
from local_run import LocalRun, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset, TensorDataset

from distplat.platform.errors import SpecError
from distplat.platform.model_options import EMA
from distplat.platform.optimizers import SGD
from distplat.platform.progress import EvalReport
from distplat.platform.run_directory import RunDirectory
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.platform.tensor_file import EMA_PREFIX, decode, encode
from distplat.strategies.checkpoint.parts import whole_of
from distplat.strategies.fakes import Fabric
from distplat.strategies.hybrid import Hybrid
from distplat.strategies.model.optim import FlatOptimizer
from distplat.strategies.server.dense_store import DenseStore
from distplat.strategies.task import Task

WIDE = torch.float64
SAMPLES, BATCH, STEPS, EVERY = 22, 6, 9, 4
DECAY = 0.8
DATA = TensorDataset(
    torch.randn(SAMPLES, 4, dtype=WIDE, generator=torch.Generator().manual_seed(1)),
    torch.randn(SAMPLES, 3, dtype=WIDE, generator=torch.Generator().manual_seed(2)),
)


class Small(Task):
    """Has a frozen layer, which an average has as it is, and a batch norm's buffers beside."""

    def model(self) -> nn.Module:
        layers = nn.Linear(4, 5), nn.SyncBatchNorm(5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)
        layers[3].requires_grad_(requires_grad=False)
        return nn.Sequential(*layers).to(WIDE)

    def train_data(self) -> TensorDataset:
        return DATA

    def eval_data(self) -> Any:
        return Subset(DATA, range(7))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


class Norms(Small):
    """The same with a norm that looks at no other sample."""

    def model(self) -> nn.Module:
        model = super().model()
        assert isinstance(model, nn.Sequential)
        model[1] = nn.LayerNorm(5, dtype=WIDE)
        return model


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {"name": "SGD", "lr": 0.2},  # remembers nothing itself
    "adam": {"name": "Adam", "lr": 0.05},
}


def job(strategy: Any, workers: int = 1, optimizer: str = "plain", **fields: Any) -> Job:
    given = {"ema": {"decay": DECAY}, "evaluation": {"every_steps": EVERY}, **fields}
    spec, size = OPTIMIZERS[optimizer], {"steps": STEPS, "global_batch_size": BATCH}
    return job_of(strategy, workers, optimizer=spec, seed=3, **{**size, **given})


@cache
def plain(optimizer: str = "plain", clip: float | None = None) -> tuple[dict[str, Tensor], Any]:
    """Train in one process as torch's page on averages says; give the average and its losses."""
    torch.manual_seed(3)
    task = Norms()
    model = task.model()
    arguments = {k: v for k, v in OPTIMIZERS[optimizer].items() if k != "name"}
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = getattr(torch.optim, OPTIMIZERS[optimizer]["name"])(trained, **arguments)
    by: Any = get_ema_multi_avg_fn
    average = AveragedModel(model, multi_avg_fn=by(DECAY))
    sampler, losses = Sampler(SAMPLES, BATCH, world=1, seed=3), {}
    for step in range(STEPS):
        inputs, targets = DATA[sampler.batch_ids(step).tolist()]
        rule.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), targets))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        rule.step()
        average.update_parameters(model)
        if (step + 1) % EVERY == 0 or step + 1 == STEPS:
            inputs, targets = DATA[:7]
            losses[step + 1] = task.loss(average(inputs), targets).item()
    return {k: v.detach() for k, v in average.module.state_dict().items()}, losses


def average_of(trained: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {k.removeprefix(EMA_PREFIX): v for k, v in trained.items() if EMA_PREFIX in k}
    assert 2 * len(found) == len(trained)
    return found


def losses_of(run: LocalRun, name: str) -> dict[int, float]:
    """By step, of the parts of the first rank's evaluations and others', each told once."""
    parts = {
        (one.step, one.rank): (one.sums[name], one.counts[name])
        for reports in run.reports
        for one in reports
        if isinstance(one, EvalReport)
    }
    steps = sorted({step for step, _ in parts})
    sums = {s: [v for (step, _), v in parts.items() if step == s] for s in steps}
    return {s: sum(a for a, _ in v) / sum(b for _, b in v) for s, v in sums.items()}


SHARDED = {"name": "ring", "shard_optimizer": True}
THREE = {"name": "ps-sync", "num_servers": 3}
WORLDS = [
    ("ring", 1, {}),
    ("ring", 2, {"gradient_accumulation": 2}),
    ("ring", 3, {}),
    (SHARDED, 1, {}),
    (SHARDED, 3, {}),
    ("ps-sync", 1, {}),
    ("ps-sync", 3, {}),
    (THREE, 2, {"clip_norm": 0.5}),
    ({**THREE, "replication": 2}, 2, {}),
    ("ps-async", 1, {}),  # of several workers see below
    ({"name": "ps-async", "num_servers": 3, "replication": 2}, 1, {"clip_norm": 0.5}),
]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("strategy", "workers", "more"), WORLDS)
def test_it_is_that_of_a_plain_loop(
    strategy: Any, workers: int, more: dict[str, Any], optimizer: str
) -> None:
    run = train(job(strategy, workers, optimizer, **more), Norms)
    expected, losses = plain(optimizer, more.get("clip_norm"))
    found = average_of(run.trained[0])
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-10), name
    assert losses_of(run, "ema_loss") == pytest.approx(losses, abs=1e-10)
    assert losses_of(run, "loss") != pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("strategy", ["ring", THREE], ids=str)
def test_every_rank_has_it_in_the_end(strategy: Any) -> None:
    """Where rank 0 is lost after the last step another one is asked for what was trained."""
    first, second = train(job(strategy, 2), Norms).trained
    assert first.keys() == second.keys() and average_of(first)
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_a_worker_s_copy_is_no_less_right() -> None:
    """As if servers were on another node."""
    found = average_of(train(job(THREE, 2), Norms, apart=True).trained[0])
    for name, value in plain()[0].items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-10), name


def test_weights_are_what_they_are_without_it() -> None:
    """Buffers too: evaluating twice counts once. And the average has the buffers of the weights."""
    run, without = (train(job("ring", 2, ema=ema), Small) for ema in ({"decay": 0.5}, None))
    for name, value in without.trained[0].items():
        assert torch.equal(run.trained[0][name], value), name
    average = average_of(run.trained[0])
    assert torch.equal(average["1.running_var"], without.trained[0]["1.running_var"])
    assert torch.equal(average["3.weight"], without.trained[0]["3.weight"])


@pytest.mark.sweep(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("to", ["ring", SHARDED, THREE], ids=str)
@pytest.mark.parametrize("strategy", ["ring", SHARDED, THREE], ids=str)
def test_it_goes_on_from_a_checkpoint(strategy: Any, to: Any, optimizer: str) -> None:
    given: dict[str, Any] = {"ema": {"decay": DECAY, "warmup": True}}
    whole = train(job(strategy, 2, optimizer, checkpoint={"every_steps": EVERY}, **given), Norms)
    rest = train(job(to, 2, optimizer, **given), Norms, saved=whole.checkpoints[EVERY])
    for name, value in whole.trained[0].items():
        if strategy == to:
            assert torch.equal(rest.trained[0][name], value), name
        assert torch.allclose(rest.trained[0][name], value, rtol=0, atol=1e-10), name


@pytest.mark.parametrize("to", ["ps-async", "ps-sync", "ring"])
def test_an_asynchronous_one_goes_on_from_a_checkpoint(to: str) -> None:
    given: dict[str, Any] = {"ema": {"decay": DECAY, "warmup": True}}
    of = job("ps-async", 1, "adam", checkpoint={"every_steps": EVERY}, **given)
    whole = train(of, Norms)
    rest = train(job(to, 1, "adam", **given), Norms, saved=whole.checkpoints[EVERY])
    for name, value in whole.trained[0].items():
        assert torch.equal(rest.trained[0][name], value), name


def test_each_update_of_an_asynchronous_shard_moves_its_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever worker's gradient it is of; one that is there in the end has all of them."""
    made: dict[int, list[Tensor]] = {}  # by shard, its parameters after each update
    update = DenseStore._update

    def noting(store: DenseStore, *arguments: Any) -> None:
        update(store, *arguments)
        made.setdefault(id(store), []).append(store.params.clone())

    monkeypatch.setattr(DenseStore, "_update", noting)
    run = train(job({"name": "ps-async", "num_servers": 2}, 2), Norms)
    assert [len(values) for values in made.values()] == [2 * STEPS] * 2
    for index in range(2):
        store = run.servers.shard_server(index).store
        values = made[id(store)]
        expected = values[0].clone()
        for one in values[1:]:
            expected.mul_(DECAY).add_(one, alpha=1 - DECAY)
        assert torch.allclose(store.optimizer.average, expected, rtol=0, atol=1e-12)
    parts = [run.servers.shard_server(index).store.optimizer.average for index in range(2)]
    flat = run.ranks[0].prepared.flat
    with flat.with_params(torch.cat(parts)):
        expected_state = {k: v.clone() for k, v in flat.model.state_dict().items()}
    for trained in run.trained:
        for name, value in average_of(trained).items():
            assert torch.equal(value, expected_state[name]), name


def test_it_begins_and_ends_with_a_resumed_run() -> None:
    without = job("ring", 2, ema=None, checkpoint={"every_steps": EVERY})
    begun = train(job("ring", 2), Norms, saved=train(without, Norms).checkpoints[EVERY])
    with_it = train(job("ring", 2, checkpoint={"every_steps": EVERY}), Norms)
    ended = train(without, Norms, saved=with_it.checkpoints[EVERY]).trained[0]
    for name, value in ended.items():
        assert torch.equal(begun.trained[0][name], value), name
    assert not torch.equal(begun.trained[0]["ema:0.weight"], with_it.trained[0]["ema:0.weight"])


def test_a_lost_worker_leaves_no_trace_in_it() -> None:
    fields = job("ring", 3)
    run, fabric = LocalRun(fields, Norms), Fabric(3)
    fabric.kill(1, after=30)
    assert not UntilOneIsLost(run, fabric).make()
    run.renew(1)
    attempt = UntilOneIsLost(run)
    assert attempt.make()
    assert min(attempt.starts) > 1
    run.close()
    for name, value in train(fields, Norms).trained[0].items():
        assert torch.equal(run.trained[0][name], value), name


def test_a_step_that_is_left_out_does_not_move_it() -> None:
    vector, gradient = torch.zeros(3), torch.ones(3)
    one = FlatOptimizer(SGD(name="SGD", lr=1.0), vector, gradient, ema=EMA(decay=0.5))
    seen = []
    for present, applied in ((None, True), ([True], True), ([False], False), ([True], True)):
        one.step([1.0], present, applied=applied)
        seen.append(float(one.average[0]))
    assert seen == [-1.0, -1.5, -1.5, -2.25]


def test_warm_up_is_of_the_decay() -> None:
    assert [EMA(decay=0.9, warmup=True).decay_after(n) for n in (1, 10, 1000)] == [
        2 / 11,
        0.55,
        0.9,
    ]
    assert EMA(decay=0.9).decay_after(1) == 0.9


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ({"name": "ps-sync", "backup_workers": 1}, {}, "cannot be combined with `backup_workers`"),
    (
        "ring",
        {"embeddings": {"optimizer": {"name": "SGD", "lr": 0.1}}},
        "cannot be combined with `embeddings`.*use nn.Embedding",
    ),
    ("ring", {"ema": {"decay": 1.0}}, "ema.decay"),
]


@pytest.mark.parametrize(("strategy", "more", "text"), REFUSED)
def test_what_has_none_is_refused(strategy: Any, more: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=f"(?s){text}"):
        job(strategy, 2, **more)


def test_a_strategy_that_keeps_none_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hybrid, "averages", False)
    with pytest.raises(SpecError, match="'hybrid' keeps no average of the weights"):
        job("hybrid", 2)


def test_it_has_a_file_of_its_own(tmp_path: Path) -> None:
    names = "w", "task:t", "ema:w", "ema:task:t"
    given = {name: whole_of(torch.full((2,), float(n))) for n, name in enumerate(names)}
    directory = RunDirectory(job("ring"), "run", tmp_path)
    assert directory.save_model(b"".join(encode(given))).name == "model.safetensors"
    found = {
        f"{path.stem}/{name}": float(one.data.view("float32")[0])
        for path in directory.path.glob("*.safetensors")
        for name, one in decode(path.read_bytes()).items()
    }
    assert found == {"model/w": 0, "task/t": 1, "model_ema/w": 2, "task_ema/t": 3}
