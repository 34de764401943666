"""The average of the weights (EMA) matches torch's under every strategy, also after a resume."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_workers import StopOnLostRank
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
from distplat.platform.vector_layout import Layout, Piece, Segment
from distplat.strategies.checkpoint.parts import whole_of
from distplat.strategies.fakes import Fabric
from distplat.strategies.hybrid import Hybrid
from distplat.strategies.model.ema import AveragedVector
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
    """A model with a frozen layer and the buffers of a batch norm."""

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
    """`Small` with a layer norm, whose output does not depend on the other samples."""

    def model(self) -> nn.Module:
        model = super().model()
        assert isinstance(model, nn.Sequential)
        model[1] = nn.LayerNorm(5, dtype=WIDE)
        return model


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {"name": "SGD", "lr": 0.2},  # without optimizer state
    "adam": {"name": "Adam", "lr": 0.05},
}


def job(strategy: Any, workers: int = 1, optimizer: str = "plain", **fields: Any) -> Job:
    options = {"ema": {"decay": DECAY}, "evaluation": {"every_steps": EVERY}, **fields}
    spec, size = OPTIMIZERS[optimizer], {"steps": STEPS, "global_batch_size": BATCH}
    return job_of(strategy, workers, optimizer=spec, seed=3, **{**size, **options})


@cache
def plain(optimizer: str = "plain", clip: float | None = None) -> tuple[dict[str, Tensor], Any]:
    """Train with torch's `AveragedModel` in one process; return the average and its losses."""
    torch.manual_seed(3)
    task = Norms()
    model = task.model()
    arguments = {k: v for k, v in OPTIMIZERS[optimizer].items() if k != "name"}
    trained = [p for p in model.parameters() if p.requires_grad]
    rule = getattr(torch.optim, OPTIMIZERS[optimizer]["name"])(trained, **arguments)
    ema_fn: Any = get_ema_multi_avg_fn
    average = AveragedModel(model, multi_avg_fn=ema_fn(DECAY))
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
    average = {k.removeprefix(EMA_PREFIX): v for k, v in trained.items() if EMA_PREFIX in k}
    assert 2 * len(average) == len(trained)
    return average


def losses_of(run: LocalRun, name: str) -> dict[int, float]:
    """Return the mean of a metric by step, over the evaluation reports of all ranks."""
    parts = {
        (report.step, report.rank): (report.sums[name], report.counts[name])
        for reports in run.reports
        for report in reports
        if isinstance(report, EvalReport)
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
    ("ps-async", 1, {}),  # several workers: see the test of shards below
    ({"name": "ps-async", "num_servers": 3, "replication": 2}, 1, {"clip_norm": 0.5}),
]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("strategy", "workers", "options"), WORLDS)
def test_matches_plain_loop(
    strategy: Any, workers: int, options: dict[str, Any], optimizer: str
) -> None:
    run = train(job(strategy, workers, optimizer, **options), Norms)
    expected, losses = plain(optimizer, options.get("clip_norm"))
    average = average_of(run.trained[0])
    for name, value in expected.items():
        assert torch.allclose(average[name], value, rtol=0, atol=1e-10), name
    assert losses_of(run, "ema_loss") == pytest.approx(losses, abs=1e-10)
    assert losses_of(run, "loss") != pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("resumed_at", range(6))
def test_average_of_a_frozen_parameter_that_is_trained_in_some_updates(resumed_at: int) -> None:
    """Torch averages each parameter in each update; a frozen one only equals its average."""
    model = nn.ParameterList([torch.zeros(4), torch.zeros(2)])
    vector = torch.zeros(6)
    model[0].data, model[1].data = vector[:4], vector[4:]
    segments = Segment(0, 4, "float32"), Segment(4, 6, "float32")
    layout = Layout(6, segments, (Piece(0, 0, 4), Piece(1, 4, 6)), 2, 4)
    average, ema_fn = AveragedVector(EMA(decay=DECAY), vector, layout), get_ema_multi_avg_fn
    expected = AveragedModel(model, multi_avg_fn=ema_fn(DECAY))  # type: ignore[no-untyped-call]
    for step in range(6):
        trains_tail = step in (2, 4)
        vector[: 6 if trains_tail else 4] += 1.0 + step
        average.update(tail=trains_tail)
        expected.update_parameters(model)
        if step == resumed_at:
            state = {name: value.clone() for name, value in average.state().items()}
            average = AveragedVector(EMA(decay=DECAY), vector, layout)
            average.load(state)
    torch.testing.assert_close(average.values, torch.cat([*expected.module.parameters()]))


