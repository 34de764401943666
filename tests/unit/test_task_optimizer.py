"""`Task.optimizer`: a run equals a plain loop with the same optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_jobs import job as table_job
from grouped_task import BATCH, SAMPLES, SCALES, STEPS, Own, Small, assert_close
from grouped_task import job as grouped_job
from hybrid_workers import StopOnLostRank
from jobs import job_of
from local_run import LocalRun, train
from table_rows import table_rows
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from verify_rows import rows
from words import ROWS, Words

from distplat import Task, Trainer
from distplat.actors.task_check import check_class, overlapping_fields
from distplat.platform.errors import SpecError
from distplat.platform.job_file import read_job, render_job
from distplat.platform.progress import StepReport
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.fakes import Fabric
from distplat.strategies.loop.session import prepare
from distplat.strategies.model.task_optimizer import TaskUpdate
from distplat.strategies.verification.verdicts import EQUAL

Named = list[tuple[str, nn.Parameter]]
TASK_OPTIMIZER = {"name": "task"}


class Lamb(torch.optim.Optimizer):
    """An optimizer with per-tensor norms, numbers and lists in its state, and a count per group."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "moments": [torch.zeros_like(p), torch.zeros_like(p)]}
                state["step"] += 1
                first, second = state["moments"]
                first.lerp_(p.grad, 0.1)
                second.lerp_(p.grad.square(), 0.01)
                correction = 1 - 0.9 ** state["step"], 1 - 0.99 ** group["count"]
                update = (first / correction[0]) / ((second / correction[1]).sqrt() + 1e-6)
                update += group["weight_decay"] * p
                trust_ratio = p.norm() / update.norm() if p.norm() > 0 else 1.0
                p -= group["lr"] * trust_ratio * update


class LambTask(Small):
    def optimizer(self, named_parameters: Named) -> Any:
        biases = [p for name, p in named_parameters if name.endswith("bias")]
        weights = [p for name, p in named_parameters if not name.endswith("bias")]
        return Lamb([{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 0.05}])


class AdafactorTask(Small):
    def optimizer(self, named_parameters: Named) -> Any:
        return torch.optim.Adafactor(named_parameters, lr=0.05, weight_decay=0.1)


class MuonTask(Small):
    """Muon for matrices, AdamW for the rest."""

    def optimizer(self, named_parameters: Named) -> Any:
        others = [p for _, p in named_parameters if p.ndim != 2]
        matrices = [p for _, p in named_parameters if p.ndim == 2]
        return [torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.01)]


class AsgdTask(Small):
    """A job file cannot name ASGD: see `REFUSED_OPTIMIZERS`."""

    def optimizer(self, named_parameters: Named) -> Any:
        return torch.optim.ASGD(named_parameters, lr=0.05, t0=2)


class RpropTask(Small):
    """A job file cannot name Rprop either."""

    def optimizer(self, named_parameters: Named) -> Any:
        return torch.optim.Rprop(named_parameters, lr=0.05)


class OwnParameterTask(Own, AdafactorTask):
    """The optimizer also updates a parameter of the task."""


class UnusedLayerTask(LambTask):
    """The forward does not use one layer, and weight decay must not change it."""

    def model(self) -> nn.Module:
        model = super().model()
        model.idle = nn.Linear(3, 3).double()
        return model


def job(strategy: Any = "ring", world: int = 1, **more: Any) -> Job:
    return grouped_job(strategy, world, **{"optimizer": TASK_OPTIMIZER, **more})


def train_plain(cls: type[Small], clip_norm: float | None = None, decay: float = 0.5) -> Any:
    """Train in a plain loop, and return the parameters and their average."""
    task = cls()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    named: Any = list(model.named_parameters())
    named += [("task:bend", task.bend)] if isinstance(task, Own) else []
    optimizer = task.optimizer(named)
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    factor = lambda step: [*SCALES, 0.0][step]  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    ema: Any = get_ema_multi_avg_fn
    average = AveragedModel(model, multi_avg_fn=ema(decay))
    sampler = Sampler(SAMPLES, BATCH, 1, seed=5)
    for step in range(STEPS):
        inputs, targets = zip(*(data[int(i)] for i in sampler.batch_ids(step)), strict=True)
        loss: Any = task.loss(model(torch.stack(inputs)), torch.stack(targets))
        model.zero_grad()
        for _, p in named:
            p.grad = None
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([p for _, p in named], clip_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        average.update_parameters(model)
    return {name: p.detach() for name, p in named}, average.module.state_dict()


def state_of(run: LocalRun, rank: int = 0) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in run.ranks[rank].prepared.flat.state_dict().items()}


