"""The schedule against torch's own schedulers, and against a table written by hand."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, get_args

import pytest
import torch
from grouped_task import BATCH, SAMPLES, Small
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import fields_of, job_of
from local_run import train
from pydantic import TypeAdapter
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, StepLR

from distplat.actors.verifying import VerifyRequest, job_for
from distplat.platform.errors import SpecError
from distplat.platform.job_file import read_job, render_job
from distplat.platform.lr_schedules import (
    REFUSED_SCHEDULES,
    AnySchedule,
    LRSchedule,
    NamedSchedule,
    ReduceLROnPlateau,
    Schedule,
)
from distplat.platform.progress import StepReport
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.loop.session import prepare

LR, STEPS = 0.8, 30
KINDS: TypeAdapter[LRSchedule] = TypeAdapter(NamedSchedule)
OF_TORCH: list[type[LRSchedule]] = [one for one in get_args(AnySchedule) if one is not Schedule]
WITH_THEIR_OWN_RATES = {"OneCycleLR", "CyclicLR", "SequentialLR"}
OF_STEPS = [kind for kind in OF_TORCH if kind is not ReduceLROnPlateau]
NOT_OURS = {"optimizer", "last_epoch"}
OF_MOMENTUM = {"base_momentum", "max_momentum"}
NOT_ALIKE = {
    "OneCycleLR": {"max_lr", "total_steps", "epochs", "steps_per_epoch"} | OF_MOMENTUM,
    "CyclicLR": {"scale_fn", "scale_mode"} | OF_MOMENTUM,
}
"""What has a default here: `lr`, the length of the run; functions; and what belongs to momentum."""


def of_torch(
    make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int = STEPS, lr: float = LR
) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    rates = [float(optimizer.param_groups[0]["lr"])]
    for _ in range(steps - 1):
        optimizer.step()
        scheduler.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        ({"name": "constant"}, lambda o: ConstantLR(o, factor=1.0)),
        ({"name": "cosine"}, lambda o: CosineAnnealingLR(o, T_max=STEPS - 1)),
        (
            {"name": "cosine", "final_factor": 0.25},
            lambda o: CosineAnnealingLR(o, T_max=STEPS - 1, eta_min=0.25 * LR),
        ),
        (
            {"name": "linear", "final_factor": 0.1},
            lambda o: LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=STEPS - 1),
        ),
        (
            {"name": "step", "every_steps": 7, "gamma": 0.3},
            lambda o: StepLR(o, step_size=7, gamma=0.3),
        ),
    ],
    ids=["constant", "cosine", "cosine-final", "linear", "step"],
)
def test_the_same_as_torch(
    schedule: dict[str, Any], make: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    ours = [Schedule.model_validate(schedule).rate(LR, s, STEPS) for s in range(STEPS)]
    assert ours == pytest.approx(of_torch(make), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ({"name": "linear", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0]),
        (
            {"name": "cosine", "warmup_steps": 4},
            [0.25, 0.5, 0.75, 1, 1, 0.853553, 0.5, 0.146447, 0],
        ),
        (
            {"name": "step", "warmup_steps": 4, "every_steps": 2, "gamma": 0.5},
            [0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5, 0.25],
        ),
        ({"name": "linear", "final_factor": 1.0}, [1] * 9),
    ],
)
def test_by_hand(schedule: dict[str, Any], expected: list[float]) -> None:
    rates = [Schedule.model_validate(schedule).rate(1.0, step, 9) for step in range(9)]
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (1, 2), (2, 2), (5, 3)])
def test_a_short_run_has_no_division_by_zero(name: str, warmup: int, total: int) -> None:
    schedule = Schedule.model_validate({"name": name, "warmup_steps": warmup})
    rates = [schedule.rate(1.0, step, total) for step in range(total)]
    assert rates[0] == (1 / warmup if warmup else 1.0)
    assert all(0 <= rate <= 1 for rate in rates)


@pytest.mark.parametrize(
    ("name", "idle"),
    [
        ("constant", {"final_factor", "every_steps", "gamma", "decay_steps", "decay"}),
        ("linear", {"every_steps", "gamma", "decay_steps", "decay"}),
        ("cosine", {"every_steps", "gamma", "decay_steps", "decay"}),
        ("step", {"final_factor", "decay_steps", "decay"}),
        ("wsd", {"every_steps", "gamma"}),
    ],
)
def test_fields_without_effect_on_a_schedule(name: str, idle: set[str]) -> None:
    assert Schedule.model_validate({"name": name}).unused_fields() == idle


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"decay_steps": 2}, [1, 1, 1, 1, 1, 1, 1, 0.5, 0]),
        ({"decay_steps": 4, "warmup_steps": 2}, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        ({"decay_steps": 4, "decay": "sqrt"}, [1, 1, 1, 1, 1, 0.5, 0.292893, 0.133975, 0]),
        ({"decay_steps": 2, "decay": "cosine", "final_factor": 0.5}, [1] * 7 + [0.75, 0.5]),
        ({"decay_steps": 9}, [8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9, 0]),
    ],
)
def test_warm_up_stable_decay(fields: dict[str, Any], expected: list[float]) -> None:
    schedule = Schedule.model_validate({"name": "wsd", **fields})
    assert [schedule.rate(1.0, step, 9) for step in range(9)] == pytest.approx(expected, abs=1e-6)


def test_every_scheduler_of_torch_is_here_or_refused_with_the_reason() -> None:
    theirs = {n for n, one in vars(lr_scheduler).items() if _is_public(one)} - {"LRScheduler"}
    assert theirs == {kind.__name__ for kind in OF_TORCH} | REFUSED_SCHEDULES.keys()
    assert set(OF_TORCH) == set(LRSchedule.__subclasses__()) - {Schedule}


def _is_public(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, LRScheduler) and one.__name__[0] != "_"


@pytest.mark.parametrize("kind", OF_TORCH)
def test_arguments_and_defaults_are_torchs(kind: type[LRSchedule]) -> None:
    assert get_args(kind.model_fields["name"].annotation) == (kind.__name__,)
    left_out = NOT_OURS | NOT_ALIKE.get(kind.__name__, set())
    parameters = inspect.signature(getattr(lr_scheduler, kind.__name__)).parameters.values()
    theirs = {
        one.name: (one.default is one.empty, None if one.default is one.empty else one.default)
        for one in parameters
        if one.name not in left_out
    }
    ours = {
        name: (one.is_required(), None if one.is_required() else one.default)
        for name, one in kind.model_fields.items()
        if name not in {"name", "warmup_steps", "metric", *left_out}
    }
    assert ours == theirs


def drawn(random: Random) -> dict[str, Any]:
    """Draw a scheduler of torch with arguments."""
    return drawn_of(random, random.choice(OF_STEPS).__name__)


def drawn_of(random: Random, name: str) -> dict[str, Any]:
    if name == "SequentialLR":
        kinds = [one.__name__ for one in OF_STEPS if one.__name__ not in WITH_THEIR_OWN_RATES]
        count = random.randint(1, 3)
        parts = [drawn_of(random, random.choice(kinds)) for _ in range(count)]
        milestones = sorted(random.sample(range(1, 20), count - 1))
        return {"name": name, "schedulers": parts, "milestones": milestones}
    some: dict[str, dict[str, Any]] = {
        "ConstantLR": {
            "factor": random.choice([0.01, 0.3, 1]),
            "total_iters": random.randint(1, 40),
        },
        "LinearLR": {
            "start_factor": random.choice([0.01, 1]),
            "end_factor": random.choice([0.0, 0.4]),
            "total_iters": random.randint(1, 40),
        },
        "PolynomialLR": {"total_iters": random.randint(1, 40), "power": random.choice([0.5, 1, 3])},
        "StepLR": {"step_size": random.randint(1, 12), "gamma": random.choice([0.5, 1.5])},
        "MultiStepLR": {
            "milestones": [random.randint(1, 30) for _ in range(random.randint(1, 4))],
            "gamma": random.choice([0.5, 1.5]),
        },
        "ExponentialLR": {"gamma": random.choice([0.9, 1.01])},
        "CosineAnnealingLR": {"T_max": random.randint(1, 40), "eta_min": random.choice([0, 0.1])},
        "CosineAnnealingWarmRestarts": {
            "T_0": random.randint(1, 9),
            "T_mult": random.randint(1, 3),
            "eta_min": random.choice([0, 0.1]),
        },
        "OneCycleLR": {
            "pct_start": random.choice([0.0, 0.1, 0.3, 0.37, 1.0]),
            "anneal_strategy": random.choice(["cos", "linear"]),
            "cycle_momentum": False,
            "div_factor": random.choice([1, 25.0]),
            "final_div_factor": random.choice([1e4, 2]),
            "three_phase": random.random() < 0.3,
        },
        "CyclicLR": {
            "base_lr": random.choice([0.0, 0.01]),
            "max_lr": random.choice([0.005, 0.3]),
            "step_size_up": random.randint(1, 9),
            "step_size_down": random.choice([None, 1, 7]),
            "mode": random.choice(["triangular", "triangular2", "exp_range"]),
            "gamma": random.choice([1.0, 0.9]),
            "cycle_momentum": False,
        },
    }
    return {"name": name, **some[name]}


def made(optimizer: torch.optim.Optimizer, fields: dict[str, Any]) -> LRScheduler:
    """Make torch's scheduler of a job's fields."""
    arguments = {key: value for key, value in fields.items() if key != "name"}
    if fields["name"] == "SequentialLR":
        arguments["schedulers"] = [made(optimizer, one) for one in fields["schedulers"]]
    scheduler: LRScheduler = getattr(lr_scheduler, fields["name"])(optimizer, **arguments)
    return scheduler


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=True))
def test_each_step_has_torchs_rate(random: Random) -> None:
    fields, steps = drawn(random), random.randint(12, 60)
    base, more = random.choice([0.8, 3e-4]), {}
    if fields["name"] == "OneCycleLR":
        fields |= random.choice([{}, {"max_lr": 0.3}, {"max_lr": 0.3, "total_steps": steps}])
        more = {"max_lr": fields.get("max_lr", base), "total_steps": steps}
    ours = KINDS.validate_python(fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = of_torch(lambda optimizer: made(optimizer, {**fields, **more}), steps, base)
    found = [ours.rate(base, step, steps) for step in range(steps)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12 * base), fields
    if fields["name"] == "CyclicLR":
        return
    # Behind a warm-up it is the same, later.
    base = fields.get("max_lr", base)
    later = KINDS.validate_python({**fields, "warmup_steps": 3})
    warm = [later.rate(base, step, steps + 3) for step in range(steps + 3)]
    assert warm == pytest.approx([base / 3, base * 2 / 3, base, *found], rel=1e-12)


CYCLES = {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1}
ONE_CYCLE = {"name": "OneCycleLR", "cycle_momentum": False, "max_lr": 0.1}


def test_a_rate_that_grows_without_end_is_infinite() -> None:
    grows = KINDS.validate_python({"name": "ExponentialLR", "gamma": 10})
    assert grows.rate(1.0, 400, 500) == float("inf")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "ChainedScheduler"}, "lr_schedule.name: unknown lr_schedule 'ChainedScheduler'"
         "\n  hint: it multiplies others; SequentialLR chains them one after the other"),
        ({"name": "CyclicLR", "max_lr": 1}, "lr_schedule.base_lr: required, but missing"),
        (CYCLES, "lr_schedule.cycle_momentum: must be false, which is not"),
        ({**CYCLES, "cycle_momentum": False, "warmup_steps": 1}, "lr_schedule.warmup_steps: cannot "
         "be combined with CyclicLR, which has its own rates"),
        ({"name": "SequentialLR", "schedulers": [{"name": "OneCycleLR"}], "milestones": []},
         "lr_schedule.schedulers.0.name: unknown scheduler 'OneCycleLR'\n  hint: allowed: "),
        ({"name": "SequentialLR", "schedulers": [{"name": "ReduceLROnPlateau"}], "milestones": []},
         "lr_schedule.schedulers.0.name: unknown scheduler 'ReduceLROnPlateau'\n  hint: with a "
         "warm-up it is {name: ReduceLROnPlateau, warmup_steps: ...}; allowed: "),
        ({"name": "SequentialLR", "schedulers": [{"name": "StepLR"}], "milestones": []},
         "lr_schedule.schedulers.0.step_size: required, but missing"),
        ({"name": "SequentialLR", "schedulers": [{"name": "LinearLR"}], "milestones": [2]},
         "lr_schedule.milestones: must be one fewer than `schedulers`, and are 1 for 1"),
        ({"name": "SequentialLR", "schedulers": 3 * [{"name": "LinearLR"}], "milestones": [2, 2]},
         "lr_schedule.milestones: must grow from one to the next (got [2, 2])"),
        ({"name": "LambdaLR"}, "lr_schedule.name: unknown lr_schedule 'LambdaLR'\n  hint: it needs "
         "a function, which a job file cannot hold"),
        ({"name": "cosin"}, "lr_schedule.name: unknown lr_schedule 'cosin'\n  hint: did you mean "
         "'cosine'?"),
        ({"name": "StepLR"}, "lr_schedule.step_size: required, but missing"),
        ({"name": "StepLR", "step_size": 2, "gama": 2}, "lr_schedule.gama: unknown field (value 2)"
         "\n  hint: did you mean 'gamma'? allowed: gamma, name, step_size, warmup_steps"),
        ({"name": "MultiStepLR", "milestones": []}, "lr_schedule.milestones: must have at least 1"),
        ({"name": "OneCycleLR"}, "lr_schedule.cycle_momentum: must be false, which is not"),
        ({"name": "OneCycleLR", "max_lr": [1]}, "lr_schedule.max_lr: must be a number (got [1])"),
        ({**ONE_CYCLE, "total_steps": 10}, "lr_schedule.total_steps: is 10, and the run has 4 "
         "steps\n  hint: remove it: the run's are taken"),
        ({**ONE_CYCLE, "total_steps": 4, "warmup_steps": 1}, "lr_schedule.total_steps: is 4, and "
         "the run has 3 steps after the warm-up"),
        ({"name": "wsd"}, "lr_schedule.decay_steps: the schedule 'wsd' needs it, >= 1"),
        ({"name": "wsd", "decay_steps": 3, "warmup_steps": 2}, "lr_schedule.decay_steps: with "
         "`warmup_steps` more than all steps of the run, which are 4"),
        ({"name": "cosine", "decay": "sqrt"}, "lr_schedule.decay: has no effect on the schedule"),
        ("cosine", "lr_schedule: must be a mapping (got 'cosine')"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(schedule: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        job_of(lr_schedule=schedule)
    assert str(caught.value).startswith(message)


def test_where_epochs_say_how_long_a_run_is_the_decay_must_fit_too() -> None:
    schedule = {"name": "wsd", "decay_steps": 100}
    of = job_of(lr_schedule=schedule, steps=None, epochs=1)
    with pytest.raises(
        SpecError, match=r"lr_schedule\.decay_steps: .* all steps of the run, which"
    ):
        prepare(of, Small())


@pytest.mark.parametrize("kind", OF_STEPS)
def test_a_job_with_it_reads_back(kind: type[LRSchedule], tmp_path: Any) -> None:
    warmup = {} if kind.__name__ == "CyclicLR" else {"warmup_steps": 2}
    job = job_of(lr_schedule={**drawn_of(Random(0), kind.__name__), **warmup})
    (tmp_path / "job.yaml").write_text(render_job(job))
    assert read_job(tmp_path / "job.yaml") == job
    assert fields_of(lr_schedule={})["lr_schedule"] == {} and job_of(lr_schedule={}).lr_schedule


def test_verify_has_one_cycle_over_its_few_steps() -> None:
    of = job_of(lr_schedule={**ONE_CYCLE, "total_steps": 40}, steps=40, max_time_s=1.0)
    short = job_for(VerifyRequest(of, Path(), steps=4), "ring")
    assert isinstance(short, Job), "no SpecError"
    assert short.max_time_s is None, "no time ends it before its steps"
    expected = [job_of(lr_schedule=ONE_CYCLE).lr_schedule.rate(0.1, n, 4) for n in range(4)]
    assert [short.lr_schedule.rate(0.1, step, 4) for step in range(4)] == expected


IN_GROUPS: list[dict[str, Any]] = [
    {"name": "CosineAnnealingLR", "T_max": 4, "eta_min": 0.02},
    {**ONE_CYCLE, "total_steps": 6},
    {**CYCLES, "step_size_up": 2, "mode": "triangular2", "cycle_momentum": False},
    {
        "name": "SequentialLR",
        "schedulers": [
            {"name": "LinearLR", "start_factor": 0.1, "total_iters": 2},
            {"name": "CosineAnnealingLR", "T_max": 4, "eta_min": 0.02},
        ],
        "milestones": [2],
    },
]


@pytest.mark.parametrize("schedule", IN_GROUPS, ids=lambda one: one["name"])
@pytest.mark.parametrize(
    ("strategy", "world"),
    [("ring", 2), ({"name": "ps-sync", "num_servers": 2}, 2), ("ps-async", 1)],
)
def test_a_run_has_torchs_rates_in_each_group(
    strategy: Any, world: int, schedule: dict[str, Any]
) -> None:
    """`eta_min` is the same for all groups, so no factor on their rates gives this."""
    optimizer = {"name": "SGD", "lr": 0.2, "groups": [{"match": "head.*", "lr": 0.05}]}
    more = {"global_batch_size": BATCH, "seed": 5, "evaluation": {"every_epochs": 0}}
    of = job_of(strategy, world, optimizer=optimizer, lr_schedule=schedule, steps=6, **more)
    task = Small()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    head: Any = model.get_submodule("head")
    rest = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": [*head.parameters()], "lr": 0.05}]
    plain = torch.optim.SGD(groups, lr=0.2)
    scheduler, rates = made(plain, schedule), []
    sampler = Sampler(SAMPLES, BATCH, 1, seed=5)
    for step in range(6):
        inputs, targets = zip(*(data[int(i)] for i in sampler.batch_ids(step)), strict=True)
        plain.zero_grad()
        torch.autograd.backward(task.loss(model(torch.stack(inputs)), torch.stack(targets)))
        plain.step()
        rates.append([float(group["lr"]) for group in plain.param_groups])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # OneCycleLR counts a step after the last
            if step < 5:
                scheduler.step()
    run = train(of, Small)
    told = [one for one in run.reports[0] if isinstance(one, StepReport)]
    for one, expected in zip(told, rates, strict=True):
        got = one.figures["lr"], one.figures["lr_group_0"]
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-15)
    found = run.parameters()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
