"""What a train function is advised to do is something that it, and its job, can do."""

import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks, function_job
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distplat
from distplat import Trainer
from distplat.actors import user_errors
from distplat.actors.user_errors import as_user_error, error_of_process, killed_loader
from distplat.platform.errors import NonFiniteError, UserCodeError
from distplat.platform.own_loop import OF_TASKS
from distplat.strategies import torch_compat

KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "
FULL = "unable to write to file </torch_16_1_0>: No space left on device (28)"
NAMED = re.compile(r"`([a-z_]+)[.:`]")
"""What may be a field of a job in a hint: `data.drop_last: true`, `precision: bf16`."""


def fields_in(text: str) -> set[str]:
    """Give the fields of a task's loop that a text names: the job of a train function has none."""
    return {*NAMED.findall(text)} & {*OF_TASKS}


PARTS = [part for part, _ in user_errors._REMEDIES]


@pytest.mark.parametrize("text", [*PARTS, FULL, "DataLoader worker (pid(s) 7) exited unexpectedly"])
def test_no_hint_names_a_field_that_its_job_refuses(text: str) -> None:
    of_function = as_user_error(RuntimeError(text), 0, 1, own_loop=True).remedy
    of_task = as_user_error(RuntimeError(text), 0, 1).remedy
    assert of_function and of_task
    assert fields_in(of_function) == set(), of_function
    if fields_in(of_task) or "collate(samples)" in of_task:
        assert of_function != of_task


def test_a_task_is_told_of_its_fields() -> None:
    told = {text: as_user_error(RuntimeError(text), 0, 1).remedy for text in [*PARTS, FULL]}
    named = [text for text, remedy in told.items() if fields_in(remedy)]
    assert {"out of memory", "Expected more than 1 value per channel", FULL} <= {*named}


def test_a_killed_loader_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compat, "loader_exit_codes", lambda error: [-signal.SIGKILL])
    assert "`data.num_workers`" in str(killed_loader(RuntimeError(KILLED)))
    of_function = str(killed_loader(RuntimeError(KILLED), own_loop=True))
    assert "`num_workers` of the DataLoader" in of_function and fields_in(of_function) == set()


def large(config: Mapping[str, Any]) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def normed(config: Mapping[str, Any]) -> None:
    nn.BatchNorm1d(3)(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("train", "words"),
    [(large, "a smaller `batch_size` of the DataLoader"), (normed, "`DataLoader(drop_last=True)`")],
)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_a_run_tells_it(train: Any, words: str, strategy: str, tmp_path: Path) -> None:
    job = {"name": "own", "strategy": strategy, "scaling": {"num_workers": 0}}
    with pytest.raises(UserCodeError, match=re.escape(words)) as caught:
        Trainer({**job, "storage_path": str(tmp_path)}, train).fit()
    assert fields_in(str(caught.value)) == set()


def diverging(config: Mapping[str, Any]) -> None:
    data = TensorDataset(torch.ones(4, 2), torch.ones(4, 1))
    model: Any = nn.Linear(2, 1)
    model, optimizer, loader = distplat.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=2)
    )
    for inputs, targets in loader:
        loss = nn.functional.mse_loss(model(inputs), targets) * float("nan")
        torch.autograd.backward(loss)
        optimizer.step()


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_gradient_that_is_not_finite(strategy: str) -> None:
    with pytest.raises(NonFiniteError) as caught:
        call_on_ranks(diverging, job=function_job(1, strategy=strategy))
    told = str(caught.value)
    assert "call `torch.nn.utils.clip_grad_norm_` before the step" in told
    assert "clip_norm`" not in told.replace("clip_grad_norm_", "") and "skip" not in told


def test_long_output_of_a_failed_process_is_truncated() -> None:
    error = error_of_process(
        "Traceback\n" + "  frame\n" * 100_000 + "ValueError: " + "x" * 1_000_000
    )
    assert error.summary.startswith("ValueError: x") and len(error.summary) < 3_000
    assert error.frames.startswith("Traceback") and len(error.frames) < 60_000
    assert error_of_process("").summary == "its process ended"