@pytest.mark.parametrize("strategy", ["ring", THREE], ids=str)
def test_every_rank_returns_the_average(strategy: Any) -> None:
    """If rank 0 is lost after the last step, another rank returns the trained parameters."""
    first, second = train(job(strategy, 2), Norms).trained
    assert first.keys() == second.keys() and average_of(first)
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_servers_on_another_node_match_plain_loop() -> None:
    """`apart`: workers copy the parameters instead of sharing the servers' memory."""
    average = average_of(train(job(THREE, 2), Norms, remote_servers=True).trained[0])
    for name, value in plain()[0].items():
        assert torch.allclose(average[name], value, rtol=0, atol=1e-10), name


def test_ema_does_not_change_the_weights() -> None:
    """Evaluating weights and average updates buffers once. The average has the model's buffers."""
    run, without = (train(job("ring", 2, ema=ema), Small) for ema in ({"decay": 0.5}, None))
    for name, value in without.trained[0].items():
        assert torch.equal(run.trained[0][name], value), name
    average = average_of(run.trained[0])
    assert torch.equal(average["1.running_var"], without.trained[0]["1.running_var"])
    assert torch.equal(average["3.weight"], without.trained[0]["3.weight"])


@pytest.mark.sweep(6)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("resumed", ["ring", SHARDED, THREE], ids=str)
@pytest.mark.parametrize("strategy", ["ring", SHARDED, THREE], ids=str)
def test_resumes_from_a_checkpoint(strategy: Any, resumed: Any, optimizer: str) -> None:
    ema: dict[str, Any] = {"ema": {"decay": DECAY, "warmup": True}}
    whole = train(job(strategy, 2, optimizer, checkpoint={"every_steps": EVERY}, **ema), Norms)
    rest = train(job(resumed, 2, optimizer, **ema), Norms, saved=whole.checkpoints[EVERY])
    for name, value in whole.trained[0].items():
        if strategy == resumed:
            assert torch.equal(rest.trained[0][name], value), name
        assert torch.allclose(rest.trained[0][name], value, rtol=0, atol=1e-10), name


@pytest.mark.parametrize("resumed", ["ps-async", "ps-sync", "ring"])
def test_ps_async_resumes_from_a_checkpoint(resumed: str) -> None:
    ema: dict[str, Any] = {"ema": {"decay": DECAY, "warmup": True}}
    first = job("ps-async", 1, "adam", checkpoint={"every_steps": EVERY}, **ema)
    whole = train(first, Norms)
    rest = train(job(resumed, 1, "adam", **ema), Norms, saved=whole.checkpoints[EVERY])
    for name, value in whole.trained[0].items():
        assert torch.equal(rest.trained[0][name], value), name


