"""Learning-rate schedules match torch's schedulers and hand-computed values."""

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
SCHEDULE_ADAPTER: TypeAdapter[LRSchedule] = TypeAdapter(NamedSchedule)
TORCH_SCHEDULES: list[type[LRSchedule]] = [
    cls for cls in get_args(AnySchedule) if cls is not Schedule
]
NOT_IN_SEQUENCE = {"OneCycleLR", "CyclicLR", "SequentialLR"}
STEP_SCHEDULES = [cls for cls in TORCH_SCHEDULES if cls is not ReduceLROnPlateau]
NOT_FIELDS = {"optimizer", "last_epoch"}
MOMENTUM_ARGUMENTS = {"base_momentum", "max_momentum"}
DIFFERENT_DEFAULTS = {
    "OneCycleLR": {"max_lr", "total_steps", "epochs", "steps_per_epoch"} | MOMENTUM_ARGUMENTS,
    "CyclicLR": {"scale_fn", "scale_mode"} | MOMENTUM_ARGUMENTS,
}
"""Arguments with other defaults here (from `lr` and the run), functions, and momentum."""


def torch_rates(
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
def test_rates_match_torch_schedulers(
    schedule: dict[str, Any], make: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    ours = [Schedule.model_validate(schedule).rate(LR, s, STEPS) for s in range(STEPS)]
    assert ours == pytest.approx(torch_rates(make), rel=1e-6, abs=1e-9)


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
def test_rates_match_hand_computed_values(schedule: dict[str, Any], expected: list[float]) -> None:
    rates = [Schedule.model_validate(schedule).rate(1.0, step, 9) for step in range(9)]
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (1, 2), (2, 2), (5, 3)])
def test_short_run_has_no_division_by_zero(name: str, warmup: int, total: int) -> None:
    schedule = Schedule.model_validate({"name": name, "warmup_steps": warmup})
    rates = [schedule.rate(1.0, step, total) for step in range(total)]
    assert rates[0] == (1 / warmup if warmup else 1.0)
    assert all(0 <= rate <= 1 for rate in rates)


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("constant", {"final_factor", "every_steps", "gamma", "decay_steps", "decay"}),
        ("linear", {"every_steps", "gamma", "decay_steps", "decay"}),
        ("cosine", {"every_steps", "gamma", "decay_steps", "decay"}),
        ("step", {"final_factor", "decay_steps", "decay"}),
        ("wsd", {"every_steps", "gamma"}),
    ],
)
def test_unused_fields_of_a_schedule(name: str, unused: set[str]) -> None:
    assert Schedule.model_validate({"name": name}).unused_fields() == unused


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
def test_warmup_stable_decay(fields: dict[str, Any], expected: list[float]) -> None:
    schedule = Schedule.model_validate({"name": "wsd", **fields})
    assert [schedule.rate(1.0, step, 9) for step in range(9)] == pytest.approx(expected, abs=1e-6)


def test_every_torch_scheduler_is_supported_or_refused_with_a_reason() -> None:
    expected = {name for name, value in vars(lr_scheduler).items() if _is_public(value)} - {
        "LRScheduler"
    }
    assert expected == {cls.__name__ for cls in TORCH_SCHEDULES} | REFUSED_SCHEDULES.keys()
    assert set(TORCH_SCHEDULES) == set(LRSchedule.__subclasses__()) - {Schedule}


def _is_public(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, LRScheduler) and value.__name__[0] != "_"


@pytest.mark.parametrize("cls", TORCH_SCHEDULES)
def test_arguments_and_defaults_match_torch(cls: type[LRSchedule]) -> None:
    assert get_args(cls.model_fields["name"].annotation) == (cls.__name__,)
    excluded = NOT_FIELDS | DIFFERENT_DEFAULTS.get(cls.__name__, set())
    parameters = inspect.signature(getattr(lr_scheduler, cls.__name__)).parameters.values()
    expected = {
        p.name: (p.default is p.empty, None if p.default is p.empty else p.default)
        for p in parameters
        if p.name not in excluded
    }
    ours = {
        name: (field.is_required(), None if field.is_required() else field.default)
        for name, field in cls.model_fields.items()
        if name not in {"name", "warmup_steps", "metric", *excluded}
    }
    assert ours == expected


def random_schedule(random: Random) -> dict[str, Any]:
    """Return the fields of a random torch scheduler."""
    return random_arguments(random, random.choice(STEP_SCHEDULES).__name__)


