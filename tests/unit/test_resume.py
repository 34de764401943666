"""A run resumed from a checkpoint is bit-identical to an uninterrupted run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import fields_of, job_of
from local_run import LocalRun, train
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat import Trainer
from distplat.platform.checkpoints import Catalogue
from distplat.platform.errors import SpecError, StorageError
from distplat.platform.progress import StepReport
from distplat.platform.resume import mismatches, start_from
from distplat.platform.spec import Job
from distplat.platform.tensor_slices import RawTensor, TensorSlice
from distplat.strategies.checkpoint.checkpoint_reader import SavedState, tensor_of
from distplat.strategies.checkpoint.parts import whole_of
from distplat.strategies.task import Task

STEPS, HALF = 12, 5
SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
ADAMW = {"name": "AdamW", "lr": 0.02}


class Normed(Task):
    """Batch norm, a frozen layer, and a short last batch."""

    def model(self) -> nn.Module:
        frozen = nn.Linear(5, 16)
        frozen.weight.requires_grad_(False)
        return nn.Sequential(frozen, nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(38, 5, generator=generator)
        return TensorDataset(inputs, torch.randint(0, 3, (38,), generator=generator))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


class Plain(Normed):
    """No layer that depends on the distribution of samples over ranks."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def job(strategy: Any, world: int = 2, **overrides: Any) -> Job:
    fields = {
        "optimizer": ADAMW,
        "global_batch_size": 8,
        "steps": STEPS,
        "checkpoint": {"every_steps": HALF},
        "lr_schedule": {"name": "cosine"},
        **overrides,
    }
    return job_of(strategy, world, **fields)


STRATEGIES: list[dict[str, Any]] = [
    {"name": "ring"},
    {"name": "ring", "shard_optimizer": True},
    {"name": "ring", "compression": "bf16"},
    {"name": "ps-sync"},
    {"name": "ps-sync", "num_servers": 3},
]


def id_of(strategy: dict[str, Any]) -> str:
    return "-".join(map(str, strategy.values()))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run: LocalRun) -> dict[int, float]:
    return {r.step: r.loss for r in run.reports[0] if hasattr(r, "loss")}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=id_of)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_resume_is_bit_identical(strategy: object, optimizer: object, clip: float | None) -> None:
    config = job(strategy, optimizer=optimizer, clip_norm=clip)
    unfailed = train(config, Normed)
    assert sorted(unfailed.checkpoints) == [5, 10, 12]
    without = train(job(strategy, optimizer=optimizer, clip_norm=clip, checkpoint={}), Normed)
    assert equal(without.parameters(), unfailed.parameters()), "checkpoints change nothing"
    for version in (5, 10, STEPS):  # the last one has no steps left, as after a failure at the end
        resumed = train(config, Normed, saved=unfailed.checkpoints[version])
        assert equal(resumed.parameters(), unfailed.parameters())
        expected = {step: loss for step, loss in losses(unfailed).items() if step >= version}
        assert losses(resumed) == expected
        assert sorted(resumed.checkpoints) == [v for v in (5, 10, 12) if v > version]


class Overflowing(Plain):
    """Overflows in float16 at the first loss scales; evaluated on the training data."""

    def eval_data(self) -> TensorDataset:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) * 30


class TwoTerms(Plain):
    """Means over all samples, and over samples of some classes."""

    def weights(self, batch: Any) -> dict[str, Any]:
        return {"all": len(batch[1]), "some": (batch[1] != 0).sum()}

    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        each = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return {"all": each.sum(), "some": (each * (targets != 0)).sum()}


