"""Parameter groups of a job: validation, and runs equal to param groups of torch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from grouped_task import (
    ADAMW,
    GROUPED,
    GROUPS,
    STEPS,
    STRATEGIES,
    Own,
    Small,
    assert_close,
    job,
    train_with_param_groups,
)
from hybrid_models import GPT_PLAN, Gpt, grid_of, hybrid_job, merge_parts
from local_run import LocalRun, train
from marks import slow
from torch import nn

from distplat.nn import ShardedEmbedding
from distplat.platform.errors import SpecError
from distplat.platform.job_file import read_job
from distplat.platform.progress import StepReport
from distplat.platform.resume import mismatches, state_of
from distplat.strategies.loop.session import prepare
from distplat.strategies.task import Task


@pytest.mark.sweep(2)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", STRATEGIES)
def test_groups_match_a_plain_loop_with_param_groups(name: str, clip_norm: float | None) -> None:
    run = train(job(*STRATEGIES[name], clip_norm=clip_norm), Small)
    assert_close(run.parameters(), train_with_param_groups(Small, clip_norm))


@pytest.mark.parametrize("name", ["ring-2", "sharded", "ps-sync-3-servers", "ps-async"])
def test_groups_match_parameters_of_the_task(name: str) -> None:
    """The task's parameter is first in no group, then in a group by its name."""
    run = train(job(*STRATEGIES[name]), Own)
    assert_close(
        {n: p.clone() for n, p in run.ranks[0].prepared.flat.state_dict().items()},
        train_with_param_groups(Own),
    )
    grouped = {**GROUPED, "groups": [*GROUPS, {"match": "task:b*", "lr": 1e-30}]}
    flat = train(job(*STRATEGIES[name], optimizer=grouped), Own).ranks[0].prepared.flat
    torch.testing.assert_close(flat.extra["task:bend"], torch.ones(3, dtype=torch.float64))


GPT_GROUPS = [
    {"match": "*.bias, *attention.0.*, *mlp.0.*, 4.*", "lr": 0.02, "momentum": 0.5},
    {"match": "*attention*", "weight_decay": 0.1},
]
GPT_OPTIMIZER = {"name": "SGD", "lr": 0.05, "momentum": 0.9, "groups": GPT_GROUPS}


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("pipeline", "tensor", "data"), [(2, 1, 1), (3, 1, 2), (1, 2, 1), (2, 2, 1)]
)
@pytest.mark.parametrize("clip_norm", [slow(None), 0.5])
def test_groups_of_a_cut_model_match_the_whole_model(
    pipeline: int, tensor: int, data: int, clip_norm: float | None
) -> None:
    options = {"tensor_plan": GPT_PLAN} if tensor > 1 else {}
    grid, workers = grid_of(pipeline, tensor, data, **options)
    fields = {"optimizer": GPT_OPTIMIZER, "clip_norm": clip_norm}
    sharded = merge_parts(train(hybrid_job(grid, workers, **fields), Gpt))
    single = train(hybrid_job({}, 1, **fields), Gpt).parameters()
    ungrouped = {"optimizer": {**GPT_OPTIMIZER, "groups": []}, "clip_norm": clip_norm}
    other = train(hybrid_job({}, 1, **ungrouped), Gpt).parameters()
    assert max(float((sharded[name] - single[name]).abs().max()) for name in single) < 1e-5
    assert max(float((other[name] - single[name]).abs().max()) for name in single) > 1e-2


def test_group_with_the_default_lr_is_bit_identical_to_no_group() -> None:
    redundant_group = {**ADAMW, "groups": [{"match": "norm.*", "lr": ADAMW["lr"]}]}
    for name in ("ring-2", "sharded", "ps-sync-3-servers"):
        grouped, without = (
            train(job(*STRATEGIES[name], optimizer=optimizer), Small)
            for optimizer in (redundant_group, ADAMW)
        )
        for key, value in without.parameters().items():
            assert torch.equal(grouped.parameters()[key], value), key


