"""Lost and resized ranks with embedding tables: every gradient is applied exactly once."""

import os
from typing import Any

import numpy as np
import pytest
from counting import BATCH, SAMPLES, Counting, counting_fields
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import job_of
from lost_ranks import LossyRun, RankLoss, Resize, train_with_lost_ranks
from rank_threads import UNSHRUNK
from words import ROWS, Words

from distplat.platform.spec import Job
from distplat.strategies.catalog import make_job

RUNS = int(os.environ.get("DISTPLAT_DRAWN_RUNS", "4"))
"""Number of generated runs; `make test-all` sets many more."""
STEPS = 15
EPOCHS = 2


def words_job(strategy: dict[str, Any], world: int = 3) -> Job:
    return job_of(
        strategy,
        world,
        optimizer={"name": "AdamW", "lr": 0.05},
        lr_schedule={"name": "cosine"},
        embeddings={"servers": 2, "optimizer": {"name": "Adagrad", "lr": 0.5}},
        global_batch_size=9,
        epochs=3,
        evaluation={"every_epochs": 0},
    )


def counting_job(strategy: dict[str, Any], world: int = 2) -> Job:
    """Return a job in which each gradient of a sample changes its row by -1."""
    optimizer = {"name": "SGD", "lr": float(BATCH)}
    return make_job(counting_fields(world, strategy=strategy, optimizer=optimizer, epochs=EPOCHS))


def assert_same_bits(run: LossyRun, other: LossyRun) -> None:
    assert run.dense().tobytes() == other.dense().tobytes()
    for number in range(2):
        assert run.rows(number, ROWS).tobytes() == other.rows(number, ROWS).tobytes()


PS_SYNC = {servers: {"name": "ps-sync", "num_servers": servers} for servers in (1, 2)}


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, LossyRun]:
    return {
        n: train_with_lost_ranks(words_job(strategy), Words, []) for n, strategy in PS_SYNC.items()
    }


losses = st.builds(
    RankLoss,
    step=st.integers(0, STEPS - 1),
    rank=st.integers(0, 2),
    tables=st.integers(0, 2),
    shards=st.integers(0, 2),
    others_s=st.sampled_from([0.0, 0.02]),
)


@pytest.mark.timeout(120 + 2 * RUNS)
@settings(max_examples=RUNS, deadline=None, phases=UNSHRUNK)
@given(
    servers=st.sampled_from([1, 2]),
    events=st.lists(losses, min_size=1, max_size=3, unique_by=lambda loss: loss.step),
)
def test_recovered_synchronous_runs_are_bit_identical(
    undisturbed: dict[int, LossyRun], servers: int, events: list[RankLoss]
) -> None:
    events = sorted(events, key=lambda event: event.step)
    events = [
        RankLoss(e.step, e.rank, e.tables, min(e.shards, servers), e.others_s) for e in events
    ]
    run = train_with_lost_ranks(words_job(PS_SYNC[servers]), Words, events)
    assert_same_bits(run, undisturbed[servers])


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("servers", "loss", "resumed_step"),
    [
        (1, RankLoss(5, 1, tables=2, shards=0), 5),  # both table servers have applied the step
        (1, RankLoss(5, 1, tables=1, shards=0), 5),  # one table server
        (1, RankLoss(5, 1, tables=0, shards=1), 5),  # the shard only
        (1, RankLoss(5, 1, tables=1, shards=1), 5),
        (1, RankLoss(5, 1, tables=2, shards=1), 6),  # all servers
        (2, RankLoss(5, 0, tables=0, shards=2), 5),
        (2, RankLoss(5, 0, tables=2, shards=1), 5),
        (2, RankLoss(5, 0, tables=1, shards=1), 5),
    ],
    ids=str,
)
def test_recovery_resumes_with_the_step_that_a_server_lacks(
    undisturbed: dict[int, LossyRun], servers: int, loss: RankLoss, resumed_step: int
) -> None:
    run = train_with_lost_ranks(words_job(PS_SYNC[servers]), Words, [loss])
    assert run.starts == [0, resumed_step]
    assert_same_bits(run, undisturbed[servers])


def test_resizes_keep_the_result() -> None:
    alone = train_with_lost_ranks(words_job(PS_SYNC[2], world=1), Words, [])
    events: list[RankLoss | Resize] = [
        Resize(4, 3),
        RankLoss(6, 2, tables=1, shards=2),
        Resize(9, 5),
        Resize(11, 1),
    ]
    run = train_with_lost_ranks(words_job(PS_SYNC[2], world=2), Words, events)
    assert run.starts == [0, 4, 6, 9, 11]
    np.testing.assert_allclose(run.dense(), alone.dense(), rtol=1e-4, atol=1e-5)
    for number in range(2):
        rows, expected = run.rows(number, ROWS), alone.rows(number, ROWS)
        assert np.array_equal(np.isnan(rows), np.isnan(expected))
        np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.sweep(6)
@pytest.mark.parametrize("tables", [0, 1, 2])
@pytest.mark.parametrize(
    ("strategy", "shards"),
    [
        ({"name": "ring"}, -1),
        (PS_SYNC[1], 0),
        (PS_SYNC[1], 1),
        (PS_SYNC[2], 0),
        (PS_SYNC[2], 1),
        (PS_SYNC[2], 2),
    ],
    ids=str,
)
def test_asynchronous_tables_apply_each_gradient_once(
    strategy: dict[str, Any], shards: int, tables: int
) -> None:
    events = [RankLoss(2, 1, tables, shards), RankLoss(5, 0, tables, shards)]
    run = train_with_lost_ranks(counting_job(strategy), Counting, events)
    assert_each_gradient_counted_once(run)


def test_asynchronous_tables_apply_each_gradient_once_across_resizes() -> None:
    events: list[RankLoss | Resize] = [
        Resize(1, 4),
        RankLoss(2, 1, tables=1, shards=0),
        Resize(3, 1),
        Resize(6, 2),
    ]
    run = train_with_lost_ranks(counting_job(PS_SYNC[2]), Counting, events)
    assert run.starts == [0, 1, 2, 3, 6]
    assert_each_gradient_counted_once(run)


def assert_each_gradient_counted_once(run: LossyRun) -> None:
    assert (run.rows(0, SAMPLES) == -EPOCHS).all()
    assert (run.dense()[:SAMPLES] == -EPOCHS).all()
