"""`Task.optimizer`: a run is a plain loop with that optimizer, whatever its rule looks at."""

from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_jobs import job as table_job
from grouped_task import BATCH, SAMPLES, SCALES, STEPS, Own, Small, close
from grouped_task import job as grouped_job
from hybrid_workers import UntilOneIsLost
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
TASKS = {"name": "task"}


class Lamb(torch.optim.Optimizer):
    """Whole tensors decide how far they go; it keeps numbers, lists, and a count in its groups."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "made": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["made"] += 1
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
                unit = 1 - 0.9 ** state["step"], 1 - 0.99 ** group["made"]
                way = (first / unit[0]) / ((second / unit[1]).sqrt() + 1e-6)
                way += group["weight_decay"] * p
                trust = p.norm() / way.norm() if p.norm() > 0 else 1.0
                p -= group["lr"] * trust * way


class Lambs(Small):
    def optimizer(self, named_parameters: Named) -> Any:
        still = [p for name, p in named_parameters if name.endswith("bias")]
        rest = [p for name, p in named_parameters if not name.endswith("bias")]
        return Lamb([{"params": rest}, {"params": still, "weight_decay": 0.0, "lr": 0.05}])


class Factored(Small):
    def optimizer(self, named_parameters: Named) -> Any:
        return torch.optim.Adafactor(named_parameters, lr=0.05, weight_decay=0.1)


class Two(Small):
    """As Muon is used: matrices here, the rest there."""

    def optimizer(self, named_parameters: Named) -> Any:
        flat = [p for _, p in named_parameters if p.ndim != 2]
        matrices = [p for _, p in named_parameters if p.ndim == 2]
        return [torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(flat, lr=0.01)]


class Averaged(Small):
    """No name of a job file: see `REFUSED_OPTIMIZERS`."""

    def optimizer(self, named_parameters: Named) -> Any:
        return torch.optim.ASGD(named_parameters, lr=0.05, t0=2)


class Signed(Small):
    """Nor is this."""

    def optimizer(self, named_parameters: Named) -> Any:
        return torch.optim.Rprop(named_parameters, lr=0.05)


class OwnBend(Own, Factored):
    """A parameter of the task's, too."""


class Idle(Lambs):
    """A layer that no step reaches: weight decay must leave it alone."""

    def model(self) -> nn.Module:
        model = super().model()
        model.idle = nn.Linear(3, 3).double()
        return model


def job(strategy: Any = "ring", world: int = 1, **more: Any) -> Job:
    return grouped_job(strategy, world, **{"optimizer": TASKS, **more})


def plain(kind: type[Small], clip_norm: float | None = None, decay: float = 0.5) -> Any:
    """The loop that a user would write; gives the parameters, and their average."""
    task = kind()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    named: Any = list(model.named_parameters())
    named += [("task:bend", task.bend)] if isinstance(task, Own) else []
    made = task.optimizer(named)
    optimizers = made if isinstance(made, list) else [made]
    factor = lambda step: [*SCALES, 0.0][step]  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in optimizers]
    by: Any = get_ema_multi_avg_fn
    average = AveragedModel(model, multi_avg_fn=by(decay))
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
        for one, schedule in zip(optimizers, schedules, strict=True):
            one.step()
            schedule.step()
        average.update_parameters(model)
    return {name: p.detach() for name, p in named}, average.module.state_dict()