def traffic(run: LocalRun) -> list[dict[str, float]]:
    """Return the bytes that rank 0 has sent and received in each step."""
    steps = [report for report in run.reports[0] if isinstance(report, StepReport)]
    return [{k: v for k, v in step.figures.items() if k.endswith("_bytes")} for step in steps]


@pytest.mark.parametrize("name", ["ring-2", "sharded", "ps-sync-3-servers", "ps-async"])
def test_groups_add_no_traffic(name: str) -> None:
    grouped, without = (
        train(job(*STRATEGIES[name], optimizer=optimizer), Small) for optimizer in (GROUPED, ADAMW)
    )
    assert traffic(grouped)[1:] == traffic(without)[1:]
    assert len(traffic(grouped)) == STEPS and traffic(grouped)[1]


@pytest.mark.parametrize("name", ["ring-2", "sharded", "ps-sync-3-servers", "hybrid-servers"])
def test_resume_with_groups_is_bit_identical(name: str) -> None:
    config = job(*STRATEGIES[name], checkpoint={"every_steps": 2})
    unfailed = train(config, Small)
    resumed = train(config, Small, saved=unfailed.checkpoints[2])
    for key, value in unfailed.parameters().items():
        assert torch.equal(resumed.parameters()[key], value), key


def test_groups_may_change_on_resume() -> None:
    """The optimizer state of each parameter stays."""
    original, changed = job(checkpoint={"every_steps": 2}), job(optimizer=ADAMW)
    saved = train(original, Small).checkpoints[2]
    assert mismatches({**state_of(original, "a", {}), "step": 2}, changed) == []
    resumed_changed = train(changed, Small, saved=saved).parameters()
    resumed = train(original, Small, saved=saved).parameters()
    assert not torch.equal(resumed_changed["head.weight"], resumed["head.weight"])
    expected = train_with_param_groups(Small)
    assert torch.allclose(resumed["head.weight"], expected["head.weight"], atol=1e-9)


TEXT = """\
name: small
task: small:Small
strategy: ring
steps: 3
global_batch_size: 8
optimizer:
  name: AdamW
  lr: 0.1
  groups:
    - {match: "*.bias", weight_decay: 0}
    - {match: "head.*", lr: 1e-4}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "weight_decay: 0}",
            "weight_decai: 0}",
            "job.yaml:10:25: optimizer.groups.0.weight_decai: unknown field (value 0)\n"
            "  hint: did you mean 'weight_decay'?",
        ),
        (
            "lr: 1e-4",
            "momentum: 0.5",
            "job.yaml:11:25: optimizer.groups.1.momentum: is no argument of AdamW\n"
            "  hint: allowed: amsgrad, betas, eps, lr, maximize, weight_decay",
        ),
        ("lr: 1e-4", "lr: 0", "job.yaml:11:25: optimizer.groups.1.lr: must be > 0 (got 0)"),
        (
            "lr: 1e-4",
            "betas: [0.5, 2]",
            "job.yaml:11:38: optimizer.groups.1.betas.1: must be < 1 (got 2)",
        ),
        (
            "lr: 1e-4",
            "amsgrad: true",
            "job.yaml:11:25: optimizer.groups.1.amsgrad: is on here and off in the optimizer: "
            "all groups must have the same optimizer state",
        ),
        (
            'match: "head.*", ',
            "",
            "job.yaml:11:7: optimizer.groups.1.match: required, but missing",
        ),
        (
            ", lr: 1e-4",
            "",
            "job.yaml:11:7: optimizer.groups.1: changes nothing: give it an argument beside "
            "`match`",
        ),
        (
            "head.*",
            "head.*,*.bias",
            "job.yaml:11:8: optimizer.groups.1.match: '*.bias' stands in groups.0 already\n"
            "  hint: remove one of the two",
        ),
        (
            "head.*",
            "head.*,,a",
            "job.yaml:11:8: optimizer.groups.1.match: has an empty pattern (got 'head.*,,a')\n"
            "  hint: write 'a.*,b.*'",
        ),
        ("lr: 1e-4}", "lr: 1e-4, lr: 1}", "job.yaml:11:35: optimizer.groups.1.lr: set twice"),
        (
            '{match: "*.bias", weight_decay: 0}',
            "bias",
            "job.yaml:10:7: optimizer.groups.0: must be a mapping (got 'bias')",
        ),
    ],
)
def test_error_has_line_and_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert old in TEXT
    Path("job.yaml").write_text(TEXT.replace(old, new))
    with pytest.raises(SpecError) as caught:
        read_job(Path("job.yaml"))
    assert str(caught.value).startswith(message)


def test_nesterov_needs_momentum_in_each_group() -> None:
    groups = [{"match": "head.*", "nesterov": True}]
    with pytest.raises(SpecError, match=r"^optimizer\.groups\.0\.nesterov: needs momentum > 0"):
        job(optimizer={"name": "SGD", "lr": 0.1, "groups": groups})
    job(optimizer={"name": "SGD", "lr": 0.1, "momentum": 0.9, "groups": groups})


class Tied(Small):
    """Two names of one tensor, and a frozen layer."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.again = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
                self.again.weight = self.first.weight
                self.still = nn.Linear(6, 6).requires_grad_(False)

        return Net()