def random_arguments(random: Random, name: str) -> dict[str, Any]:
    if name == "SequentialLR":
        names = [cls.__name__ for cls in STEP_SCHEDULES if cls.__name__ not in NOT_IN_SEQUENCE]
        count = random.randint(1, 3)
        parts = [random_arguments(random, random.choice(names)) for _ in range(count)]
        milestones = sorted(random.sample(range(1, 20), count - 1))
        return {"name": name, "schedulers": parts, "milestones": milestones}
    arguments: dict[str, dict[str, Any]] = {
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
    return {"name": name, **arguments[name]}


def make_scheduler(optimizer: torch.optim.Optimizer, fields: dict[str, Any]) -> LRScheduler:
    """Create torch's scheduler from the fields of a job."""
    arguments = {key: value for key, value in fields.items() if key != "name"}
    if fields["name"] == "SequentialLR":
        arguments["schedulers"] = [
            make_scheduler(optimizer, inner) for inner in fields["schedulers"]
        ]
    scheduler: LRScheduler = getattr(lr_scheduler, fields["name"])(optimizer, **arguments)
    return scheduler


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=True))
def test_random_schedule_matches_torch(random: Random) -> None:
    fields, steps = random_schedule(random), random.randint(12, 60)
    base, extra = random.choice([0.8, 3e-4]), {}
    if fields["name"] == "OneCycleLR":
        fields |= random.choice([{}, {"max_lr": 0.3}, {"max_lr": 0.3, "total_steps": steps}])
        extra = {"max_lr": fields.get("max_lr", base), "total_steps": steps}
    ours = SCHEDULE_ADAPTER.validate_python(fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch_rates(
            lambda optimizer: make_scheduler(optimizer, {**fields, **extra}), steps, base
        )
    found = [ours.rate(base, step, steps) for step in range(steps)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12 * base), fields
    if fields["name"] == "CyclicLR":
        return
    # After a warm-up the rates are the same.
    base = fields.get("max_lr", base)
    with_warmup = SCHEDULE_ADAPTER.validate_python({**fields, "warmup_steps": 3})
    rates = [with_warmup.rate(base, step, steps + 3) for step in range(steps + 3)]
    assert rates == pytest.approx([base / 3, base * 2 / 3, base, *found], rel=1e-12)


CYCLES = {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1}
ONE_CYCLE = {"name": "OneCycleLR", "cycle_momentum": False, "max_lr": 0.1}


def test_overflowing_rate_is_infinite() -> None:
    growing = SCHEDULE_ADAPTER.validate_python({"name": "ExponentialLR", "gamma": 10})
    assert growing.rate(1.0, 400, 500) == float("inf")


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
def test_invalid_schedules_are_refused(schedule: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        job_of(lr_schedule=schedule)
    assert str(caught.value).startswith(message)


def test_decay_longer_than_the_epochs_is_refused() -> None:
    schedule = {"name": "wsd", "decay_steps": 100}
    job = job_of(lr_schedule=schedule, steps=None, epochs=1)
    with pytest.raises(
        SpecError, match=r"lr_schedule\.decay_steps: .* all steps of the run, which"
    ):
        prepare(job, Small())


@pytest.mark.parametrize("cls", STEP_SCHEDULES)
def test_job_with_torch_schedule_reads_back(cls: type[LRSchedule], tmp_path: Any) -> None:
    warmup = {} if cls.__name__ == "CyclicLR" else {"warmup_steps": 2}
    job = job_of(lr_schedule={**random_arguments(Random(0), cls.__name__), **warmup})
    (tmp_path / "job.yaml").write_text(render_job(job))
    assert read_job(tmp_path / "job.yaml") == job
    assert fields_of(lr_schedule={})["lr_schedule"] == {} and job_of(lr_schedule={}).lr_schedule


def test_verify_rescales_one_cycle_to_its_steps() -> None:
    job = job_of(lr_schedule={**ONE_CYCLE, "total_steps": 40}, steps=40, max_time_s=1.0)
    short = job_for(VerifyRequest(job, Path(), steps=4), "ring")
    assert isinstance(short, Job), "the shortened job is valid"
    assert short.max_time_s is None, "no time limit ends the run early"
    expected = [job_of(lr_schedule=ONE_CYCLE).lr_schedule.rate(0.1, n, 4) for n in range(4)]
    assert [short.lr_schedule.rate(0.1, step, 4) for step in range(4)] == expected


GROUP_SCHEDULES: list[dict[str, Any]] = [
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


@pytest.mark.parametrize("schedule", GROUP_SCHEDULES, ids=lambda schedule: schedule["name"])
@pytest.mark.parametrize(
    ("strategy", "world"),
    [("ring", 2), ({"name": "ps-sync", "num_servers": 2}, 2), ("ps-async", 1)],
)
def test_training_has_torchs_rates_in_each_group(
    strategy: Any, world: int, schedule: dict[str, Any]
) -> None:
    """All groups share `eta_min`, so their rates are not proportional."""
    optimizer = {"name": "SGD", "lr": 0.2, "groups": [{"match": "head.*", "lr": 0.05}]}
    fields = {"global_batch_size": BATCH, "seed": 5, "evaluation": {"every_epochs": 0}}
    job = job_of(strategy, world, optimizer=optimizer, lr_schedule=schedule, steps=6, **fields)
    task = Small()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    head: Any = model.get_submodule("head")
    rest = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": [*head.parameters()], "lr": 0.05}]
    plain = torch.optim.SGD(groups, lr=0.2)
    scheduler, rates = make_scheduler(plain, schedule), []
    sampler = Sampler(SAMPLES, BATCH, 1, seed=5)
    for step in range(6):
        inputs, targets = zip(*(data[int(i)] for i in sampler.batch_ids(step)), strict=True)
        plain.zero_grad()
        torch.autograd.backward(task.loss(model(torch.stack(inputs)), torch.stack(targets)))
        plain.step()
        rates.append([float(group["lr"]) for group in plain.param_groups])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # OneCycleLR warns about a step after the last
            if step < 5:
                scheduler.step()
    run = train(job, Small)
    reports = [report for report in run.reports[0] if isinstance(report, StepReport)]
    for report, expected in zip(reports, rates, strict=True):
        reported = report.figures["lr"], report.figures["lr_group_0"]
        assert reported == pytest.approx(expected, rel=1e-9, abs=1e-15)
    found = run.parameters()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
