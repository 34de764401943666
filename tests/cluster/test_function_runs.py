"""Train functions on real actors: results, lost workers and servers, user errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from function_ranks import call_on_ranks
from functions_for_tests import data_of, model_of, streamed, train
from marks import slow
from safetensors.torch import load_file
from small_runs import HERE
from torch import Tensor
from torch.autograd import backward
from torch.utils.data import DataLoader, DistributedSampler

from distplat import Callback, Result, Trainer
from distplat.platform.errors import UserCodeError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


EARLY_RETURN = r"rank 0, in step 7: waited for rank 1, whose function returned after step 6"


def fit(
    workers: int,
    folder: Path,
    function: str = "train",
    *,
    strategy: Any = "ring",
    callbacks: Sequence[Callback] = (),
    failure: Mapping[str, float] | None = None,
    **config: Any,
) -> Result:
    job = {
        "name": "loop",
        "task": f"functions_for_tests:{function}",
        "task_args": {"batch_size": 12, "folder": str(folder), **config},
        "strategy": strategy,
        "scaling": {"num_workers": workers, "resources_per_worker": {"CPU": 0.5}},
        "storage_path": str(folder),
        "failure": failure or {},
    }
    return Trainer(job, working_dir=HERE, callbacks=callbacks).fit()


def state_of(result: Result) -> Mapping[str, Tensor]:
    assert result.checkpoint is not None
    return load_file(result.checkpoint)


def train_plain() -> Mapping[str, Tensor]:
    """Train in a plain torch loop in one process; return the model."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    sampler: DistributedSampler[Any] = DistributedSampler(data_of(), 1, 0, seed=0)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        for inputs, targets in DataLoader(data_of(), 12, sampler=sampler):
            backward((model(inputs) - targets).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", {"name": "ps-sync", "num_servers": 2}])
def test_lost_worker_resumes_from_checkpoint(strategy: Any, tmp_path: Path) -> None:
    killed = fit(2, tmp_path, strategy=strategy, kill_in=2)
    assert len(killed.failures) == 1
    assert killed.metrics["began_with"] in (1, 2), "resumed from a checkpoint"
    assert [s.step for s in killed.history] == [1, 2, 3, 4]
    assert [s.samples for s in killed.history] == [24] * 4
    found = state_of(killed)
    unfailed = call_on_ranks(lambda config: train({"batch_size": 12}), 2).trained[0]
    for name, value in train_plain().items():
        assert torch.equal(found[name], unfailed[name]), name
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strategy", ["ring", slow({"name": "ps-sync", "num_servers": 2})])
def test_ddp_script_restarts_after_a_lost_rank(strategy: Any, tmp_path: Path) -> None:
    """Rank 1 dies while rank 0 waits in `dist.all_reduce`: all ranks restart."""
    result = fit(2, tmp_path, "script", strategy=strategy, kill_in=2)
    assert len(result.failures) == 1
    assert [s.step for s in result.history][-4:] == [1, 2, 3, 4]
    assert result.metrics["batches"] == 4
    saved = torch.load(tmp_path / "model.pt")
    for name, value in train_plain().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-10, atol=1e-10)
        assert torch.equal(saved[name], state_of(result)[name])


@pytest.mark.slow
def test_reports_the_root_cause_of_failed_ranks(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError) as caught:
        fit(2, tmp_path, "script", raise_in=2)
    assert (caught.value.rank, caught.value.step) == (1, 3)
    assert "no such column" in caught.value.summary
    lines = [line for line in caught.value.traceback.splitlines() if line.startswith('  File "')]
    assert len(lines) == 1, "no frame of distplat"
    assert "functions_for_tests.py" in lines[0]


@pytest.mark.slow
def test_early_return_is_reported_with_gloo(tmp_path: Path) -> None:
    strategy = {"name": "ring", "backend": "gloo", "timeout_s": 3}
    with pytest.raises(UserCodeError, match=EARLY_RETURN) as caught:
        fit(2, tmp_path, "parting", strategy=strategy)
    assert "backward((model(inputs) - targets)" in caught.value.frames


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "ps-async"])
def test_early_return_is_reported_to_ranks_in_torch_distributed(
    strategy: str, tmp_path: Path
) -> None:
    """gloo does not detect that a rank has destroyed its group, and waits for half an hour."""
    with pytest.raises(UserCodeError, match=EARLY_RETURN) as caught:
        fit(2, tmp_path, "parting", strategy=strategy, failure={"step_timeout_s": 10}, reduces=True)
    assert "dist.all_reduce(torch.ones(1))" in caught.value.frames


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_stream_resumes_within_an_epoch(strategy: str, tmp_path: Path) -> None:
    """Two epochs of six steps; a worker is lost in the eleventh step, with its loader process."""
    killed = fit(2, tmp_path, "streamed", strategy=strategy, batch_size=4, loaders=1, kill_in=10)
    assert len(killed.failures) == 1
    assert killed.metrics["began_with"] >= 1, "resumed from a checkpoint"
    assert [s.step for s in killed.history] == [*range(1, 13)]
    unfailed = call_on_ranks(lambda config: streamed({"batch_size": 4}), 2).trained[0]
    found = state_of(killed)
    assert all(torch.equal(found[name], value) for name, value in unfailed.items())


@pytest.mark.slow
def test_ps_async_rolls_back_after_a_lost_worker(tmp_path: Path) -> None:
    result = fit(2, tmp_path, strategy="ps-async", kill_in=2)
    assert len(result.failures) == 1
    assert "worker-1" in result.failures[0].cause
    assert result.history[-1].step == 4
    assert state_of(result).keys() == train_plain().keys()


@pytest.mark.slow
def test_ps_async_rolls_back_after_a_lost_server(tmp_path: Path) -> None:
    class Killer(Callback):
        def on_start(self, job: Any, run: str, path: Path) -> None:
            self.run_name = run

        def on_checkpoint(self, saved: Any) -> None:
            if not (tmp_path / "killed").exists():
                ray.kill(ray.get_actor("loop/server-0", namespace=self.run_name))
                (tmp_path / "killed").touch()

    strategy = {"name": "ps-async", "staleness": 4}
    result = fit(2, tmp_path, strategy=strategy, callbacks=[Killer()], wait_in=2)
    assert len(result.failures) == 1
    assert "server-0" in result.failures[0].cause
    assert [s.step for s in result.history] == [1, 2, 3, 4]
    assert result.metrics["began_with"] in (1, 2)
    assert state_of(result).keys() == train_plain().keys()
