"""Validation of jobs: bounds of single fields, and problems across fields."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from distplat.platform.errors import SpecError
from distplat.platform.spec import Data, Job
from distplat.strategies.catalog import make_job

GOOD: dict[str, Any] = {
    "name": "digits",
    "task": "model:Digits",
    "strategy": "ring",
    "optimizer": {"name": "SGD", "lr": 0.1},
    "steps": 10,
    "global_batch_size": 64,
}


def job(**changes: Any) -> Job:
    return Job.model_validate({**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({}, []),
        ({"epochs": 3}, ["epochs: give `epochs` or `steps`, got both"]),
        ({"steps": None}, ["epochs: give `epochs`, `steps` or `max_time_s`, got none"]),
        ({"steps": None, "epochs": 3}, []),
        ({"scaling": {"use_gpu": True, "resources_per_worker": {"GPU": 0.5}}}, []),
        ({"scaling": {"resources_per_worker": {"GPU": 0}}}, []),
        ({"scaling": {"resources_per_worker": {"memory": 2e9, "CPU": 1e-4}}}, []),
        (
            {"scaling": {"resources_per_worker": {"GPU": 0.5}}},
            ["scaling.resources_per_worker: asks for 0.5 GPU while use_gpu is false"],
        ),
        (
            {"scaling": {"use_gpu": True, "resources_per_worker": {"GPU": 0}}},
            ["scaling.resources_per_worker: asks for 0 GPU while use_gpu is true"],
        ),
        ({"optimizer": {"name": "SGD", "lr": 1, "nesterov": True, "momentum": 0.9}}, []),
        (
            {"optimizer": {"name": "SGD", "lr": 1, "nesterov": True}},
            ["optimizer.nesterov: needs momentum > 0 and dampening 0 (got 0 and 0)"],
        ),
        ({"lr_schedule": {"name": "cosine", "final_factor": 0.1, "warmup_steps": 5}}, []),
        ({"lr_schedule": {"name": "step", "every_steps": 5, "gamma": 0.5}}, []),
        (
            {"lr_schedule": {"name": "cosine", "gamma": 0.5, "every_steps": 2}},
            [
                "lr_schedule.every_steps: has no effect on the schedule 'cosine'"
                "\n  hint: remove it",
                "lr_schedule.gamma: has no effect on the schedule 'cosine'\n  hint: remove it",
            ],
        ),
        (
            {"lr_schedule": {"name": "step"}},
            ["lr_schedule.every_steps: the schedule 'step' needs it, >= 1"],
        ),
        (
            {"data": {"prefetch_factor": 4, "persistent_workers": True, "pin_memory": True}},
            [
                "data.persistent_workers: has no effect without loader processes"
                "\n  hint: give num_workers, too",
                "data.prefetch_factor: has no effect without loader processes"
                "\n  hint: give num_workers, too",
                "data.pin_memory: has no effect without GPUs: torch pins no memory then"
                "\n  hint: remove it, or set scaling.use_gpu",
            ],
        ),
        ({"data": {"num_workers": 1, "prefetch_factor": 4, "persistent_workers": True}}, []),
        ({"data": {"pin_memory": True}, "scaling": {"use_gpu": True}}, []),
        ({"data": {"pin_memory": False, "persistent_workers": False}}, []),
    ],
)
def test_problems_across_fields(changes: dict[str, Any], problems: list[str]) -> None:
    assert [str(problem) for problem in job(**changes).problems()] == problems


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("name", ["a", "a-b", "0", "x" * 63], ["", "-a", "a-", "A", "a_b", "a\n", "x" * 64, "é"]),
        (
            "task",
            [None, "m:C", "a.b_c:_D", "train.py --lr 0.1", "a/b-c.py"],
            ["m", "m:", ":C", "m:C.d", "m:C()", "1:C", "m:C\n", "a" * 1999 + ":C", "a.py 'b"],
        ),
        ("storage_path", ["runs", "/a b/ü"], ["", "a\0b", "a\nb", "x" * 1025]),
        ("strategy", ["x", {"name": "x", "a": 1}], ["", "x" * 64, 5, None, ["x"], {}, {"name": 1}]),
        ("seed", [0, 2.0, 2**40], [-1, 2.5, "1", True, 2**40 + 1, float("nan")]),
        ("gradient_accumulation", [1, 64], [0, 2**20 + 1, 4e9]),
        ("global_batch_size", [2**30], [0, 2**30 + 1]),
        ("clip_norm", [None, 1, 1e-300, float("inf")], [0, -1, True, float("nan")]),
        ("data", [{"num_workers": 256}], [{"num_workers": 257}, {"prefetch_factor": 2000}]),
        ("scaling", [{"num_workers": 1024}], [{"num_workers": 1025}, {"num_workers": "2"}]),
    ],
)
def test_bounds_of_fields(field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        job(**{field: value})
    for value in bad:
        with pytest.raises(ValidationError):
            job(**{field: value})


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("ring", {}),
        ({"name": "ring"}, {}),
        ({"name": "ring", "a": 1}, {"a": 1}),
        ({"name": "ring", "options": {"a": 1}}, {"a": 1}),
        ({"name": "ring", "options": {"a": 1}, "b": 2}, {"a": 1, "b": 2}),
    ],
)
def test_strategy_options_may_be_beside_the_name(field: object, options: dict[str, int]) -> None:
    strategy = job(strategy=field).strategy
    assert (strategy.name, strategy.options) == ("ring", options)


def test_model_dump_round_trip() -> None:
    first = job(strategy={"name": "ring", "a": 1})
    assert Job.model_validate(first.model_dump()) == first


@pytest.mark.parametrize(
    ("scaling", "world", "resources"),
    [
        ({}, 1, {"CPU": 1.0}),
        ({"num_workers": 0}, 1, {"CPU": 1.0}),
        ({"num_workers": 3, "use_gpu": True}, 3, {"CPU": 1.0, "GPU": 1.0}),
        ({"resources_per_worker": {"CPU": 2, "tpu": 1}}, 1, {"CPU": 2.0, "tpu": 1.0}),
    ],
)
def test_scaling(scaling: dict[str, Any], world: int, resources: dict[str, float]) -> None:
    parsed = job(scaling=scaling).scaling
    assert (parsed.world, parsed.resources()) == (world, resources)


def test_job_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        job().steps = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"GPU": 1.5}, "'GPU' must be a whole number above 1"),
        ({"CPU": 1e8}, "'CPU' must be <= 4096"),
        ({"CPU": 0.00001}, "'CPU' must be 0 or at least 0.0001"),
        ({"memory": 0.5}, "'memory' must be a whole number of bytes"),
        ({"bundle": 1}, "'bundle' is a name of Ray's own"),
        ({"bundle_group_0": 1}, "'bundle_group_0' is a name of Ray's own"),
        ({"object_store_memory": 1e9}, "'object_store_memory' is a name of Ray's own"),
    ],
)
@pytest.mark.parametrize("role", ["worker", "server", "table"])
def test_rejects_resources_that_ray_rejects(
    role: str, needs: dict[str, float], message: str
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "worker": {"scaling": {"resources_per_worker": needs, "use_gpu": "GPU" in needs}},
        "server": {"strategy": {"name": "ps-sync", "resources_per_server": needs}},
        "table": {
            "embeddings": {
                "optimizer": {"name": "SGD", "lr": 0.1},
                "resources_per_server": needs,
            }
        },
    }
    with pytest.raises(SpecError, match=re.escape(message)):
        make_job({**GOOD, **changes[role]})


def test_former_name_of_num_workers_is_accepted_with_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert Data.model_validate({"num_loaders": 3, "shuffle": False}).num_workers == 3
    assert caplog.messages == ["data.num_loaders is called data.num_workers now, as in torch"]
    with pytest.raises(ValidationError, match="num_loaders is the former name of num_workers"):
        Data.model_validate({"num_loaders": 3, "num_workers": 3})