class Tables(Small):
    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words, self.head = ShardedEmbedding(10, 4), nn.Linear(4, 3)

        return Net()


@pytest.mark.parametrize(
    ("task_class", "matches", "message"),
    [
        (Small, ["*.biass"], "optimizer.groups.0.match: '*.biass' matches no parameter\n  hint: "),
        (Small, ["head.*", "*.bias, hed.weight"], "optimizer.groups.1.match: 'hed.weight' matches "
         "no parameter\n  hint: did you mean 'head.weight'?"),
        (Small, ["x"], "optimizer.groups.0.match: 'x' matches no parameter\n  hint: names are "
         "those of model.named_parameters(): body.weight, body.bias, norm.weight, ..."),
        (Small, ["*", "head.*"], "optimizer.groups.1.match: 'head.*' matches parameters of earlier "
         "groups only\n  hint: a parameter belongs to the first that matches"),
        (Tied, ["again.*"], "optimizer.groups.0.match: 'again.*' matches no parameter\n  hint: "
         "'again.weight' is the parameter 'first.weight': match that name"),
        (Tables, ["*.weight"], "optimizer.groups.0.match: '*.weight' matches the embedding table "
         "'words'\n  hint: its rows are updated as `embeddings.optimizer` says: match less"),
        (Tables, ["words*"], "optimizer.groups.0.match: 'words*' matches the embedding table"),
    ],
)  # fmt: skip
def test_patterns_are_checked_against_the_model(
    task_class: type[Task], matches: list[str], message: str
) -> None:
    groups = [{"match": match, "lr": 0.5} for match in matches]
    tables = {"optimizer": {"name": "SGD", "lr": 0.1}} if task_class is Tables else None
    with pytest.raises(SpecError) as caught:
        prepare(job(optimizer={**ADAMW, "groups": groups}, embeddings=tables), task_class())
    assert str(caught.value).startswith(message)


def test_frozen_parameters_may_be_in_a_group() -> None:
    groups = [{"match": "still.*", "lr": 0.5}, {"match": "*", "lr": 0.2}]
    prepared = prepare(job(optimizer={**ADAMW, "groups": groups}), Tied())
    assert {piece.group for piece in prepared.flat.layout.pieces} == {2}


def test_layout_cut_keeps_the_groups() -> None:
    layout = prepare(job(), Small()).flat.layout
    assert [piece.group for piece in layout.pieces] == [0, 1, 1, 1, 2, 1]
    cut = layout.cut(16, layout.size - 16)
    found = [replace(piece, start=0, stop=0, shape=None) for piece in cut.pieces]
    assert found == [replace(p, start=0, stop=0, shape=None) for p in layout.pieces[:-1]]
