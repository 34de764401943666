"""Jobs of train functions: required and rejected fields, checks of the function, runs."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from distplat import Trainer
from distplat.actors.task_check import TaskCheck, check_function
from distplat.actors.task_loading import call_train_function
from distplat.actors.verifying import VerifyRequest, _check_task
from distplat.platform.errors import SpecError, UserCodeError
from distplat.platform.job_file import render_job
from distplat.platform.own_loop import OF_TASKS
from distplat.platform.spec import Job
from distplat.strategies.catalog import load_job, make_job
from distplat.strategies.task import Task

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_function"
FIELDS: dict[str, Any] = {"name": "loop", "strategy": "ring", "task": "train:train"}
LOOP = {"optimizer": {"name": "SGD", "lr": 0.1}, "global_batch_size": 4, "steps": 2}

SCRIPT = """
import os
from datetime import timedelta

import torch
import torch.distributed as dist

import distplat

LOCAL_RANK = int(os.environ["LOCAL_RANK"])

def script(width, height):
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    total = torch.tensor([float(os.environ["RANK"]), 1.0])
    dist.all_reduce(total)
    figures = {"loss": 0.0, "rank": total[0], "world": total[1], "area": width * height}
    distplat.report({**figures, "local": LOCAL_RANK})
"""

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
    (tmp_path / "own_script.py").write_text(SCRIPT)
    before = [*sys.path]
    yield tmp_path
    sys.path[:] = before
    for module in ("own_loops", "own_script"):
        sys.modules.pop(module, None)


def test_job_without_loop_fields_is_for_a_train_function(tmp_path: Path) -> None:
    job = make_job(FIELDS)
    assert job.own_loop
    assert not make_job({**FIELDS, **LOOP}).own_loop
    text = render_job(job)
    assert "own_loop: true" in text
    assert "optimizer" not in text
    (tmp_path / "job.yaml").write_text(text)
    assert load_job(tmp_path / "job.yaml").own_loop


def test_job_with_some_loop_fields_requires_the_others() -> None:
    with pytest.raises(SpecError) as caught:
        make_job({**FIELDS, "steps": 2})
    text = str(caught.value)
    assert "optimizer: required, but missing" in text
    assert "global_batch_size: required, but missing" in text


@pytest.mark.parametrize(
    ("overrides", "text"),
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
        ({"strategy": {"name": "ring", "compression": "topk"}}, "none, fp16 or bf16"),
    ],
)
def test_field_without_an_effect_is_rejected(overrides: Mapping[str, Any], text: str) -> None:
    with pytest.raises(SpecError) as caught:
        make_job({**FIELDS, **overrides})
    shown = " ".join([str(caught.value), *(problem.hint for problem in caught.value.problems)])
    assert text in shown


def test_every_field_has_an_effect_or_is_rejected() -> None:
    used = {"name", "task", "own_loop", "task_args", "strategy", "scaling", "seed", "checkpoint"}
    used |= {"failure", "storage_path", "trackers", "early_stop", "max_time_s"}
    assert {*Job.model_fields} == used | {*OF_TASKS}
    with pytest.raises(SpecError, match="ema: has no effect on a train function"):
        make_job({**FIELDS, "ema": {"decay": 0.9}})


async def coroutine(config: Any) -> None: ...


def two_arguments(epochs: int, lr: float) -> None: ...


def keyword_only(config: Any, *, more: Any) -> None: ...


def positional_only(epochs: int, lr: float, /) -> None: ...


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        (coroutine, [], "coroutine"),
        (two_arguments, ["epochs"], "task_args: two_arguments needs the argument 'lr'"),
        (
            two_arguments,
            ["epochs", "lr", "lrr"],
            "task_args.lrr: two_arguments takes no such argument",
        ),
        (keyword_only, ["config"], "keyword_only needs the argument 'more'"),
        (positional_only, ["epochs", "lr"], "positional-only arguments"),
        (3, [], "got a int"),
    ],
)
def test_function_that_cannot_be_called_is_rejected(
    function: Any, arguments: list[str], text: str
) -> None:
    with pytest.raises(SpecError, match=text):
        check_function(function, arguments)


def test_task_args_are_passed_as_keywords_or_as_a_config() -> None:
    calls: list[Any] = []

    def with_names(epochs: int, lr: float, *, width: int = 3) -> None:
        calls.append((epochs, lr, width))

    def with_config(config: Any, width: int = 3) -> None:
        calls.append((config, width))

    def with_kwargs(**kwargs: Any) -> None:
        calls.append(kwargs)

    call_train_function(with_names, {"lr": 0.1, "epochs": 2})
    call_train_function(with_config, {"lr": 0.1})
    call_train_function(lambda: calls.append("bare"), {"lr": 0.1})
    call_train_function(with_kwargs, {"lr": 0.1})
    call_train_function(with_config, {"config": "a.yaml", "width": 5})
    assert calls == [(2, 0.1, 3), ({"lr": 0.1}, 3), "bare", {"lr": 0.1}, ("a.yaml", 5)]


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
def test_task_check_runs_in_a_separate_process(
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


def test_train_function_runs_in_the_calling_process(folder: Path) -> None:
    job = {**FIELDS, "task": "own_loops:train", "task_args": {"width": 3}, "storage_path": "runs"}
    result = Trainer({**job, "scaling": {"num_workers": 0}}, working_dir=folder).fit()
    assert [entry.step for entry in result.history] == [1, 2, 3]
    assert result.metrics == {"loss": 2.0, "width": 3.0}


def test_script_finds_the_environment_of_torchrun(folder: Path) -> None:
    """The environment is also set at import, and in the process of the task check."""
    job = {**FIELDS, "task": "own_script:script", "task_args": {"width": 3, "height": 2}}
    before = dict(os.environ)
    result = Trainer({**job, "scaling": {"num_workers": 0}}, working_dir=folder).fit()
    assert result.metrics == {"loss": 0, "rank": 0, "world": 1, "area": 6, "local": 0}
    assert not dist.is_initialized()
    assert dict(os.environ) == before


def test_user_error_has_only_frames_of_the_user(folder: Path) -> None:
    job = {**FIELDS, "task": "own_loops:bare", "scaling": {"num_workers": 0}}
    with pytest.raises(UserCodeError) as caught:
        Trainer(job, working_dir=folder).fit()
    assert caught.value.exit_code == 1
    lines = [line for line in caught.value.traceback.splitlines() if line.startswith('  File "')]
    assert len(lines) == 1
    assert "own_loops.py" in lines[0]


def test_function_with_the_job_of_a_task_is_rejected() -> None:
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


def test_verify_rejects_a_train_function(tmp_path: Path) -> None:
    request = VerifyRequest.__new__(VerifyRequest)
    object.__setattr__(request, "job", make_job(FIELDS))
    with pytest.raises(SpecError, match="such a loop itself"):
        _check_task(request)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_example_learns_and_resumes(strategy: str, tmp_path: Path) -> None:
    overrides = ["scaling.num_workers=0", "task_args.epochs=4", f"strategy={strategy}"]
    job = load_job(EXAMPLE / "job.yaml", overrides=overrides)
    first = Trainer(job, working_dir=EXAMPLE, storage_dir=tmp_path).fit()
    assert first.metrics["accuracy"] > 0.9
    resumed = Trainer(job, resume=first.path, working_dir=EXAMPLE, storage_dir=tmp_path).fit()
    assert resumed.history == [], "all epochs are done"
    before, after = (load_file(str(result.checkpoint)) for result in (first, resumed))
    assert all((before[name] == after[name]).all() for name in before)
