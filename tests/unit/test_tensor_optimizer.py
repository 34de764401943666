"""Optimizers of the job file that need whole tensors, compared with torch for any split."""

from typing import Any

import pytest
import torch
from grouped_task import STRATEGIES, Own, Small, assert_close, plain_loop
from grouped_task import job as grouped_job
from hybrid_models import GPT_PLAN, Gpt, grid_of, hybrid_job, merge_parts
from hybrid_workers import StopOnLostRank
from jobs import job_of
from local_run import LocalRun, train
from torch import Tensor, nn
from verify_rows import rows

from distplat.platform.errors import SpecError
from distplat.platform.even_split import snap_to_boundaries
from distplat.platform.spec import CheckpointConfig, Job
from distplat.platform.vector_layout import Layout, Piece, Segment
from distplat.strategies.fakes import Fabric
from distplat.strategies.verification.verdicts import EQUAL

GROUPS = [{"match": "*.bias,*norm*", "weight_decay": 0.0}, {"match": "head.*", "lr": 0.01}]
ADAFACTOR: dict[str, Any] = {"name": "Adafactor", "lr": 0.05, "weight_decay": 0.3, "d": 2}


def job(strategy: Any = "ring", world: int = 1, **more: Any) -> Job:
    return grouped_job(strategy, world, **{"optimizer": {**ADAFACTOR, "groups": GROUPS}, **more})


def train_plain(cls: type[Small] = Small, clip_norm: float | None = None) -> dict[str, Tensor]:
    """Train in a plain loop."""
    task = cls()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    named: Any = dict(model.named_parameters())
    named |= {"task:bend": task.bend} if isinstance(task, Own) else {}
    first = [n for n in named if n.endswith(".bias") or "norm" in n]
    second = [n for n in named if n.startswith("head.") and n not in first]
    rest = [n for n in named if n not in (*first, *second)]
    groups: list[dict[str, Any]] = [
        {"params": [named[n] for n in first], "weight_decay": 0.0},
        {"params": [named[n] for n in second], "lr": 0.01},
        {"params": [named[n] for n in rest]},
    ]
    adafactor: Any = torch.optim.Adafactor
    optimizer = adafactor(groups, lr=0.05, weight_decay=0.3, d=2)
    plain_loop(task, model, data, optimizer, clip_norm)
    return {name: value.detach().clone() for name, value in named.items()}


def state_of(run: LocalRun, rank: int = 0) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in run.ranks[rank].prepared.flat.state_dict().items()}


CONFIGS: dict[str, tuple[Any, int]] = {
    **STRATEGIES,
    "sharded-5": ({"name": "ring", "shard_optimizer": True}, 5),
    "ps-sync-more-servers-than-tensors": ({"name": "ps-sync", "num_servers": 8}, 2),
}


@pytest.mark.sweep(4)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", CONFIGS)
def test_run_matches_plain_loop(name: str, clip_norm: float | None) -> None:
    run = train(job(*CONFIGS[name], clip_norm=clip_norm), Small)
    assert_close(state_of(run), train_plain(clip_norm=clip_norm))


@pytest.mark.parametrize("name", ["ring-2", "sharded", "ps-sync-3-servers", "ps-async"])
def test_task_parameters_match_plain_loop(name: str) -> None:
    assert_close(state_of(train(job(*CONFIGS[name]), Own)), train_plain(Own))


class UnusedLayer(Small):
    """The forward does not use one layer, and weight decay must not change it."""

    def model(self) -> nn.Module:
        model = super().model()
        model.idle = nn.Linear(3, 3).double()
        return model


@pytest.mark.parametrize("name", ["ring-2", "sharded", "ps-sync-3-servers", "ps-async"])
def test_parameter_without_gradient_is_not_updated(name: str) -> None:
    assert_close(state_of(train(job(*CONFIGS[name]), UnusedLayer)), train_plain(UnusedLayer))


class DoubleGpt(Gpt):
    def model(self) -> nn.Module:
        return super().model().double()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("pipeline", [1, 2, 3])
def test_pipeline_matches_one_worker(pipeline: int) -> None:
    """`eps` exceeds the gradients of some biases, which are rounding errors only."""
    grid, workers = grid_of(pipeline, 1, 2)
    fields = {"optimizer": {"name": "Adafactor", "lr": 0.02, "eps": [1e-6, 1e-3]}}
    stages = merge_parts(train(hybrid_job(grid, workers, **fields), DoubleGpt))
    expected = train(hybrid_job({}, 1, **fields), DoubleGpt).parameters()
    assert max(float((stages[name] - expected[name]).abs().max()) for name in expected) < 1e-9


CHECKPOINTED = ["ring-2", "sharded", "ps-sync-3-servers", "ps-sync-kept-twice", "hybrid-servers"]