EVALUATED: dict[str, Any] = {"evaluation": {"every_steps": 2}}
PLATEAU = {"name": "ReduceLROnPlateau", "metric": "loss", "patience": 0, "threshold": 0.1}
FEATURES: dict[str, tuple[type[Task], dict[str, Any]]] = {
    "fp16": (Overflowing, {"precision": "fp16", "clip_norm": 0.5}),
    "ema": (Overflowing, {"precision": "fp16", "ema": {"decay": 0.9}, **EVALUATED}),
    "plateau": (Overflowing, {"lr_schedule": PLATEAU, **EVALUATED}),
    "terms": (TwoTerms, {"gradient_accumulation": 2}),
}
BY_TENSOR = {"name": "hybrid", "tensor": 2, "tensor_plan": {"0": "colwise", "2": "rowwise"}}
FEATURE_RUNS: list[tuple[str, dict[str, Any], int]] = [
    ("fp16", {"name": "ring"}, 3),
    ("fp16", {"name": "ring", "shard_optimizer": True}, 2),
    ("fp16", {"name": "ps-sync", "num_servers": 2, "replication": 2}, 2),
    ("ema", {"name": "ring", "shard_optimizer": True}, 2),
    ("ema", {"name": "ps-sync", "num_servers": 2}, 2),
    ("plateau", {"name": "ps-sync"}, 3),
    ("plateau", {"name": "hybrid", "pipeline": 2, "cut": ["2"]}, 2),
    ("plateau", BY_TENSOR, 2),
    ("terms", {"name": "ring", "compression": "bf16"}, 2),
    ("terms", {"name": "ps-sync"}, 2),
    ("terms", {"name": "ps-async"}, 1),
]


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("name", "strategy", "world"), FEATURE_RUNS)
def test_resume_keeps_loss_scale_ema_and_scheduler(
    name: str, strategy: dict[str, Any], world: int
) -> None:
    task, fields = FEATURES[name]
    config = job(strategy, world, **{"lr_schedule": {"name": "wsd", "decay_steps": 4}, **fields})
    unfailed = train(config, task)
    if config.precision == "fp16":
        assert len({row[2] for row in figures(unfailed).values()}) > 1, "the loss scale changes"
    resumed = train(config, task, saved=unfailed.checkpoints[HALF])
    assert all(map(equal, resumed.trained, unfailed.trained))
    assert figures(resumed) == {n: row for n, row in figures(unfailed).items() if n >= HALF}


def figures(run: LocalRun) -> dict[int, Any]:
    """Return the loss and the figures of each step of rank 0, without times and traffic."""
    names = "lr", "loss_scale", "grad_norm", "skipped_steps"
    steps = (report for report in run.reports[0] if isinstance(report, StepReport))
    return {r.step: (repr(r.loss), *(r.figures.get(name) for name in names)) for r in steps}


@pytest.mark.parametrize("name", ["ema", "plateau"])
def test_runs_stopped_by_max_time_match_one_run(name: str, tmp_path: Path) -> None:
    task, features = FEATURES[name]
    best = {"every_steps": 1, "keep_best": {"metric": "loss", "mode": "min"}}
    fields = fields_of("ring", 0, steps=5, global_batch_size=8, optimizer=ADAMW, **features)
    fields |= {"checkpoint": best, "evaluation": {"every_steps": 1}, "storage_path": str(tmp_path)}
    whole, last = Trainer(fields, task).fit(), None
    for step in range(1, 6):
        run = Trainer({**fields, "max_time_s": 1e-9}, task, resume=last).fit()
        assert [summary.step for summary in run.history] == [step]
        assert (run.stopped is None) == (step == 5)
        assert run.best_checkpoint == Catalogue(run.path / "checkpoints").path(step), (
            "each run has its own"
        )
        last = run.path
    models = [load_file(result.path / "model.safetensors") for result in (run, whole)]
    assert equal(*models)
    assert run.metrics == whole.metrics


def test_resume_with_dropout_is_bit_identical() -> None:
    """One rank only, because threads share torch's generator."""

    class Dropped(Normed):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 3))

    unfailed = train(job("ring", 1), Dropped)
    resumed = train(job("ring", 1), Dropped, saved=unfailed.checkpoints[HALF])
    assert equal(resumed.parameters(), unfailed.parameters())


