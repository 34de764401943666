"""
Synchronous strategies with any number of workers match training in one process.

The reference is plain torch: one model, torch's optimizer and clipping, whole batches. It shares
only the order of samples and the schedule with distplat. The last batch has one sample, so that
some ranks of larger worlds have no samples.
"""

import pytest
import torch
from classifiers import EPOCHS, RECIPES, SAMPLES, STEPS, Conv, Dropout, Mlp, recipe_job, train_plain
from comparison import distance, same_bits
from local_run import LocalRun, train
from torch.utils.data import TensorDataset

from distplat.platform.progress import StepReport
from distplat.strategies.algorithms.seeds import step_seed
from distplat.strategies.loop.prepared import Prepared

WORLDS = [
    ("ring", 1, 0),
    ("ring", 2, 0),
    ("ring", 3, 0),
    ("ps-sync", 1, 1),
    ("ps-sync", 2, 1),
    ("ps-sync", 3, 1),
    ("ps-sync", 1, 3),
    ("ps-sync", 2, 3),
    ("ps-sync", 3, 3),
]


def losses_of(run: LocalRun) -> list[float]:
    """Return the mean loss over the global batch of each step, from the reports of all ranks."""
    sums = [0.0] * STEPS
    counts = [0] * STEPS
    for report in (report for reports in run.reports for report in reports):
        assert isinstance(report, StepReport)
        sums[report.step] += report.loss * report.samples
        counts[report.step] += report.samples
    assert counts == [9, 9, 9, 9, 1] * EPOCHS
    return [total / count for total, count in zip(sums, counts, strict=True)]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("strategy", "workers", "servers"), WORLDS)
def test_matches_one_process(recipe: str, strategy: str, workers: int, servers: int) -> None:
    run = train(recipe_job(recipe, strategy, workers, servers), RECIPES[recipe][0])
    expected, losses = train_plain(recipe)
    for rank in range(workers):
        assert distance(run.parameters(rank), expected) < 1e-5
    assert losses_of(run) == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_reference_learns_and_depends_on_its_options(recipe: str) -> None:
    """Otherwise the test above would compare untrained models."""
    task_type, _, _, clip_norm = RECIPES[recipe]
    expected, losses = train_plain(recipe)
    assert losses[-2] < losses[3]
    torch.manual_seed(5)
    initial = {name: value.detach() for name, value in task_type().model().state_dict().items()}
    assert distance(initial, expected) > 0.01
    if clip_norm is not None:
        job = recipe_job(recipe, "ring", 1, 0).model_copy(update={"clip_norm": None})
        assert distance(train(job, task_type).parameters(), expected) > 1e-4


@pytest.mark.parametrize("recipe", ["mlp-sgd", "mlp-adam-accumulated", "conv-adam"])
def test_shard_boundaries_do_not_change_the_bits(recipe: str) -> None:
    job, task_type = recipe_job(recipe, "ps-sync", 2, 3), RECIPES[recipe][0]
    even, uneven = (train(job, task_type, speeds=speeds) for speeds in ((), (1.0, 7.0, 2.0)))
    cuts = [run.servers.cuts() for run in (even, uneven)]
    assert cuts[0] != cuts[1]
    assert same_bits(even, uneven)


def test_shard_boundaries_change_a_norm_by_rounding_only() -> None:
    recipe = "conv-adamw-accumulated-clipped"
    job = recipe_job(recipe, "ps-sync", 2, 3)
    uneven = train(job, Conv, speeds=(1.0, 7.0, 2.0)).parameters()
    assert distance(uneven, train_plain(recipe)[0]) < 1e-5


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("strategy", "workers", "servers"), WORLDS)
def test_repeated_run_is_bit_identical(strategy: str, workers: int, servers: int) -> None:
    recipe = "conv-adamw-accumulated-clipped"
    job = recipe_job(recipe, strategy, workers, servers)
    runs = [train(job, Conv) for _ in range(2)]
    assert same_bits(*runs)
    first, *others = [runs[0].parameters(rank) for rank in range(workers)]
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize(("strategy", "servers"), [("ring", 0), ("ps-sync", 1)])
def test_repeated_run_with_dropout_is_bit_identical(strategy: str, servers: int) -> None:
    """One rank only, because ranks are threads here and would share torch's generator."""
    job = recipe_job("mlp-sgd", strategy, 1, servers)

    def draw(rank: int, prepared: Prepared) -> None:
        torch.rand(17)

    first = train(job, Dropout)
    assert same_bits(first, train(job, Dropout, before=draw))  # each step sets the seed
    assert not same_bits(first, train(job.model_copy(update={"seed": 6}), Dropout))


def test_dropout_differs_between_steps() -> None:
    job = recipe_job("mlp-sgd", "ring", 1, 0)
    frozen = job.model_copy(update={"optimizer": job.optimizer.model_copy(update={"lr": 1e-30})})
    in_order = frozen.data.model_copy(update={"shuffle": False})
    same_batch = {"global_batch_size": SAMPLES, "steps": 3, "epochs": None, "data": in_order}
    run = train(frozen.model_copy(update=same_batch), Dropout)
    losses = {report.loss for report in run.reports[0] if isinstance(report, StepReport)}
    assert len(losses) == 3


def test_dropout_differs_between_ranks() -> None:
    """Compares seeds instead of masks, because threads share a generator here."""
    assert len({step_seed(5, step, rank) for step in range(20) for rank in range(8)}) == 160


def test_ring_broadcasts_the_parameters_of_rank_0() -> None:
    """Initial parameters may differ by rank if the model does not use torch's generator."""

    def shift(rank: int, prepared: Prepared) -> None:
        prepared.flat.params.add_(float(rank))

    run = train(recipe_job("mlp-sgd", "ring", 3, 0), Mlp, before=shift)
    for rank in range(3):
        assert distance(run.parameters(rank), train_plain("mlp-sgd")[0]) < 1e-5


@pytest.mark.parametrize(("strategy", "servers"), [("ring", 0), ("ps-sync", 1)])
def test_rank_without_samples_reports_progress(strategy: str, servers: int) -> None:
    """The controller treats a rank without new heartbeats as stalled."""
    job = recipe_job("mlp-sgd", strategy, 3, servers)

    class Tiny(Mlp):
        def train_data(self) -> TensorDataset:
            return TensorDataset(torch.ones(2, 5), torch.tensor([0, 1]))

    run = train(job, Tiny)
    assert [rank.progress.step for rank in run.ranks] == [EPOCHS] * 3
    assert all(rank.progress.beats >= EPOCHS for rank in run.ranks)
    assert [r.samples for r in run.reports[2] if isinstance(r, StepReport)] == [0] * EPOCHS
