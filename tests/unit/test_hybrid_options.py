"""Validation of `hybrid` options: each error names the field, its value and a remedy."""

from typing import Any

import pytest
from hybrid_models import hybrid_fields, hybrid_job

from distplat.platform.errors import SpecError
from distplat.platform.shard_map import Division
from distplat.platform.spec import Job
from distplat.strategies.catalog import complete, make_job, make_strategy, strategy_problems
from distplat.strategies.pipeline.hybrid_options import HybridOptions

INVALID: list[tuple[dict[str, Any], int, dict[str, Any], str, str, str]] = [
    (
        {"pipeline": 2, "data": 2},
        3,
        {},
        "strategy.pipeline",
        "pipeline 2 x tensor 1 x data 2 are 4 workers, scaling.num_workers is 3",
        "scaling.num_workers: 4",
    ),
    (
        {"pipeline": 2},
        2,
        {"gradient_accumulation": 2},
        "gradient_accumulation",
        "splits batches into `micro_batches` (got 2)",
        "set only one of the two",
    ),
    (
        {"pipeline": 2, "micro_batches": 17},
        2,
        {},
        "strategy.micro_batches",
        "16 samples cannot be cut into 1 replicas x 17 micro-batches",
        "at most 16",
    ),
    (
        {"pipeline": 2, "schedule": "interleaved", "micro_batches": 5},
        2,
        {},
        "strategy.micro_batches",
        "multiple of its 2 stages (got 5)",
        "use 4 or 6",
    ),
    ({"pipeline": 2, "cut": "evn"}, 2, {}, "strategy.cut", "(got 'evn')", "did you mean 'even'?"),
    (
        {"pipeline": 3, "cut": ["2"]},
        3,
        {},
        "strategy.cut",
        "3 pieces need the names of 2 first layers (got 1 names)",
        "name one for each piece but the first",
    ),
    ({"pack_weights": True}, 1, {}, "strategy.pack_weights", "unknown field", "was removed"),
    ({"pipeline": 3, "cut": ["2", "2"]}, 3, {}, "strategy.cut", "named twice", "once"),
    (
        {"pipeline": 2, "cut": 2},
        2,
        {},
        "strategy.cut",
        "must be text or a list (got 2)",
        "quote it",
    ),
    ({"pipeline": 3, "cut": ["2", 3]}, 3, {}, "strategy.cut.1", "must be text (got 3)", "quote it"),
    (
        {"pipeline": 2, "schedule": "interleaved", "virtual": 1},
        2,
        {},
        "strategy.virtual",
        "2 or more pieces per stage (got 1)",
        "1f1b",
    ),
    ({"pipeline": 2, "virtual": 2}, 2, {}, "strategy.virtual", "only with `schedule:", "remove"),
    ({"data": 2, "schedule": "gpipe"}, 2, {}, "strategy.schedule", "`pipeline` > 1", "remove"),
    ({"data": 2, "cut": "even"}, 2, {}, "strategy.cut", "only with `pipeline` > 1", "remove"),
    (
        {"pipeline": 2, "cut": "even", "memory_limit_mb": 5},
        2,
        {},
        "strategy.memory_limit_mb",
        "only with `cut: auto`",
        "remove",
    ),
    ({"pipeline": 2, "bucket_mb": 5}, 2, {}, "strategy.bucket_mb", "`data` > 1", "remove"),
    ({"pipeline": 2, "overlap": False}, 2, {}, "strategy.overlap", "`data` > 1", "remove"),
    (
        {"pipeline": 2, "schedule": "zb-h1", "recompute": True},
        2,
        {},
        "strategy.recompute",
        "cannot be combined with `schedule: zb-h1`",
        "1f1b",
    ),
    (
        {"pipeline": 2, "schedule": "zb-h1", "recompute": True},
        2,
        {"activation_checkpointing": "1"},
        "activation_checkpointing",
        "cannot be combined with `schedule: zb-h1`",
        "1f1b",
    ),
    (
        {"pipeline": 2, "recompute": False},
        2,
        {"activation_checkpointing": "1"},
        "strategy.recompute",
        "`activation_checkpointing` requires it",
        "one of the two",
    ),
    ({"data": 2, "backend": "nccl"}, 2, {}, "strategy.backend", "between GPUs", "use_gpu"),
    ({"tensor": 2}, 2, {}, "strategy.tensor_plan", "needs it", "colwise"),
    (
        {"data": 2, "tensor_plan": {"0": "colwise"}},
        2,
        {},
        "strategy.tensor_plan",
        "only with `tensor` > 1",
        "remove",
    ),
    (
        {"tensor": 2, "tensor_plan": {"0": "colwize"}},
        2,
        {},
        "strategy.tensor_plan.0",
        "unknown style 'colwize'",
        "did you mean 'colwise'?",
    ),
    ({"data": 2, "num_servers": 2}, 2, {}, "strategy.num_servers", "ps-sync`", "remove"),
    ({"data": 2, "replication": 2}, 2, {}, "strategy.replication", "ps-sync`", "remove"),
    ({"data": 2, "wire": "fp16"}, 2, {}, "strategy.wire", "ps-sync`", "remove"),
    (
        {"data": 2, "resources_per_server": {"CPU": 1}},
        2,
        {},
        "strategy.resources_per_server",
        "ps-sync`",
        "remove",
    ),
    (
        {"data": 2, "data_strategy": "ps-sync", "bucket_mb": 5},
        2,
        {},
        "strategy.bucket_mb",
        "`data_strategy: ring`",
        "remove",
    ),
    (
        {"data": 2, "data_strategy": "ps-async"},
        2,
        {},
        "strategy.data_strategy",
        "'ps-async'",
        "",
    ),
    (
        {"data": 2, "data_strategy": "ps-sync", "backup_workers": 1},
        2,
        {},
        "strategy.backup_workers",
        "unknown",
        "",
    ),
]