def test_resume_of_a_finished_run_with_more_steps() -> None:
    constant: dict[str, Any] = {"lr_schedule": {"name": "constant"}}
    short = train(job("ring", steps=7, **constant), Normed)
    longer = train(job("ring", **constant), Normed, saved=short.checkpoints[7])
    assert equal(longer.parameters(), train(job("ring", **constant), Normed).parameters())


class Falling(Plain):
    def lr(self, step: int, total: int) -> float:
        return 1.0 - step / total


ONE_CYCLE = {"name": "OneCycleLR", "cycle_momentum": False}


@pytest.mark.parametrize(
    "task, schedule, steps, warning",
    [
        (Plain, ONE_CYCLE, 2 * STEPS, "in its step 5; in this run, of 24 steps,"),
        (Plain, {"name": "cosine"}, 2 * STEPS, "lr x 0.7077 in its step 5;"),
        (Plain, {"name": "cosine"}, STEPS, ""),
        (Plain, {"name": "wsd", "decay_steps": 3}, 2 * STEPS, ""),
        (Plain, {"name": "wsd", "decay_steps": 9}, 2 * STEPS, "had 12 steps, and lr x 0.7778 in"),
        (Plain, {"name": "StepLR", "step_size": 2}, 2 * STEPS, ""),
        (Falling, {"name": "constant"}, 2 * STEPS, "lr x 0.6667 in its step 5;"),
    ],
)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_resume_warns_if_another_length_changes_the_lr_curve(
    strategy: str, task: type[Task], schedule: Any, steps: int, warning: str, caplog: Any
) -> None:
    short = train(job(strategy, 1, lr_schedule=schedule, optimizer=SGD), task)
    longer = job(strategy, 1, lr_schedule=schedule, optimizer=SGD, steps=steps)
    caplog.clear()
    train(longer, task, saved=short.checkpoints[HALF])
    assert warning in caplog.text and caplog.text.count("length of the run") == bool(warning)


@pytest.mark.sweep(6)
@pytest.mark.parametrize("after", STRATEGIES, ids=id_of)
@pytest.mark.parametrize("before", STRATEGIES, ids=id_of)
def test_resume_under_another_strategy(before: dict[str, Any], after: dict[str, Any]) -> None:
    """The number of workers differs too, so sums are in another order."""
    tolerance = 2e-2 if "compression" in {*before, *after} else 1e-5
    unfailed = train(job("ring", 1), Plain).parameters()
    saved = train(job(before, 3), Plain).checkpoints[HALF]
    resumed = train(job(after, 2), Plain, saved=saved).parameters()
    for name, value in unfailed.items():
        assert torch.allclose(resumed[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    "name",
    ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam"],
)
def test_resume_with_each_optimizer_is_bit_identical(name: str) -> None:
    arguments: dict[str, Any] = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    arguments |= {"centered": True} if name == "RMSprop" else {}
    arguments |= {"amsgrad": True} if name in ("Adam", "AdamW") else {}
    for strategy in ("ring", {"name": "ps-sync", "num_servers": 2}):
        config = job(strategy, optimizer={"name": name, "lr": 0.01, **arguments})
        unfailed = train(config, Plain)
        resumed = train(config, Plain, saved=unfailed.checkpoints[HALF])
        assert equal(resumed.parameters(), unfailed.parameters())


def test_checkpoint_has_the_state_of_its_step() -> None:
    """Training continues during the snapshot; the state equals that of a run that ends there."""
    for strategy in STRATEGIES:
        constant: dict[str, Any] = {"lr_schedule": {"name": "constant"}}
        longer = train(job(strategy, **constant), Normed).checkpoints[HALF]
        shorter = train(job(strategy, steps=HALF, **constant), Normed).checkpoints[HALF]
        for file in ("model", "optimizer"):
            found, expected = longer._load(file), shorter._load(file)
            assert found.keys() == expected.keys()
            assert all(found[k].data.tobytes() == expected[k].data.tobytes() for k in found)


def test_contents_of_a_checkpoint() -> None:
    saved = train(job("ps-sync"), Normed).checkpoints[10]
    model = Normed().model()
    assert {n: w.shape for n, w in saved._load("model").items()} == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    entries = ("exp_avg", "exp_avg_sq", "step")
    assert {*saved._load("optimizer")} == {f"{k}/{name}" for k in entries for name in trained}
    assert saved.state["samples"] == 38
    assert (saved.state["steps_per_epoch"], saved.state["epoch"]) == (5, 2)


def test_ps_async_resumes_with_the_remaining_steps() -> None:
    """The result is not bit-identical; each rank does the remaining steps."""
    config = job({"name": "ps-async", "num_servers": 2}, 3)
    first = train(config, Plain)
    saved = first.checkpoints[max(first.checkpoints)]
    assert saved.step == STEPS, "the last checkpoint is never skipped"
    longer = job({"name": "ps-async", "num_servers": 2}, 3, steps=20)
    second = train(longer, Plain, saved=saved)
    done = sorted((r.step, r.rank) for reports in second.reports for r in reports)
    assert done == [(step, part) for step in range(STEPS, 20) for part in range(3)]
    assert len(second.servers.logs()[0]) == 3 * (20 - STEPS)


class OtherModel(Plain):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4), nn.Linear(4, 3))