@pytest.mark.sweep(6)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(("world", "parts"), [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize(
    "cls", [LambTask, AdafactorTask, OwnParameterTask, UnusedLayerTask, AsgdTask, RpropTask]
)
def test_run_matches_plain_loop(
    cls: type[Small], world: int, parts: int, clip_norm: float | None
) -> None:
    run = train(job("ring", world, clip_norm=clip_norm, gradient_accumulation=parts), cls)
    expected, _ = train_plain(cls, clip_norm)
    for rank in range(world):
        assert_close(state_of(run, rank), expected)


class Unfreezing(LambTask):
    """One layer is frozen until the fourth forward."""

    def model(self) -> nn.Module:
        model, forwards = super().model(), []
        body: Any = model.body
        body.requires_grad_(requires_grad=False)

        def unfreeze(*args: Any) -> None:
            forwards.append(1)
            body.requires_grad_(requires_grad=len(forwards) > 3)

        model.register_forward_pre_hook(unfreeze)
        return model


def test_unfrozen_layer_is_updated() -> None:
    run = train(job("ring", 2), Unfreezing)
    expected, _ = train_plain(Unfreezing)
    assert_close(state_of(run), expected)
    assert_close(state_of(run, 1), expected)
    assert not torch.equal(expected["body.weight"], Small().model().get_parameter("body.weight"))


@pytest.mark.parametrize("world", [1, 2])
def test_several_optimizers_match_plain_loop(world: int) -> None:
    """The tolerance is larger for two workers because Muon computes in bfloat16."""
    assert_close(
        state_of(train(job("ring", world), MuonTask)),
        train_plain(MuonTask)[0],
        1e-9 if world == 1 else 1e-4,
    )


def test_ema_matches_averaged_model() -> None:
    run = train(job("ring", 2, ema={"decay": 0.5}), AdafactorTask)
    actual = {n.removeprefix("ema:"): t for n, t in run.trained[0].items() if n.startswith("ema:")}
    assert_close(actual, train_plain(AdafactorTask)[1])


def test_lr_of_each_group_is_reported() -> None:
    class Rated(LambTask):
        def lr(self, step: int, total: int) -> float:
            return SCALES[step]

    run = train(job(lr_schedule={}), Rated)
    steps = [report.figures for report in run.reports[0] if isinstance(report, StepReport)]
    assert [figures["lr"] for figures in steps] == [0.1 * scale for scale in SCALES]
    assert [figures["lr_group_1"] for figures in steps] == [0.05 * scale for scale in SCALES]
    assert all(figures["optimizer_state_bytes"] >= 0 for figures in steps)
    assert_close(state_of(run), train_plain(Rated)[0])


class TableTask(Words):
    """The job's optimizer updates the rows of the tables."""

    def optimizer(self, named_parameters: Named) -> Any:
        assert [name for name, _ in named_parameters] == ["head.weight", "head.bias"]
        return torch.optim.Adagrad([p for _, p in named_parameters], lr=0.1)


def test_embedding_tables_use_the_jobs_optimizer() -> None:
    own = train(table_job(Words, 2, optimizer=TASK_OPTIMIZER), TableTask)
    named = train(table_job(Words, 2, optimizer={"name": "Adagrad", "lr": 0.1}), Words)
    assert_close(own.parameters(), named.parameters(), 1e-5)
    for number in range(2):
        rows = [torch.from_numpy(table_rows(run.tables, number, ROWS)) for run in (own, named)]
        torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-5, equal_nan=True)


class OwnStateDictTask(LambTask):
    """The optimizer overrides `state_dict` and `load_state_dict`."""

    class OwnStateDict(Lamb):
        def state_dict(self) -> Any:
            return {"inner": super().state_dict(), "version": 2}

        def load_state_dict(self, state_dict: Any) -> None:
            assert state_dict["version"] == 2
            super().load_state_dict(state_dict["inner"])

    def optimizer(self, named_parameters: Named) -> Any:
        return self.OwnStateDict([p for _, p in named_parameters])


TASK_CLASSES = [LambTask, AdafactorTask, MuonTask, OwnParameterTask, OwnStateDictTask]


@pytest.mark.parametrize("cls", TASK_CLASSES)
def test_resumed_run_is_bit_identical(cls: type[Small]) -> None:
    spec = job("ring", 2, checkpoint={"every_steps": 2}, ema={"decay": 0.5})
    reference = train(spec, cls)
    resumed = train(spec, cls, saved=reference.checkpoints[2])
    for key, value in reference.trained[0].items():
        assert torch.equal(resumed.trained[0][key], value), key


@pytest.mark.parametrize("cls", TASK_CLASSES)
def test_run_with_a_lost_worker_is_bit_identical(cls: type[Small]) -> None:
    spec = job("ring", 3)
    run, fabric = LocalRun(spec, cls), Fabric(3)
    fabric.kill(1, after=12)
    assert not StopOnLostRank(run, fabric).make()
    run.renew(1)
    attempt = StopOnLostRank(run)
    assert attempt.make()
    assert min(attempt.starts) > 1
    run.close()
    reference = train(spec, cls)
    for rank in range(3):
        for key, value in state_of(reference).items():
            assert torch.equal(state_of(run, rank)[key], value), key


def test_random_updates_are_equal_on_all_ranks() -> None:
    """The ranks' generators differ before a step. (Ranks in threads would share one generator.)"""

    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.grad += torch.randn_like(p)
            return super().step(closure)

    class NoisyTask(Small):
        def optimizer(self, named_parameters: Named) -> Any:
            return Noisy([p for _, p in named_parameters], lr=0.1)

    actual = []
    for rank_seed in (1, 2):
        prepared = prepare(job(), NoisyTask())
        update = TaskUpdate(prepared.flat, prepared.job, STEPS, prepared.made)
        for step in range(2):
            torch.manual_seed(rank_seed)
            prepared.flat.grads.fill_(1.0)
            update.step(step)
        actual.append(prepared.flat.params.clone())
    assert torch.equal(*actual)


def test_run_in_the_driver_process_resumes(tmp_path: Path) -> None:
    spec = job(world=0, storage_path=str(tmp_path), checkpoint={"every_steps": 2})
    first = Trainer(spec, LambTask).fit()
    longer = spec.model_copy(update={"steps": STEPS + 2, "lr_schedule": job_of().lr_schedule})
    resumed = Trainer(longer, LambTask, resume=first.path).fit()
    assert [record.step for record in resumed.history] == [STEPS + 1, STEPS + 2]


class InvalidTask(Small):
    """`optimizer` returns an invalid value."""

    create: Any = None

    def optimizer(self, named_parameters: Named) -> Any:
        return type(self).create([p for _, p in named_parameters])


SGD, LBFGS = torch.optim.SGD, torch.optim.LBFGS


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda ps: None, "must return a torch.optim.Optimizer, or a list of them; got NoneType: "),
        (lambda ps: [], "must return a torch.optim.Optimizer, or a list of them; got nothing"),
        (lambda ps: [SGD(ps, 0.1), 3], "or a list of them; got SGD, int"),
        (lambda ps: LBFGS(ps), "gave a LBFGS, whose step() needs closure: gradients are those of "),
        (lambda ps: SGD(ps[1:], 0.1), "leaves out 'body.weight', which is to be trained: give it "),
        (lambda ps: [SGD(ps, 0.1), SGD(ps[:1], 1)], "has 'body.weight' in two optimizers"),
        (lambda ps: SGD([*ps, nn.Parameter(torch.ones(1))]), "has a tensor that is none of "),
        (lambda ps: SGD([{"params": ps, "lr": None}]), "has a param group whose lr is None: "),
    ],
)
def test_invalid_optimizer_is_rejected(
    create: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InvalidTask, "create", create)
    with pytest.raises(ValueError) as caught:
        prepare(job(), InvalidTask())
    line = InvalidTask.optimizer.__code__.co_firstlineno
    assert str(caught.value).startswith(f"test_task_optimizer.py:{line}: optimizer() ")
    assert message in str(caught.value)


