"""Hints for train functions name only remedies that a train function and its job have."""

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
"""Matches fields of a job in a hint: `data.drop_last: true`, `precision: bf16`."""


def fields_in(text: str) -> set[str]:
    """Return the fields of tasks in a text; the job of a train function has none of them."""
    return {*NAMED.findall(text)} & {*OF_TASKS}


PARTS = [part for part, _ in user_errors._REMEDIES]


@pytest.mark.parametrize("text", [*PARTS, FULL, "DataLoader worker (pid(s) 7) exited unexpectedly"])
def test_hint_names_no_field_that_the_job_rejects(text: str) -> None:
    of_function = as_user_error(RuntimeError(text), 0, 1, own_loop=True).remedy
    of_task = as_user_error(RuntimeError(text), 0, 1).remedy
    assert of_function and of_task
    assert fields_in(of_function) == set(), of_function
    if fields_in(of_task) or "collate(samples)" in of_task:
        assert of_function != of_task


def test_hint_for_a_task_names_its_fields() -> None:
    remedies = {text: as_user_error(RuntimeError(text), 0, 1).remedy for text in [*PARTS, FULL]}
    named = [text for text, remedy in remedies.items() if fields_in(remedy)]
    assert {"out of memory", "Expected more than 1 value per channel", FULL} <= {*named}


def test_hint_for_a_killed_loader_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compat, "loader_exit_codes", lambda error: [-signal.SIGKILL])
    assert "`data.num_workers`" in str(killed_loader(RuntimeError(KILLED)))
    of_function = str(killed_loader(RuntimeError(KILLED), own_loop=True))
    assert "`num_workers` of the DataLoader" in of_function and fields_in(of_function) == set()


def out_of_memory(config: Mapping[str, Any]) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def batch_norm(config: Mapping[str, Any]) -> None:
    nn.BatchNorm1d(3)(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (out_of_memory, "a smaller `batch_size` of the DataLoader"),
        (batch_norm, "`DataLoader(drop_last=True)`"),
    ],
)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_run_reports_the_hint(train: Any, words: str, strategy: str, tmp_path: Path) -> None:
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
def test_hint_for_a_non_finite_gradient(strategy: str) -> None:
    with pytest.raises(NonFiniteError) as caught:
        call_on_ranks(diverging, job=function_job(1, strategy=strategy))
    message = str(caught.value)
    assert "call `torch.nn.utils.clip_grad_norm_` before the step" in message
    assert "clip_norm`" not in message.replace("clip_grad_norm_", "") and "skip" not in message


def test_long_output_of_a_failed_process_is_truncated() -> None:
    error = error_of_process(
        "Traceback\n" + "  frame\n" * 100_000 + "ValueError: " + "x" * 1_000_000
    )
    assert error.summary.startswith("ValueError: x") and len(error.summary) < 3_000
    assert error.frames.startswith("Traceback") and len(error.frames) < 60_000
    assert error_of_process("").summary == "its process ended"
