"""The graph example: results do not depend on the batching of graphs or on the workers."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jobs import job_of
from local_run import evaluations, train

from distplat.platform.spec import Job
from distplat.strategies.task_methods import uncalled_hooks

FOLDER = Path(__file__).parents[2] / "examples" / "graph"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("field")


def test_batched_graphs_match_single_graphs(example: Any) -> None:
    task = example.Fields(width=4, rounds=2)
    model, data = task.model(), task.train_data()
    batch, targets = task.collate([data[number] for number in range(3)])
    sizes = [len(data[number][1]) for number in range(3)]
    assert len(set(sizes)) > 1 and batch.graph.bincount().tolist() == sizes
    alone = torch.cat([model(data[number][0]) for number in range(3)])
    torch.testing.assert_close(model(batch), alone)
    assert len(targets) == sum(sizes)


def test_best_prediction_has_less_than_half_the_loss_of_zeros(example: Any) -> None:
    places, graph, targets = example.drawn(7, best=True)
    assert all(map(torch.equal, graph, example.drawn(7)[1])), "the data set is deterministic"
    task = example.Fields()
    best, zeros = (task.loss(out, targets)[0] for out in (targets[:, 2], targets[:, 2] * 0))
    assert best < 0.5 * zeros
    nearest = (places[graph.edges[0]] - places[graph.edges[1]]).norm(dim=1)
    torch.testing.assert_close(nearest.float(), graph.offsets[:, 2] * example.RANGE)


@pytest.mark.parametrize("strategy", ["ps-sync", {"name": "hybrid", "pipeline": 1, "data": 2}])
def test_two_workers_match_one(example: Any, strategy: Any) -> None:
    """The loss is a mean over hidden nodes, whose number differs between workers."""

    class Small(example.Fields):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(graphs=12, width=4, rounds=1)

        def eval_data(self) -> Any:
            return example.Drawn(range(5), best=True)

    fields: dict[str, Any] = {"steps": 3, "global_batch_size": 6}
    alone, ring, other = (
        train(job_of(name, workers, **fields), Small)
        for name, workers in (("ring", 1), ("ring", 2), (strategy, 2))
    )
    *_, expected = evaluations(alone)
    for run in (ring, other):
        for name, value in alone.trained[0].items():
            torch.testing.assert_close(run.trained[0][name], value, rtol=1e-5, atol=1e-6)
        assert evaluations(run)[-1].metrics == pytest.approx(expected.metrics, rel=1e-5)


def test_job_file_is_valid(example: Any) -> None:
    job = Job.model_validate(yaml.safe_load((FOLDER / "job.yaml").read_text()))
    assert job.problems() == []
    assert job.task == "field:Fields" and uncalled_hooks(example.Fields) == []