def test_state_that_no_checkpoint_can_hold_is_rejected_in_step_0() -> None:
    class UnsavableOptimizer(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.state[self.param_groups[0]["params"][0]]["unsavable"] = object()
            return super().step(closure)

    class UnsavableTask(Small):
        def optimizer(self, named_parameters: Named) -> Any:
            return UnsavableOptimizer([p for _, p in named_parameters], lr=0.1)

    with pytest.raises(
        SpecError, match=r"\['unsavable'\] is a object, which no checkpoint can hold"
    ):
        train(job(), UnsavableTask)


def test_checkpoint_with_other_groups_is_rejected() -> None:
    class OneGroupTask(Small):
        def optimizer(self, named_parameters: Named) -> Any:
            return Lamb([p for _, p in named_parameters])

    saved = train(job(checkpoint={"every_steps": 2}), LambTask).checkpoints[2]
    with pytest.raises(SpecError, match="the checkpoint's optimizer has other parameters in its"):
        train(job(), OneGroupTask, saved=saved)
    with pytest.raises(SpecError, match="has 1 optimizers, the task makes 2"):
        train(job(), MuonTask, saved=saved)


def test_optimizers_that_differ_between_ranks_are_rejected() -> None:
    class RankDependentTask(Small):
        count = 0

        def optimizer(self, named_parameters: Named) -> Any:
            type(self).count += 1
            return SGD([p for _, p in named_parameters], lr=0.1, momentum=0.1 * self.count)

    with pytest.raises(SpecError, match=r"optimizer\(\) gives worker-\d something else than "):
        train(job("ring", 2), RankDependentTask)


UNSUPPORTED: list[tuple[Any, int, str]] = [
    ("ps-sync", 2, "optimizer.name: under 'ps-sync' no worker updates whole parameters of the "),
    ("ps-async", 2, "optimizer.name: under 'ps-async' no worker"),
    ({"name": "hybrid", "data": 2}, 2, "optimizer.name: under 'hybrid' no worker"),
    ({"name": "ring", "shard_optimizer": True}, 2, "strategy.shard_optimizer: splits parameters, "),
]


@pytest.mark.parametrize(("strategy", "world", "message"), UNSUPPORTED)
def test_unsupported_strategies_are_rejected(strategy: Any, world: int, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(strategy, world)
    assert str(caught.value).startswith(message)


def test_job_and_task_must_agree_about_the_optimizer() -> None:
    own, of_task = job_of(), job_of(optimizer=TASK_OPTIMIZER)
    check_class(LambTask, {}, overlapping_fields(of_task))
    check_class(Small, {}, overlapping_fields(own))
    with pytest.raises(SpecError) as caught:
        check_class(LambTask, {}, overlapping_fields(own))
    message = (
        "optimizer: LambTask has optimizer(), which makes it itself\n  hint: write `optimizer: "
    )
    assert str(caught.value).startswith(message)
    with pytest.raises(SpecError) as caught:
        check_class(Small, {}, overlapping_fields(of_task))
    message = "optimizer.name: Small has no optimizer(named_parameters), and the job asks for it"
    assert str(caught.value).startswith(message)


def test_optimizer_must_take_named_parameters() -> None:
    cls: type[Task] = type("None", (Small,), {"optimizer": lambda self: None})
    with pytest.raises(SpecError, match=r"optimizer\(\) must take \(named_parameters\)"):
        check_class(cls, {})


def test_job_with_task_optimizer_round_trips(tmp_path: Path) -> None:
    spec = job_of(optimizer=TASK_OPTIMIZER)
    (tmp_path / "job.yaml").write_text(render_job(spec))
    assert read_job(tmp_path / "job.yaml") == spec
    with pytest.raises(SpecError, match="optimizer: has no arguments beside `name: task`"):
        job_of(optimizer={**TASK_OPTIMIZER, "lr": 0.1})


def test_verification_covers_task_optimizers() -> None:
    spec = job("ring", 2, steps=8, checkpoint={"every_steps": 1, "num_to_keep": 9}, task="a:A")
    assert {row.verdict for row in rows(AdafactorTask, spec).values()} == {EQUAL}