@pytest.mark.sweep(8)
@pytest.mark.parametrize("target", CHECKPOINTED)
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpoint_resumes_under_any_strategy(name: str, target: str) -> None:
    reference = train(job(*CONFIGS[name], checkpoint={"every_steps": 2}), Small)
    resumed = train(job(*CONFIGS[target]), Small, saved=reference.checkpoints[2])
    for key, value in reference.parameters().items():
        actual = resumed.parameters()[key]
        assert (
            torch.equal(actual, value) if name == target else torch.allclose(actual, value, 1e-9)
        ), key


@pytest.mark.parametrize("name", ["ring-2", "sharded", "ps-sync-3-servers"])
def test_ema_is_resumed(name: str) -> None:
    spec = job(*CONFIGS[name], checkpoint={"every_steps": 2}, ema={"decay": 0.5})
    reference = train(spec, Small)
    resumed = train(spec, Small, saved=reference.checkpoints[2])
    ring = train(job("ring", 1, ema={"decay": 0.5}), Small)
    assert "ema:head.weight" in ring.trained[0]
    for key, value in reference.trained[0].items():
        assert torch.equal(resumed.trained[0][key], value), key
        torch.testing.assert_close(ring.trained[0][key], value, rtol=1e-9, atol=1e-9)


def test_verification_matches_whole_batch() -> None:
    spec = job(*CONFIGS["ps-sync-3-servers"], steps=8, task="a:A")
    spec = spec.model_copy(update={"checkpoint": CheckpointConfig(every_steps=1, num_to_keep=9)})
    assert {row.verdict for row in rows(Small, spec).values()} == {EQUAL}


def test_run_with_a_lost_worker_is_bit_identical() -> None:
    spec = job("ring", 3)
    run, fabric = LocalRun(spec, Small), Fabric(3)
    fabric.kill(1, after=12)
    assert not StopOnLostRank(run, fabric).make()
    run.renew(1)
    attempt = StopOnLostRank(run)
    assert attempt.make()
    assert min(attempt.starts) > 1
    run.close()
    reference = state_of(train(spec, Small))
    for rank in range(3):
        for key, value in reference.items():
            assert torch.equal(state_of(run, rank)[key], value), key


@pytest.mark.parametrize(
    ("bounds", "boundaries", "expected"),
    [
        ([(0, 10), (10, 20)], [0, 8, 16], [(0, 8), (8, 20)]),
        ([(0, 10), (10, 20)], [0, 13], [(0, 13), (13, 20)]),
        ([(0, 10), (10, 20)], [0], [(0, 0), (0, 20)]),
        ([(0, 5), (5, 10), (10, 16)], [0, 14], [(0, 0), (0, 14), (14, 16)]),
        ([(0, 16)], [0, 8], [(0, 16)]),
    ],
)
def test_snap_to_boundaries(
    bounds: list[tuple[int, int]], boundaries: list[int], expected: list[tuple[int, int]]
) -> None:
    assert snap_to_boundaries(bounds, boundaries) == expected


def test_cut_parameter_has_no_shape() -> None:
    pieces = Piece(0, 0, 6, shape=(2, 3)), Piece(1, 16, 20, shape=(4,))
    layout = Layout(20, (Segment(0, 20, "float32"),), pieces, 2, 20)
    assert [piece.shape for piece in layout.cut(0, 16).pieces] == [(2, 3)]
    assert [piece.shape for piece in layout.cut(3, 20).pieces] == [None, (4,)]
    assert layout.starts == (0, 16)


UNSUPPORTED: list[tuple[Any, int, dict[str, Any], str]] = [
    (
        {"name": "hybrid", "tensor": 2, "tensor_plan": GPT_PLAN},
        2,
        {},
        "optimizer.name: needs whole tensors, and `tensor: 2` cuts them",
    ),
    (
        {"name": "ps-sync", "num_servers": 2, "split": "load"},
        2,
        {},
        "strategy.split: cannot measure a server's speed with Adafactor",
    ),
    (
        "ring",
        1,
        {"groups": [{"match": "*", "eps": 1e-3}]},
        "optimizer.groups.0.eps: is no argument of Adafactor",
    ),
    ("ring", 1, {"d": 0.5}, "optimizer.d: must be >= 1 (got 0.5)"),
    ("ring", 1, {"beta2_decay": 0.5}, "optimizer.beta2_decay: must be <= 0 (got 0.5)"),
]


@pytest.mark.parametrize(("strategy", "world", "more", "message"), UNSUPPORTED)
def test_unsupported_settings_are_rejected(
    strategy: Any, world: int, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        job_of(strategy, world, optimizer={**ADAFACTOR, **more})
    assert str(caught.value).startswith(message)
