"""A train function on real actors: the loop's result, a lost worker, an error of the user's."""

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


LEFT = r"rank 0, in step 7: waited for rank 1, whose function returned after step 6"


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


def plain() -> Mapping[str, Tensor]:
    """The same loop in one process."""
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
def test_a_lost_worker_costs_the_epochs_since_the_checkpoint_and_no_bit(
    strategy: Any, tmp_path: Path
) -> None:
    killed = fit(2, tmp_path, strategy=strategy, kill_in=2)
    assert len(killed.failures) == 1
    assert killed.metrics["began_with"] in (1, 2), "not from the first epoch"
    assert [one.step for one in killed.history] == [1, 2, 3, 4]
    assert [one.samples for one in killed.history] == [24] * 4
    found = state_of(killed)
    undisturbed = call_on_ranks(lambda config: train({"batch_size": 12}), 2).trained[0]
    for name, value in plain().items():
        assert torch.equal(found[name], undisturbed[name]), name
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strategy", ["ring", slow({"name": "ps-sync", "num_servers": 2})])
def test_a_script_of_ddp_calls_torch_distributed_as_it_did(strategy: Any, tmp_path: Path) -> None:
    """Rank 1 ends while rank 0 waits for it in `dist.all_reduce`: all begin anew."""
    result = fit(2, tmp_path, "script", strategy=strategy, kill_in=2)
    assert len(result.failures) == 1
    assert [one.step for one in result.history][-4:] == [1, 2, 3, 4]
    assert result.metrics["batches"] == 4
    saved = torch.load(tmp_path / "model.pt")
    for name, value in plain().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-10, atol=1e-10)
        assert torch.equal(saved[name], state_of(result)[name])


def test_an_error_of_one_rank_is_told_not_what_it_does_to_the_others(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError) as caught:
        fit(2, tmp_path, "script", raise_in=2)
    assert (caught.value.rank, caught.value.step) == (1, 3)
    assert "no such column" in caught.value.summary
    lines = [line for line in caught.value.traceback.splitlines() if line.startswith('  File "')]
    assert len(lines) == 1, "none of distplat's own"
    assert "functions_for_tests.py" in lines[0]


@pytest.mark.slow
def test_a_loop_that_ends_earlier_than_others_is_named_by_gloo_too(tmp_path: Path) -> None:
    strategy = {"name": "ring", "backend": "gloo", "timeout_s": 3}
    with pytest.raises(UserCodeError, match=LEFT) as raised:
        fit(2, tmp_path, "parting", strategy=strategy)
    assert "backward((model(inputs) - targets)" in raised.value.frames


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "ps-async"])
def test_who_waits_in_torch_distributed_for_a_rank_that_has_left_is_told(
    strategy: str, tmp_path: Path
) -> None:
    """gloo tells nobody that a rank has destroyed its group, and waits for half an hour."""
    with pytest.raises(UserCodeError, match=LEFT) as raised:
        fit(2, tmp_path, "parting", strategy=strategy, failure={"step_timeout_s": 10}, reduces=True)
    assert "dist.all_reduce(torch.ones(1))" in raised.value.frames


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_stream_goes_on_in_the_middle_of_an_epoch(strategy: str, tmp_path: Path) -> None:
    """Twelve steps of two epochs; a worker is lost in the eleventh, with its loader process."""
    killed = fit(2, tmp_path, "streamed", strategy=strategy, batch_size=4, loaders=1, kill_in=10)
    assert len(killed.failures) == 1
    assert killed.metrics["began_with"] >= 1, "not from the start"
    assert [one.step for one in killed.history] == [*range(1, 13)]
    undisturbed = call_on_ranks(lambda config: streamed({"batch_size": 4}), 2).trained[0]
    found = state_of(killed)
    assert all(torch.equal(found[name], value) for name, value in undisturbed.items())


@pytest.mark.slow
def test_a_lost_worker_of_ps_async_takes_all_back_to_the_last_checkpoint(tmp_path: Path) -> None:
    lost = fit(2, tmp_path, strategy="ps-async", kill_in=2)
    assert len(lost.failures) == 1
    assert "worker-1" in lost.failures[0].cause
    assert lost.history[-1].step == 4
    assert state_of(lost).keys() == plain().keys()


@pytest.mark.slow
def test_a_lost_server_of_ps_async_takes_all_back_to_the_last_checkpoint(tmp_path: Path) -> None:
    class Killer(Callback):
        def on_start(self, job: Any, run: str, path: Path) -> None:
            self.run_name = run

        def on_checkpoint(self, saved: Any) -> None:
            if not (tmp_path / "killed").exists():
                ray.kill(ray.get_actor("loop/server-0", namespace=self.run_name))
                (tmp_path / "killed").touch()

    strategy = {"name": "ps-async", "staleness": 4}
    lost = fit(2, tmp_path, strategy=strategy, callbacks=[Killer()], wait_in=2)
    assert len(lost.failures) == 1
    assert "server-0" in lost.failures[0].cause
    assert [one.step for one in lost.history] == [1, 2, 3, 4]
    assert lost.metrics["began_with"] in (1, 2)
    assert state_of(lost).keys() == plain().keys()
