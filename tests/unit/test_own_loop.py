"""The job of a train function: what it does without, what it refuses, how it is found and run."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from distplat import Trainer
from distplat.actors.task_check import TaskCheck, check_function
from distplat.actors.verifying import Wanted, _checked
from distplat.platform.errors import SpecError, UserCodeError
from distplat.platform.job_file import render_job
from distplat.platform.own_loop import OF_TASKS
from distplat.platform.spec import Job
from distplat.strategies.catalog import load_job, make_job
from distplat.strategies.task import Task

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_function"
FIELDS: dict[str, Any] = {"name": "loop", "strategy": "ring", "task": "train:train"}
LOOP = {"optimizer": {"name": "SGD", "lr": 0.1}, "global_batch_size": 4, "steps": 2}

MODULE = """
import distplat

def train(config):
    for _ in range(3):
        distplat.report({"loss": 2.0, "width": config["width"]})

def bare():
    raise KeyError("bare")

class Other(distplat.Task):
    def model(self): ...
    def train_data(self): ...
    def loss(self, outputs, targets): ...
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "own_loops.py").write_text(MODULE)
    before = [*sys.path]
    yield tmp_path
    sys.path[:] = before
    sys.modules.pop("own_loops", None)


def test_a_job_without_the_fields_of_a_loop_is_one_of_a_train_function(tmp_path: Path) -> None:
    job = make_job(FIELDS)
    assert job.own_loop
    assert not make_job({**FIELDS, **LOOP}).own_loop
    text = render_job(job)
    assert "own_loop: true" in text
    assert "optimizer" not in text
    (tmp_path / "job.yaml").write_text(text)
    assert load_job(tmp_path / "job.yaml").own_loop


def test_some_of_the_fields_are_those_of_a_task_that_lacks_the_others() -> None:
    with pytest.raises(SpecError) as caught:
        make_job({**FIELDS, "steps": 2})
    text = str(caught.value)
    assert "optimizer: required, but missing" in text
    assert "global_batch_size: required, but missing" in text


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"clip_norm": 1.0}, "clip_norm: has no effect on a train function"),
        ({"ema": {"decay": 0.9}}, "ema: has no effect on a train function"),
        ({"precision": "bf16"}, "precision: has no effect"),
        ({"data": {"num_workers": 2}}, "data: has no effect"),
        ({"own_loop": True, **LOOP}, "optimizer: has no effect"),
        ({"checkpoint": {"every_steps": 5}}, "checkpoint.every_steps: a train function says when"),
        ({"failure": {"non_finite": "skip"}}, "allowed: stop, ignore"),
        ({"strategy": {"name": "ps-sync", "backup_workers": 1}}, "strategy.backup_workers: is for"),
        ({"strategy": {"name": "ps-sync", "replication": 2}}, "strategy.replication: is for tasks"),
        ({"strategy": {"name": "ps-sync", "wire": "bf16"}}, "strategy.wire: is for tasks"),
        (
            {"strategy": {"name": "ps-async", "replication": 2}},
            "strategy.replication: is for tasks",
        ),
        ({"strategy": "hybrid"}, "use `ring`, `ps-sync` or `ps-async`, or write"),
        ({"strategy": {"name": "ring", "shard_optimizer": True}}, "strategy.shard_optimizer"),
        ({"strategy": {"name": "ring", "compression": "topk"}}, "none, fp16, bf16"),
    ],
)
def test_what_has_no_effect_is_refused(more: Mapping[str, Any], text: str) -> None:
    with pytest.raises(SpecError) as caught:
        make_job({**FIELDS, **more})
    shown = " ".join([str(caught.value), *(one.hint for one in caught.value.problems)])
    assert text in shown