def state_of(run: LocalRun, rank: int = 0) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in run.ranks[rank].prepared.flat.state_dict().items()}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(("world", "parts"), [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("kind", [Lambs, Factored, OwnBend, Idle, Averaged, Signed])
def test_a_run_is_a_plain_loop_with_it(
    kind: type[Small], world: int, parts: int, clip_norm: float | None
) -> None:
    run = train(job("ring", world, clip_norm=clip_norm, gradient_accumulation=parts), kind)
    expected, _ = plain(kind, clip_norm)
    for rank in range(world):
        close(state_of(run, rank), expected)


class Unfreezing(Lambs):
    """A layer that takes part from the fourth forward on."""

    def model(self) -> nn.Module:
        model, made = super().model(), []
        body: Any = model.body
        body.requires_grad_(requires_grad=False)

        def unfreeze(*given: Any) -> None:
            made.append(1)
            body.requires_grad_(requires_grad=len(made) > 3)

        model.register_forward_pre_hook(unfreeze)
        return model


def test_a_layer_that_is_unfrozen_is_updated_from_then_on() -> None:
    run = train(job("ring", 2), Unfreezing)
    expected, _ = plain(Unfreezing)
    close(state_of(run), expected)
    close(state_of(run, 1), expected)
    assert not torch.equal(expected["body.weight"], Small().model().get_parameter("body.weight"))


@pytest.mark.parametrize("world", [1, 2])
def test_several_share_the_parameters_out(world: int) -> None:
    """Muon rounds to bfloat16 on its way."""
    close(state_of(train(job("ring", world), Two)), plain(Two)[0], 1e-9 if world == 1 else 1e-4)


def test_the_average_is_torchs() -> None:
    run = train(job("ring", 2, ema={"decay": 0.5}), Factored)
    found = {n.removeprefix("ema:"): t for n, t in run.trained[0].items() if n.startswith("ema:")}
    close(found, plain(Factored)[1])


def test_rates_of_its_groups_are_reported() -> None:
    class Rated(Lambs):
        def lr(self, step: int, total: int) -> float:
            return SCALES[step]

    run = train(job(lr_schedule={}), Rated)
    steps = [one.figures for one in run.reports[0] if isinstance(one, StepReport)]
    assert [one["lr"] for one in steps] == [0.1 * scale for scale in SCALES]
    assert [one["lr_group_1"] for one in steps] == [0.05 * scale for scale in SCALES]
    assert all(one["optimizer_state_bytes"] >= 0 for one in steps)
    close(state_of(run), plain(Rated)[0])


class Tables(Words):
    """Rows of tables are updated as the job says."""

    def optimizer(self, named_parameters: Named) -> Any:
        assert [name for name, _ in named_parameters] == ["head.weight", "head.bias"]
        return torch.optim.Adagrad([p for _, p in named_parameters], lr=0.1)


def test_embedding_tables_stand_beside_it() -> None:
    own = train(table_job(Words, 2, optimizer=TASKS), Tables)
    named = train(table_job(Words, 2, optimizer={"name": "Adagrad", "lr": 0.1}), Words)
    close(own.parameters(), named.parameters(), 1e-5)
    for number in range(2):
        rows = [torch.from_numpy(table_rows(run.tables, number, ROWS)) for run in (own, named)]
        torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-5, equal_nan=True)


class Restored(Lambs):
    """A class that says itself what its state is."""

    class Kind(Lamb):
        def state_dict(self) -> Any:
            return {"mine": super().state_dict(), "version": 2}

        def load_state_dict(self, state_dict: Any) -> None:
            assert state_dict["version"] == 2
            super().load_state_dict(state_dict["mine"])

    def optimizer(self, named_parameters: Named) -> Any:
        return self.Kind([p for _, p in named_parameters])


KINDS = [Lambs, Factored, Two, OwnBend, Restored]


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_from_a_checkpoint_to_the_same_bits(kind: type[Small]) -> None:
    of = job("ring", 2, checkpoint={"every_steps": 2}, ema={"decay": 0.5})
    unfailed = train(of, kind)
    resumed = train(of, kind, saved=unfailed.checkpoints[2])
    for key, value in unfailed.trained[0].items():
        assert torch.equal(resumed.trained[0][key], value), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_worker_leaves_no_trace(kind: type[Small]) -> None:
    of = job("ring", 3)
    run, fabric = LocalRun(of, kind), Fabric(3)
    fabric.kill(1, after=12)
    assert not UntilOneIsLost(run, fabric).make()
    run.renew(1)
    attempt = UntilOneIsLost(run)
    assert attempt.make()
    assert min(attempt.starts) > 1
    run.close()
    unfailed = train(of, kind)
    for rank in range(3):
        for key, value in state_of(unfailed).items():
            assert torch.equal(state_of(run, rank)[key], value), key


def test_what_it_draws_is_the_same_on_all_ranks() -> None:
    """Whatever a rank has drawn before; ranks in threads would share one generator."""

    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.grad += torch.randn_like(p)
            return super().step(closure)

    class Drawing(Small):
        def optimizer(self, named_parameters: Named) -> Any:
            return Noisy([p for _, p in named_parameters], lr=0.1)

    found = []
    for drawn in (1, 2):
        prepared = prepare(job(), Drawing())
        update = TaskUpdate(prepared.flat, prepared.job, STEPS, prepared.made)
        for step in range(2):
            torch.manual_seed(drawn)
            prepared.flat.grads.fill_(1.0)
            update.step(step)
        found.append(prepared.flat.params.clone())
    assert torch.equal(*found)


def test_a_run_in_the_calling_process(tmp_path: Path) -> None:
    of = job(world=0, storage_path=str(tmp_path), checkpoint={"every_steps": 2})
    first = Trainer(of, Lambs).fit()
    longer = of.model_copy(update={"steps": STEPS + 2, "lr_schedule": job_of().lr_schedule})
    again = Trainer(longer, Lambs, resume=first.path).fit()
    assert [one.step for one in again.history] == [STEPS + 1, STEPS + 2]


class Wrong(Small):
    """Gives something that is no optimizer of its parameters."""

    made: Any = None

    def optimizer(self, named_parameters: Named) -> Any:
        return type(self).made([p for _, p in named_parameters])


SGD, LBFGS = torch.optim.SGD, torch.optim.LBFGS


@pytest.mark.parametrize(
    ("made", "said"),
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
def test_what_is_no_optimizer_is_said(
    made: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wrong, "made", made)
    with pytest.raises(ValueError) as caught:
        prepare(job(), Wrong())
    line = Wrong.optimizer.__code__.co_firstlineno
    assert str(caught.value).startswith(f"test_task_optimizer.py:{line}: optimizer() ")
    assert said in str(caught.value)


def test_what_no_checkpoint_could_hold_is_told_in_the_first_step() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.state[self.param_groups[0]["params"][0]]["kept"] = object()
            return super().step(closure)

    class Kept(Small):
        def optimizer(self, named_parameters: Named) -> Any:
            return Odd([p for _, p in named_parameters], lr=0.1)

    with pytest.raises(SpecError, match=r"\['kept'\] is a object, which no checkpoint can hold"):
        train(job(), Kept)


def test_a_checkpoint_of_other_groups_is_refused() -> None:
    class Others(Small):
        def optimizer(self, named_parameters: Named) -> Any:
            return Lamb([p for _, p in named_parameters])

    saved = train(job(checkpoint={"every_steps": 2}), Lambs).checkpoints[2]
    with pytest.raises(SpecError, match="the checkpoint's optimizer has other parameters in its"):
        train(job(), Others, saved=saved)
    with pytest.raises(SpecError, match="has 1 optimizers, the task makes 2"):
        train(job(), Two, saved=saved)


def test_ranks_with_other_optimizers_are_told() -> None:
    class Apart(Small):
        made = 0

        def optimizer(self, named_parameters: Named) -> Any:
            type(self).made += 1
            return SGD([p for _, p in named_parameters], lr=0.1, momentum=0.1 * self.made)

    with pytest.raises(SpecError, match=r"optimizer\(\) gives worker-\d something else than "):
        train(job("ring", 2), Apart)


REFUSED: list[tuple[Any, int, str]] = [
    ("ps-sync", 2, "optimizer.name: under 'ps-sync' no worker updates whole parameters of the "),
    ("ps-async", 2, "optimizer.name: under 'ps-async' no worker"),
    ({"name": "hybrid", "data": 2}, 2, "optimizer.name: under 'hybrid' no worker"),
    ({"name": "ring", "shard_optimizer": True}, 2, "strategy.shard_optimizer: splits parameters, "),
]


@pytest.mark.parametrize(("strategy", "world", "said"), REFUSED)
def test_strategies_that_cannot_do_it_are_refused(strategy: Any, world: int, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(strategy, world)
    assert str(caught.value).startswith(said)


def test_job_and_task_must_agree_who_makes_it() -> None:
    named, asked = job_of(), job_of(optimizer=TASKS)
    check_class(Lambs, {}, overlapping_fields(asked))
    check_class(Small, {}, overlapping_fields(named))
    with pytest.raises(SpecError) as caught:
        check_class(Lambs, {}, overlapping_fields(named))
    said = "optimizer: Lambs has optimizer(), which makes it itself\n  hint: write `optimizer: "
    assert str(caught.value).startswith(said)
    with pytest.raises(SpecError) as caught:
        check_class(Small, {}, overlapping_fields(asked))
    said = "optimizer.name: Small has no optimizer(named_parameters), and the job asks for it"
    assert str(caught.value).startswith(said)


def test_it_takes_the_parameters() -> None:
    kind: type[Task] = type("None", (Small,), {"optimizer": lambda self: None})
    with pytest.raises(SpecError, match=r"optimizer\(\) must take \(named_parameters\)"):
        check_class(kind, {})


def test_a_job_with_it_reads_back(tmp_path: Path) -> None:
    asked = job_of(optimizer=TASKS)
    (tmp_path / "job.yaml").write_text(render_job(asked))
    assert read_job(tmp_path / "job.yaml") == asked
    with pytest.raises(SpecError, match="optimizer: has no arguments beside `name: task`"):
        job_of(optimizer={**TASKS, "lr": 0.1})


def test_it_is_verified_with_the_whole_batch() -> None:
    drawn = job("ring", 2, steps=8, checkpoint={"every_steps": 1, "num_to_keep": 9}, task="a:A")
    assert {row.verdict for row in rows(Factored, drawn).values()} == {EQUAL}
