"""`data_strategy: ps-sync`: replicas push to the servers of their stage or slice."""

from typing import Any

import pytest
import torch
from comparison import distance
from hybrid_models import (
    GPT_PLAN,
    INCEPTION_PLAN,
    MLP_PLAN,
    Conv,
    Gpt,
    Inception,
    Mlp,
    grid_of,
    hybrid_job,
    merge_parts,
    train_plain,
)
from local_run import train
from marks import slow

from distplat.platform.shard_map import Division, Shard, clip_ranges
from distplat.platform.vector_layout import Segment
from distplat.strategies.algorithms.reduce import squared_norm
from distplat.strategies.model.parameter_layout import squared_norm_of
from distplat.strategies.task import Task

GRIDS: dict[str, tuple[type[Task], tuple[dict[str, Any], int]]] = {
    "2x1x2 mlp": (Mlp, grid_of(2, 1, 2)),
    "2x1x2 conv, 2 servers": (Conv, grid_of(2, 1, 2, num_servers=2)),
    "2x1x2 gpt, interleaved": (Gpt, grid_of(2, 1, 2, schedule="interleaved")),
    "2x1x2 mlp, zb-h1": (Mlp, grid_of(2, 1, 2, schedule="zb-h1")),
    "3x1x1 gpt": (Gpt, grid_of(3, 1, 1)),
    "1x1x3 mlp": (Mlp, grid_of(1, 1, 3)),
    "1x2x2 mlp, 2 servers": (Mlp, grid_of(1, 2, 2, tensor_plan=MLP_PLAN, num_servers=2)),
    "1x2x2 gpt": (Gpt, grid_of(1, 2, 2, tensor_plan=GPT_PLAN)),
    "2x2x1 gpt": (Gpt, grid_of(2, 2, 1, tensor_plan=GPT_PLAN)),
    "2x2x1 branches": (Inception, grid_of(2, 2, 1, tensor_plan=INCEPTION_PLAN)),
}


@pytest.mark.sweep(6)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("clip", [slow(None), 0.3])
def test_grid_with_servers_matches_one_process(name: str, clip: float | None) -> None:
    task_type, (options, workers) = GRIDS[name]
    run = train(
        hybrid_job({**options, "data_strategy": "ps-sync"}, workers, clip_norm=clip), task_type
    )
    expected, _ = train_plain(task_type, clip)
    assert distance(merge_parts(run), expected) < 1e-5
    if clip is not None:
        assert distance(merge_parts(run), train_plain(task_type)[0]) > 1e-4, (
            "clipping changes the model"
        )


@pytest.mark.parametrize(("servers", "servers_per_part"), [(2, 1), (4, 2)])
def test_division_assigns_servers_to_parts(servers: int, servers_per_part: int) -> None:
    division = Division(((0, 2), (1, 3)), servers)
    assert division.servers_per_part == servers_per_part
    assert [division.part_of(rank) for rank in range(4)] == [0, 1, 0, 1]
    assert [division.part_rank_of(rank) for rank in range(4)] == [0, 0, 1, 1]
    servers_by_part = [[*division.servers_of(part)] for part in range(2)]
    assert [n for numbers in servers_by_part for n in numbers] == [*range(servers)]
    for part, numbers in enumerate(servers_by_part):
        assert [division.shard_of(n) for n in numbers] == [
            (part, i) for i in range(servers_per_part)
        ]


def test_clip_ranges_to_a_shard() -> None:
    assert clip_ranges([(0, 3), (5, 12), (20, 22)], Shard(1, 2, 10)) == ((0, 1), (3, 8))
    assert clip_ranges([(12, 14)], Shard(1, 2, 10)) == ()


def test_squared_norm_excludes_ranges() -> None:
    vector = torch.arange(10.0)
    segments = (Segment(0, 10, "float32"),)
    assert squared_norm_of(vector, segments) == squared_norm(vector)
    assert squared_norm_of(vector, segments, ((0, 2), (4, 5), (8, 10))) == pytest.approx(
        sum(i * i for i in (2, 3, 5, 6, 7))
    )