class MoreData(Plain):
    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.randn(60, 5), torch.zeros(60, dtype=torch.int64))


def error_of_resume(task: type[Task], saved: SavedState) -> str:
    with pytest.raises(SpecError) as caught:
        train(job("ring", 1), task, saved=saved)
    return str(caught.value)


def test_resume_rejects_another_model_or_data_set() -> None:
    saved = train(job("ring", 1), Plain).checkpoints[HALF]
    text = error_of_resume(OtherModel, saved)
    assert "no '3.bias' in the checkpoint" in text
    assert "'2.weight' is [3, 16] in the checkpoint, [4, 16] here" in text
    assert "made with 38 training samples, the task has 60" in error_of_resume(MoreData, saved)


def test_unfrozen_parameter_has_new_optimizer_state() -> None:
    saved = train(job("ring", 1), Normed).checkpoints[HALF]

    class Unfrozen(Normed):
        def model(self) -> nn.Module:
            return super().model().requires_grad_(True)

    found = train(job("ring", 1), Unfrozen, saved=saved).checkpoints[STEPS]._load("optimizer")
    names = "0.weight", "1.weight"
    steps = [float(tensor_of(found[f"step/{name}"], TensorSlice(()))) for name in names]
    assert steps == [STEPS - HALF, STEPS]


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_older_checkpoint_with_one_step_count_is_loaded(strategy: str) -> None:
    saved = train(job(strategy), Normed).checkpoints[HALF]
    files = {name: dict(saved._load(name)) for name in ("model", "optimizer")}
    step_keys = [key for key in files["optimizer"] if key.startswith("step/")]
    files["optimizer"]["step"] = [files["optimizer"].pop(key) for key in step_keys][-1]
    older = SavedState(saved.state, files.__getitem__)
    found, expected = (
        train(job(strategy), Normed, saved=state).parameters() for state in (older, saved)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


STATE = {
    "step": 10,
    "seed": 0,
    "global_batch_size": 8,
    "data": {"shuffle": True, "drop_last": False},
    "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
    "steps_per_epoch": 5,
}


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, []),
        ({"optimizer": {"name": "SGD", "lr": 0.5, "momentum": 0.8, "weight_decay": 0.1}}, []),
        ({"strategy": "ps-sync", "scaling": {"num_workers": 4}, "clip_norm": 1}, []),
        ({"steps": None, "epochs": 3}, []),
        ({"seed": 1}, ["seed"]),
        ({"global_batch_size": 16}, ["global_batch_size"]),
        ({"data": {"shuffle": False}}, ["data.shuffle"]),
        ({"optimizer": {"name": "AdamW", "lr": 0.1}}, ["optimizer.name"]),
        ({"optimizer": {"name": "SGD", "lr": 0.1}}, ["optimizer.momentum"]),
        ({"steps": 10}, ["steps"]),
        ({"steps": None, "epochs": 2}, ["epochs"]),
        ({"seed": 3, "steps": 2}, ["seed", "steps"]),
    ],
)
def test_mismatches_of_a_resumed_job(changes: dict[str, Any], fields: list[str]) -> None:
    changed = {"strategy": "ring", "optimizer": SGD, **changes}
    found = mismatches(STATE, job(changed.pop("strategy"), **changed))
    assert [problem.field for problem in found] == fields


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"every_steps": 5, "every_epochs": 1}, "checkpoint: give `every_steps` or `every_epochs`"),
        ({"num_to_keep": 3}, "num_to_keep: has no effect without"),
        ({"every_steps": 0}, "every_steps"),
        ({"every_step": 5}, "did you mean 'every_steps'"),
    ],
)
def test_invalid_checkpoint_options_are_rejected(checkpoint: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        job("ring", checkpoint=checkpoint)


def test_checkpoint_period_in_steps() -> None:
    assert job("ring", checkpoint={"every_epochs": 2}).checkpoint.period(5) == 10
    assert job("ring", checkpoint={"every_steps": 3}).checkpoint.period(5) == 3
    assert job("ring", checkpoint={}).checkpoint.period(5) == 0
    run = train(job("ring", checkpoint={"every_epochs": 1}), Plain)
    assert sorted(run.checkpoints) == [5, 10, 12]


def test_rank_loads_its_slab() -> None:
    """A tensor-parallel rank loads its part of a full tensor."""
    from distplat.platform.tensor_slices import TensorSlice
    from distplat.strategies.model.flat import FlatModel

    weight = torch.arange(12.0).view(4, 3)
    files: dict[str, dict[str, RawTensor]] = {
        "model": {"up.weight": whole_of(weight), "down.weight": whole_of(weight.t().contiguous())},
        "optimizer": {"exp_avg/up.weight": whole_of(weight * 10)},
    }
    saved = SavedState({"step": 3}, files.__getitem__)
    part = nn.Sequential()
    part.up = nn.Linear(3, 2, bias=False)
    flat = FlatModel(part)
    slices = {"up.weight": TensorSlice((4, 3), slab=(0, 2, 4))}
    saved.load_model(flat, slices)
    assert torch.equal(flat.params.view(2, 3), weight[2:4])
    assert flat.version == 3
    state = saved.optimizer(flat, slices=slices)
    assert torch.equal(state["exp_avg"], weight[2:4].reshape(-1) * 10)
    half = saved.optimizer(flat, 3, 6, slices)
    assert torch.equal(half["exp_avg"], weight[3] * 10)


@pytest.mark.parametrize(
    "state",
    [
        {"data": ["shuffle"]},
        {"data": None},
        {"optimizer": "AdamW"},
        {"steps_per_epoch": "many"},
        {"steps_per_epoch": None},
        {"total_steps": "many"},
        {"lr_factor": "half"},
        {"early_stop": [1]},
        {"embeddings": 3},
        {"embeddings": {"optimizer": "AdamW"}},
        {"embeddings": {"optimizer": {}}},
    ],
)
def test_invalid_state_is_reported_as_damage(state: dict[str, Any], tmp_path: Path) -> None:
    Catalogue(tmp_path / "checkpoints").write(10, {"model.safetensors": [b""]}, state)
    with pytest.raises(StorageError, match=r"step-000010/state\.json is damaged, or of no run"):
        start_from(job("ring"), tmp_path, print)