@pytest.mark.parametrize("workers", [2, 5])
def test_ps_async_averages_after_each_update_of_a_shard(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average includes the updates of all workers; the fifth has no sample in some steps."""
    updates: dict[int, list[Tensor]] = {}  # per shard, its parameters after each update
    update = DenseStore._update

    def recording_update(store: DenseStore, *arguments: Any) -> None:
        update(store, *arguments)
        updates.setdefault(id(store), []).append(store.params.clone())

    monkeypatch.setattr(DenseStore, "_update", recording_update)
    run = train(job({"name": "ps-async", "num_servers": 2}, workers), Norms)
    assert [len(values) for values in updates.values()] == [workers * STEPS] * 2
    for index in range(2):
        store = run.servers.shard_server(index).store
        values = updates[id(store)]
        expected = values[0].clone()
        for params in values[1:]:
            expected.mul_(DECAY).add_(params, alpha=1 - DECAY)
        assert torch.allclose(store.optimizer.average, expected, rtol=0, atol=1e-12)
    parts = [run.servers.shard_server(index).store.optimizer.average for index in range(2)]
    flat = run.ranks[0].prepared.flat
    with flat.with_params(torch.cat(parts)):
        expected_state = {k: v.clone() for k, v in flat.model.state_dict().items()}
    for trained in run.trained:
        for name, value in average_of(trained).items():
            assert torch.equal(value, expected_state[name]), name


def test_ema_can_be_added_or_removed_at_a_resume() -> None:
    without = job("ring", 2, ema=None, checkpoint={"every_steps": EVERY})
    added = train(job("ring", 2), Norms, saved=train(without, Norms).checkpoints[EVERY])
    with_ema = train(job("ring", 2, checkpoint={"every_steps": EVERY}), Norms)
    removed = train(without, Norms, saved=with_ema.checkpoints[EVERY]).trained[0]
    for name, value in removed.items():
        assert torch.equal(added.trained[0][name], value), name
    assert not torch.equal(added.trained[0]["ema:0.weight"], with_ema.trained[0]["ema:0.weight"])


def test_recovery_from_a_lost_worker_keeps_the_bits() -> None:
    fields = job("ring", 3)
    run, fabric = LocalRun(fields, Norms), Fabric(3)
    fabric.kill(1, after=30)
    assert not StopOnLostRank(run, fabric).make()
    run.renew(1)
    attempt = StopOnLostRank(run)
    assert attempt.make()
    assert min(attempt.starts) > 1
    run.close()
    for name, value in train(fields, Norms).trained[0].items():
        assert torch.equal(run.trained[0][name], value), name


def test_skipped_step_does_not_change_the_average() -> None:
    vector, gradient = torch.zeros(3), torch.ones(3)
    optimizer = FlatOptimizer(SGD(name="SGD", lr=1.0), vector, gradient, ema=EMA(decay=0.5))
    averages = []
    for present, applied in ((None, True), ([True], True), ([False], False), ([True], True)):
        optimizer.step([1.0], present, applied=applied)
        averages.append(float(optimizer.average[0]))
    assert averages == [-1.0, -1.5, -1.5, -2.25]


def test_warmup_of_the_decay() -> None:
    assert [EMA(decay=0.9, warmup=True).decay_after(n) for n in (1, 10, 1000)] == [
        2 / 11,
        0.55,
        0.9,
    ]
    assert EMA(decay=0.9).decay_after(1) == 0.9


UNSUPPORTED: list[tuple[Any, dict[str, Any], str]] = [
    ({"name": "ps-sync", "backup_workers": 1}, {}, "cannot be combined with `backup_workers`"),
    (
        "ring",
        {"embeddings": {"optimizer": {"name": "SGD", "lr": 0.1}}},
        "cannot be combined with `embeddings`.*use nn.Embedding",
    ),
    ("ring", {"ema": {"decay": 1.0}}, "ema.decay"),
]


@pytest.mark.parametrize(("strategy", "options", "message"), UNSUPPORTED)
def test_unsupported_jobs_are_rejected(
    strategy: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=f"(?s){message}"):
        job(strategy, 2, **options)


def test_strategy_without_ema_rejects_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hybrid, "averages", False)
    with pytest.raises(SpecError, match="'hybrid' keeps no average of the weights"):
        job("hybrid", 2)


def test_average_is_saved_to_its_own_file(tmp_path: Path) -> None:
    names = "w", "task:t", "ema:w", "ema:task:t"
    tensors = {name: whole_of(torch.full((2,), float(n))) for n, name in enumerate(names)}
    directory = RunDirectory(job("ring"), "run", tmp_path)
    assert directory.save_model(b"".join(encode(tensors))).name == "model.safetensors"
    values = {
        f"{path.stem}/{name}": float(tensor.data.view("float32")[0])
        for path in directory.path.glob("*.safetensors")
        for name, tensor in decode(path.read_bytes()).items()
    }
    assert values == {"model/w": 0, "task/t": 1, "model_ema/w": 2, "task_ema/t": 3}