@pytest.mark.parametrize(("options", "workers", "fields", "field", "message", "hint"), INVALID)
def test_invalid_options_are_named(
    options: dict[str, Any],
    workers: int,
    fields: dict[str, Any],
    field: str,
    message: str,
    hint: str,
) -> None:
    (problem,) = strategy_problems(Job.model_validate(hybrid_fields(options, workers, **fields)))
    assert problem.field == field
    assert message in problem.message and hint in problem.hint


@pytest.mark.parametrize(
    ("options", "workers", "batch", "micro_batches"),
    [
        ({"data": 2}, 2, 16, 1),
        ({"pipeline": 2}, 2, 16, 8),
        ({"pipeline": 2, "data": 2}, 4, 16, 8),
        ({"pipeline": 2, "data": 2}, 4, 10, 5),  # limited by the batch
        ({"pipeline": 3, "schedule": "interleaved"}, 3, 10, 9),  # a multiple of the stages
    ],
)
def test_default_micro_batches(
    options: dict[str, Any], workers: int, batch: int, micro_batches: int
) -> None:
    job = hybrid_job(options, workers, global_batch_size=batch)
    assert not strategy_problems(job)
    assert HybridOptions.model_validate(options).micro(job) == micro_batches


def test_each_stage_has_its_own_servers() -> None:
    options = {"pipeline": 2, "data": 2, "data_strategy": "ps-sync", "num_servers": 3}
    job = hybrid_job({**options, "replication": 2, "wire": "bf16"}, 4)
    roles = make_strategy(job).roles(job)
    assert (roles.servers, roles.replication, roles.wire) == (6, 2, "bfloat16")
    assert roles.division(4) == Division(((0, 2), (1, 3)), 6)
    assert roles.collective is not None and roles.group_size == 2
    ring = hybrid_job({"pipeline": 2, "data": 2}, 4)
    assert make_strategy(ring).roles(ring).servers == 0


def test_tensor_slices_support_checkpoints() -> None:
    options = {"tensor": 2, "tensor_plan": {"0": "colwise"}}
    assert not strategy_problems(hybrid_job(options, 2, checkpoint={"every_steps": 2}))


def test_survives_worker_loss_if_stages_have_peers() -> None:
    assert make_strategy(hybrid_job({"pipeline": 2, "data": 2}, 4)).survives_worker_loss()
    assert not make_strategy(hybrid_job({"pipeline": 2}, 2)).survives_worker_loss()


@pytest.mark.parametrize(
    ("options", "workers", "sizes"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 2, (2, 1, 1)),
        ({}, 3, (3, 1, 1)),
        ({}, 4, (2, 1, 2)),
        ({}, 9, (3, 1, 3)),
        ({"pipeline": 1}, 4, (1, 1, 4)),
        ({"pipeline": 2}, 6, (2, 1, 3)),
        ({"data": 2}, 8, (4, 1, 2)),
        ({"data": 1}, 4, (4, 1, 1)),
        ({"tensor": 2}, 8, (2, 2, 2)),
        ({"tensor": 4}, 4, (1, 4, 1)),
        ({"pipeline": 2, "tensor": 2}, 4, (2, 2, 1)),
        ({"pipeline": 2, "tensor": 1, "data": 4}, 8, (2, 1, 4)),
    ],
)
def test_missing_sizes_are_filled_from_the_number_of_workers(
    options: dict[str, Any], workers: int, sizes: tuple[int, int, int]
) -> None:
    plan = (
        {"tensor_plan": {"0": "colwise"}} if "tensor" in options and options["tensor"] > 1 else {}
    )
    job = make_job(hybrid_fields({**options, **plan}, workers))
    resolved = job.strategy.options
    assert (resolved["pipeline"], resolved["tensor"], resolved["data"]) == sizes
    assert make_strategy(job).detail() == "pipeline {} x tensor {} x data {}".format(*sizes)
    assert complete(job) == job


@pytest.mark.parametrize("options", [{"pipeline": 3}, {"data": 5}, {"tensor": 3}, {"data": "two"}])
def test_sizes_that_fit_no_grid_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="strategy"):
        make_job(hybrid_fields(options, 4))


def test_gradient_accumulation_becomes_micro_batches() -> None:
    job = make_job(hybrid_fields({"pipeline": 2}, 2, gradient_accumulation=4))
    assert (job.gradient_accumulation, job.strategy.options["micro_batches"]) == (1, 4)
    with pytest.raises(SpecError, match="set only one of the two"):
        make_job(hybrid_fields({"pipeline": 2, "micro_batches": 4}, 2, gradient_accumulation=4))
