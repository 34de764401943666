"""A task trains to the same model under every strategy, on real actors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local_run import train as train_in_memory
from safetensors.numpy import load_file
from small_runs import HERE, distance, job, train, weights
from tasks_for_tests import Big, Blobs, Tuned

from distplat import Callback, Result
from distplat.platform.checkpoints import Catalogue, flaws
from distplat.platform.errors import SpecError
from distplat.platform.progress import Saved
from distplat.strategies.catalog import make_job, strategies

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]

ADAMW_CLIPPED: dict[str, Any] = {
    "optimizer": {"name": "AdamW", "lr": 0.01},
    "gradient_accumulation": 2,
    "clip_norm": 0.5,
    "lr_schedule": {"name": "cosine", "warmup_steps": 3},
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray[Any, Any]:
    """Train one rank in this process, without Ray; return the model."""
    return weights(train(job("ring", 0, **ADAMW_CLIPPED), tmp_path_factory.mktemp("alone")))


def train_and_compare(strategy: object, one_process: np.ndarray[Any, Any], folder: Path) -> Result:
    result = train(job(strategy, 3, **ADAMW_CLIPPED), folder)
    assert distance(weights(result), one_process) < 1e-5
    assert [s.step for s in result.history] == list(range(1, 16))
    assert [e.step for e in result.evaluations] == [5, 10, 15]
    assert sum(s.samples for s in result.history) == 3 * 37
    assert all(e.samples == 37 for e in result.evaluations)
    return result


@pytest.mark.slow
def test_ring_matches_one_process(one_process: np.ndarray[Any, Any], tmp_path: Path) -> None:
    train_and_compare("ring", one_process, tmp_path)


@pytest.mark.slow
def test_servers_match_one_process_and_repeat(
    one_process: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    strategy = {"name": "ps-sync", "num_servers": 2}
    first, second = (train_and_compare(strategy, one_process, tmp_path) for _ in range(2))
    assert weights(first).tobytes() == weights(second).tobytes()


def test_initial_weights_fp16_and_stateful_metric(tmp_path: Path) -> None:
    """A frozen layer from a file, `trained_only` checkpoints, and metrics over the worker group."""
    base = train_in_memory(make_job(job("ring", 1, steps=2, epochs=None)), Blobs).parameters()
    torch.save(base, tmp_path / "base.pt")
    fields: dict[str, Any] = {
        "task": "tasks_for_tests:Tuned",
        "initial_weights": str(tmp_path / "base.pt"),
        "checkpoint": {"every_steps": 6, "trained_only": True},
        "precision": "fp16",
        "epochs": None,
    }
    result = train(job("ring", 2, steps=6, **fields), tmp_path)
    in_memory = train_in_memory(make_job(job("ps-sync", 2, steps=12, **fields)), Tuned)
    expected = in_memory.parameters()
    again = train(job("ps-sync", 2, steps=12, **fields), tmp_path, resume=result.path)
    assert again.checkpoint is not None
    found = load_file(again.checkpoint)
    assert {*found} == {"2.weight", "2.bias"}
    assert all(found[name].tobytes() == expected[name].numpy().tobytes() for name in found)
    model = in_memory.ranks[0].prepared.flat.model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        data: Any = Tuned().train_data()
        inputs = torch.stack([sample[0] for sample in data])
        spread = float(model(inputs).float().std())
    assert again.evaluations[-1].metrics["spread"] == pytest.approx(spread, rel=1e-2)
    assert torch.equal(expected["0.weight"], base["0.weight"])


@pytest.mark.slow
def test_model_does_not_depend_on_shard_sizes(tmp_path: Path) -> None:
    """Split by server speed here, evenly in memory; both split a tensor."""
    strategy = {"name": "ps-sync", "num_servers": 2, "split": "load"}
    spec = job(strategy, 3, task="tasks_for_tests:Big", steps=6, epochs=None)
    result = train(spec, tmp_path)
    parameters = train_in_memory(make_job(spec), Big).parameters()
    expected = np.concatenate([parameters[name].numpy().ravel() for name in sorted(parameters)])
    assert weights(result).tobytes() == expected.tobytes()


def test_loader_processes_do_not_change_the_model(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"steps": 6, "epochs": None}
    without_loaders = weights(train(job("ring", 0, **fields), tmp_path))
    with_loaders = weights(train(job("ring", 1, data={"num_workers": 2}, **fields), tmp_path))
    assert without_loaders.tobytes() == with_loaders.tobytes()


@pytest.mark.slow
def test_random_draws_do_not_depend_on_workers_and_loaders(tmp_path: Path) -> None:
    spec = job("ring", 2, task="tasks_for_tests:Chance")
    one_process = {**job("ring", 1, task="tasks_for_tests:Chance"), "data": {"num_workers": 2}}
    assert distance(weights(train(spec, tmp_path)), weights(train(one_process, tmp_path))) < 1e-5


def test_strategy_file_reaches_the_workers(tmp_path: Path) -> None:
    file = HERE.parents[1] / "examples" / "own_strategy.py"
    spec = job({"name": "local-sgd", "period": 2}, 2, optimizer={"name": "SGD", "lr": 0.1})
    try:
        result = train(spec, tmp_path, strategy_file=file)
    finally:
        strategies._items.pop("local-sgd", None)
    assert len(result.history) == 15
    assert result.history[-1].loss < result.history[0].loss


def test_refuses_more_resources_than_the_cluster_has(tmp_path: Path) -> None:
    spec = job("ring", 2, scaling={"num_workers": 2, "resources_per_worker": {"CPU": 64}})
    with pytest.raises(SpecError, match="needs 128 CPU; the cluster has 8 CPU"):
        train(spec, tmp_path)


class StopAfterThree(Callback):
    """Stops the run once three checkpoints are on the disk."""

    saved = 0

    def on_checkpoint(self, checkpoint: Saved) -> None:
        self.saved += 1

    def should_stop(self) -> bool | str:
        return "three checkpoints" if self.saved >= 3 else False


@pytest.mark.slow  # in memory: test_stop_early.py
@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_run_stopped_by_callback_matches_a_shorter_run(strategy: str, tmp_path: Path) -> None:
    """The run has 100,000 steps. The best checkpoint is kept."""
    best = {"metric": "accuracy", "mode": "max"}
    fields = {
        "epochs": None,
        "checkpoint": {"every_steps": 2, "num_to_keep": 1, "keep_best": best},
        "evaluation": {"every_steps": 2},
        "task": "tasks_for_tests:Paced",
        "task_args": {"until": str(tmp_path / "never")},
    }
    result = train(
        job(strategy, 2, steps=100_000, **fields), tmp_path, callbacks=[StopAfterThree()]
    )
    steps = result.totals.steps
    assert result.stopped == "three checkpoints"
    assert [s.step for s in result.history] == list(range(1, steps + 1))
    assert max(e.step for e in result.evaluations) == steps
    accuracy = {e.step: e.metrics["accuracy"] for e in result.evaluations}
    catalogue = Catalogue(result.path / "checkpoints")
    best_step = max((c.step for c in result.checkpoints), key=lambda n: (accuracy[n], -n))
    assert result.best_checkpoint == catalogue.path(best_step) and not flaws(
        catalogue.path(best_step)
    )
    assert catalogue.steps() == sorted({best_step, result.checkpoints[-1].step})
    if strategy != "ps-async":
        spec = make_job({**job(strategy, 2, steps=steps, epochs=None)})
        parameters = train_in_memory(spec, Blobs).parameters()
        expected = np.concatenate([parameters[name].numpy().ravel() for name in sorted(parameters)])
        assert weights(result).tobytes() == expected.tobytes()