def test_each_field_has_an_effect_on_a_train_function_or_is_refused() -> None:
    used = {"name", "task", "own_loop", "task_args", "strategy", "scaling", "seed", "checkpoint"}
    used |= {"failure", "storage_path", "trackers", "early_stop", "max_time_s"}
    assert {*Job.model_fields} == used | {*OF_TASKS}
    with pytest.raises(SpecError, match="ema: has no effect on a train function"):
        make_job({**FIELDS, "ema": {"decay": 0.9}})


async def coroutine(config: Any) -> None: ...


def two(config: Any, more: Any) -> None: ...


def named(config: Any, *, more: Any) -> None: ...


@pytest.mark.parametrize(
    ("function", "text"),
    [(coroutine, "coroutine"), (two, "needs config, more"), (named, "needs"), (3, "got a int")],
)
def test_a_function_that_cannot_be_called_is_refused(function: Any, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        check_function(function)


@pytest.mark.parametrize(
    ("name", "function", "text"),
    [
        ("train", True, ""),
        ("bare", True, ""),
        ("trian", True, "has no function 'trian'"),
        ("Other", True, "own_loops:Other is a Task"),
        ("train", False, "is a function, and the job has the fields of a task"),
    ],
)
def test_a_process_of_its_own_looks_at_it(
    name: str, function: bool, text: str, folder: Path
) -> None:
    check = TaskCheck(f"own_loops:{name}", str(folder), [], shown=True, function=function)
    try:
        if not text:
            assert check.result(60) == []
            return
        with pytest.raises(SpecError) as caught:
            check.result(60)
        assert text in str(caught.value)
    finally:
        check.end()


def test_it_runs_in_the_calling_process(folder: Path) -> None:
    job = {**FIELDS, "task": "own_loops:train", "task_args": {"width": 3}, "storage_path": "runs"}
    result = Trainer({**job, "scaling": {"num_workers": 0}}, working_dir=folder).fit()
    assert [one.step for one in result.history] == [1, 2, 3]
    assert result.metrics == {"loss": 2.0, "width": 3.0}


def test_an_error_is_the_users_with_his_frames_alone(folder: Path) -> None:
    job = {**FIELDS, "task": "own_loops:bare", "scaling": {"num_workers": 0}}
    with pytest.raises(UserCodeError) as caught:
        Trainer(job, working_dir=folder).fit()
    assert caught.value.exit_code == 1
    lines = [one for one in caught.value.traceback.splitlines() if one.startswith('  File "')]
    assert len(lines) == 1
    assert "own_loops.py" in lines[0]


def test_a_function_and_the_job_of_a_task_do_not_go_together() -> None:
    def train(config: Any) -> None: ...

    fields = {"name": "loop", "strategy": "ring"}
    assert Trainer(fields, train).job.own_loop
    with pytest.raises(SpecError, match="Trainer got a function"):
        Trainer(make_job({**fields, **LOOP}), train)
    with pytest.raises(SpecError, match="optimizer: has no effect"):
        Trainer({**fields, **LOOP}, train)

    class Mine(Task): ...

    with pytest.raises(SpecError, match="must be a train function"):
        Trainer({**fields, "own_loop": True}, Mine)


def test_a_train_function_is_not_verified(tmp_path: Path) -> None:
    wanted = Wanted.__new__(Wanted)
    object.__setattr__(wanted, "job", make_job(FIELDS))
    with pytest.raises(SpecError, match="such a loop itself"):
        _checked(wanted)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_the_example_learns_and_goes_on(strategy: str, tmp_path: Path) -> None:
    given = ["scaling.num_workers=0", "task_args.epochs=4", f"strategy={strategy}"]
    job = load_job(EXAMPLE / "job.yaml", overrides=given)
    first = Trainer(job, working_dir=EXAMPLE, storage_dir=tmp_path).fit()
    assert first.metrics["accuracy"] > 0.9
    again = Trainer(job, resume=first.path, working_dir=EXAMPLE, storage_dir=tmp_path).fit()
    assert again.history == [], "all epochs are made"
    before, after = (load_file(str(one.checkpoint)) for one in (first, again))
    assert all((before[name] == after[name]).all() for name in before)
