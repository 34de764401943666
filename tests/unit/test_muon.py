"""Muon for the matrices of hidden layers, other optimizers by name for groups of parameters."""

from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from control_records import record_of
from embedding_jobs import job as table_job
from grouped_task import BATCH, SAMPLES, STEPS, STRATEGIES, Own, Small, assert_close
from grouped_task import job as grouped_job
from hybrid_models import Gpt, grid_of, hybrid_job, merge_parts
from hybrid_workers import StopOnLostRank
from local_run import LocalRun, train, with_timeouts
from local_servers import Servers, wait_for_backups
from table_rows import table_rows
from torch import Tensor, nn
from verify_rows import rows
from words import ROWS, Words

from distplat.platform.errors import SpecError
from distplat.platform.job_file import read_job, render_job
from distplat.platform.resume import mismatches
from distplat.platform.resume import state_of as saved_of
from distplat.platform.sampler import Sampler
from distplat.platform.spec import CheckpointConfig, Job
from distplat.strategies.catalog import make_strategy
from distplat.strategies.fakes import Fabric
from distplat.strategies.loop.session import prepare
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.tensor_optimizer import TensorOptimizer, class_of
from distplat.strategies.verification.verdicts import EQUAL

REST = "*.bias, *norm*, head.*"
ADAMW: dict[str, Any] = {"name": "AdamW", "lr": 0.01}
MUON: dict[str, Any] = {"name": "Muon", "lr": 0.05, "adjust_lr_fn": "match_rms_adamw"}
RECIPE = {**MUON, "groups": [{"match": REST, **ADAMW}]}
SCHEDULE = {"name": "step", "every_steps": 2, "gamma": 0.5}
SCALES = [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
"""The factors of SCHEDULE by step; they are powers of two, so the rates are exact."""


class Deep(Small):
    """Two hidden matrices, which two servers can share."""

    def model(self) -> nn.Module:
        model: Any = super().model()
        model.body = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()
        return model  # type: ignore[no-any-return]


class DeepOwn(Own, Deep):
    pass


def job(strategy: Any = "ring", world: int = 1, **overrides: Any) -> Job:
    fields = {"optimizer": RECIPE, "lr_schedule": SCHEDULE, **overrides}
    return grouped_job(strategy, world, **fields)


def muon_with(named: dict[str, Any], rest: dict[str, Any] = ADAMW) -> list[torch.optim.Optimizer]:
    """Return torch's Muon for the hidden matrices, and another optimizer for the rest."""
    hidden = [p for n, p in named.items() if n.startswith("body") and p.ndim == 2]
    others = [p for p in named.values() if all(p is not matrix for matrix in hidden)]
    arguments = {k: v for k, v in rest.items() if k != "name"}
    return [
        torch.optim.Muon(hidden, lr=0.05, adjust_lr_fn="match_rms_adamw"),
        class_of(rest["name"])(others, **arguments),
    ]


def plain_loop(
    task_class: type[Small] = Deep, clip_norm: float | None = None, make_optimizers: Any = muon_with
) -> dict[str, Tensor]:
    task = task_class()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    named: Any = dict(model.named_parameters())
    named |= {"task:bend": task.bend} if isinstance(task, Own) else {}
    optimizers = make_optimizers(named)
    factor = lambda step: [*SCALES, 0.0][step]  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers]
    sampler = Sampler(SAMPLES, BATCH, 1, seed=5)
    for step in range(STEPS):
        inputs, targets = zip(*(data[int(i)] for i in sampler.batch_ids(step)), strict=True)
        for parameter in named.values():
            parameter.grad = None
        loss: Any = task.loss(model(torch.stack(inputs)), torch.stack(targets))
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([*named.values()], clip_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return {name: value.detach().clone() for name, value in named.items()}


def state_of(run: LocalRun, rank: int = 0) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in run.ranks[rank].prepared.flat.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


SINGLE_WORKER: dict[str, Any] = {
    "ring": "ring",
    "sharded": {"name": "ring", "shard_optimizer": True},
    "ps-sync-3-servers": {"name": "ps-sync", "num_servers": 3},
    "ps-sync-more-servers-than-tensors": {"name": "ps-sync", "num_servers": 12},
    "ps-sync-kept-twice": {"name": "ps-sync", "num_servers": 2, "replication": 2},
    "ps-async": {"name": "ps-async", "num_servers": 2},
    "hybrid": "hybrid",
}


@pytest.mark.parametrize("name", SINGLE_WORKER)
def test_one_worker_is_bit_identical_to_a_plain_loop(name: str) -> None:
    assert_same(state_of(train(job(SINGLE_WORKER[name]), Deep)), plain_loop())


@pytest.mark.sweep(2)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", STRATEGIES)
def test_several_workers_are_close_to_a_plain_loop(name: str, clip_norm: float | None) -> None:
    """Gradients are summed in another order, and Muon rounds to bfloat16."""
    run = train(job(*STRATEGIES[name], clip_norm=clip_norm), Deep)
    assert_close(state_of(run), plain_loop(clip_norm=clip_norm), 1e-3)
    for rank in range(1, STRATEGIES[name][1]):
        assert_same(state_of(run, rank), state_of(run))


def test_parameters_of_the_task_are_in_groups() -> None:
    optimizer = {**MUON, "groups": [{"match": f"{REST}, task:*", **ADAMW}]}
    for strategy in ("ring", {"name": "ps-sync", "num_servers": 2}):
        assert_same(
            state_of(train(job(strategy, optimizer=optimizer), DeepOwn)), plain_loop(DeepOwn)
        )


def test_verify_with_muon_is_equal() -> None:
    config = job(*STRATEGIES["ps-sync-3-servers"], steps=4, task="a:A")
    config = config.model_copy(
        update={"checkpoint": CheckpointConfig(every_steps=1, num_to_keep=9)}
    )
    assert {row.verdict for row in rows(Deep, config).values()} == {EQUAL}


OPTIMIZERS = [
    {"name": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"name": "Adam", "lr": 0.01, "amsgrad": True},
    {"name": "RMSprop", "lr": 0.01, "momentum": 0.5, "centered": True},
    {"name": "Adagrad", "lr": 0.05},
    {"name": "Adadelta", "lr": 0.5},
    {"name": "Adamax", "lr": 0.01, "maximize": True},
    {"name": "NAdam", "lr": 0.01},
    {"name": "RAdam", "lr": 0.01},
    {"name": "Adafactor", "lr": 0.05},
    {"name": "LAMB", "lr": 0.05},
]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer["name"])
def test_muon_combines_with_any_optimizer(optimizer: dict[str, Any]) -> None:
    """Either optimizer may be the group's. A resumed run is bit-identical."""
    groups = [{"match": REST, **optimizer}]
    strategy = {"name": "ps-sync", "num_servers": 2}
    run = train(job(optimizer={**MUON, "groups": groups}, checkpoint={"every_steps": 3}), Deep)
    assert_same(state_of(run), plain_loop(make_optimizers=partial(muon_with, rest=optimizer)))
    swapped = {**optimizer, "groups": [{"match": "body.?.weight", **MUON}]}
    config = job(strategy, optimizer=swapped, checkpoint={"every_steps": 3})
    other = train(config, Deep)
    assert_same(state_of(other), plain_loop(make_optimizers=partial(muon_with, rest=optimizer)))
    assert_same(
        state_of(train(config, Deep, saved=other.checkpoints[3])),
        plain_loop(make_optimizers=partial(muon_with, rest=optimizer)),
    )


def test_two_groups_may_name_the_same_optimizer() -> None:
    groups = [{"match": "head.*", **ADAMW}, {"match": "*.bias, *norm*", **ADAMW}]
    assert_same(state_of(train(job(optimizer={**MUON, "groups": groups}), Deep)), plain_loop())
    other = [groups[0], {**groups[1], "lr": 0.02, "weight_decay": 0.5}]
    found = state_of(train(job(optimizer={**MUON, "groups": other}), Deep))
    assert not torch.equal(found["norm.weight"], plain_loop()["norm.weight"])


@pytest.mark.parametrize("name", ["ring-2", "sharded", "ps-sync-3-servers", "ps-async"])
def test_two_elementwise_optimizers_combine(name: str) -> None:
    """Groups with names need no optimizer of whole tensors."""
    sgd = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    groups = [{"match": "head*", **sgd}]

    def adamw_and_sgd(named: dict[str, Any]) -> list[torch.optim.Optimizer]:
        head = [p for n, p in named.items() if n.startswith("head")]
        rest = [p for n, p in named.items() if not n.startswith("head")]
        return [torch.optim.AdamW(rest, lr=0.01), torch.optim.SGD(head, lr=0.1, momentum=0.9)]

    run = train(job(*STRATEGIES[name], optimizer={**ADAMW, "groups": groups}), Small)
    assert_close(state_of(run), plain_loop(Small, make_optimizers=adamw_and_sgd))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer["name"])
def test_load_of_empty_state_resets_the_optimizer(optimizer: dict[str, Any]) -> None:
    config = job(optimizer={**MUON, "groups": [{"match": "bias", **optimizer}]}).optimizer
    model = nn.Linear(4, 3)
    flat = FlatModel(model, group_of=config.group_of)
    tensor_optimizer = TensorOptimizer(config, flat.params, flat.grads, flat.layout)
    before, found = flat.params.clone(), []
    flat.grads.fill_(0.5)
    for _ in range(2):
        assert tensor_optimizer.state() == {}
        flat.params.copy_(before)
        tensor_optimizer.step(config.rates())
        tensor_optimizer.step(config.rates())
        assert tensor_optimizer.state_bytes > 0
        found.append(flat.params.clone())
        tensor_optimizer.load({})
    assert torch.equal(*found) and not torch.equal(found[0], before)


def test_group_without_options_excludes_its_parameters_from_later_groups() -> None:
    groups = [{"match": "*.bias"}, {"match": "body.*", **MUON}]
    assert_same(state_of(train(job(optimizer={**ADAMW, "groups": groups}), Deep)), plain_loop())
    with pytest.raises(SpecError, match=r"groups\.1: changes nothing"):
        job(optimizer={**ADAMW, "groups": groups[::-1]})


def test_learning_rates_of_groups_are_reported() -> None:
    run = train(job(), Deep)
    figures = [report.figures for report in run.reports[0] if hasattr(report, "figures")]
    steps = [step for step in figures if "lr" in step]
    assert [step["lr"] for step in steps] == [0.05 * scale for scale in SCALES]
    assert [step["lr_group_0"] for step in steps] == [0.01 * scale for scale in SCALES]


class WideGpt(Gpt):
    def model(self) -> nn.Module:
        return super().model().double()


def test_stages_update_their_own_parameters() -> None:
    names = [n for n, p in WideGpt().model().named_parameters() if p.ndim == 2]
    groups = [{"match": ",".join(names[1:-1]), **MUON}]
    fields = {"optimizer": {**ADAMW, "groups": groups}}
    grid, workers = grid_of(2, 1, 1)
    staged = merge_parts(train(hybrid_job(grid, workers, **fields), WideGpt))
    single = train(hybrid_job({}, 1, **fields), WideGpt).parameters()
    start = train(hybrid_job({}, 1, **fields, steps=1), WideGpt).parameters()
    assert max(float((staged[name] - single[name]).abs().max()) for name in single) < 1e-3
    assert max(float((start[name] - single[name]).abs().max()) for name in single) > 2e-2


SAME_STRATEGY = ["ring-2", "sharded", "ps-sync-3-servers", "ps-sync-kept-twice", "hybrid-servers"]


OTHER_STRATEGY = [
    ("ring-2", "ps-sync-3-servers"),
    ("ps-sync-3-servers", "ring-2"),
    ("ps-sync-3-servers", "ps-sync-kept-twice"),
    ("sharded", "hybrid-servers"),
    ("hybrid-servers", "sharded"),
]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("name", "to"), [*zip(SAME_STRATEGY, SAME_STRATEGY, strict=True), *OTHER_STRATEGY]
)
def test_resumes_from_a_checkpoint_under_any_strategy(name: str, to: str) -> None:
    unfailed = train(job(*STRATEGIES[name], checkpoint={"every_steps": 2}), Deep)
    resumed = train(job(*STRATEGIES[to]), Deep, saved=unfailed.checkpoints[2])
    if name == to:
        assert_same(resumed.parameters(), unfailed.parameters())
    assert_close(resumed.parameters(), unfailed.parameters(), 1e-3)


def test_checkpoint_has_the_state_of_each_optimizer() -> None:
    saved = train(job(checkpoint={"every_steps": 2}), Deep).checkpoints[2]
    state_names = Counter(key.split("/")[1] for key in saved.file("optimizer"))
    assert state_names == {"momentum_buffer": 2, "step": 6, "exp_avg": 6, "exp_avg_sq": 6}


def test_ema_resumes_from_a_checkpoint() -> None:
    config = job(
        *STRATEGIES["ps-sync-3-servers"], checkpoint={"every_steps": 2}, ema={"decay": 0.5}
    )
    unfailed = train(config, Deep)
    resumed = train(config, Deep, saved=unfailed.checkpoints[2])
    assert "ema:head.weight" in unfailed.trained[0]
    assert_same(resumed.trained[0], unfailed.trained[0])


def test_recovery_from_a_lost_worker_is_bit_identical() -> None:
    config = job("ring", 3)
    run, fabric = LocalRun(config, Deep), Fabric(3)
    fabric.kill(1, after=12)
    assert not StopOnLostRank(run, fabric).make()
    run.renew(1)
    attempt = StopOnLostRank(run)
    assert attempt.make()
    assert min(attempt.starts) > 1
    run.close()
    unfailed = state_of(train(config, Deep))
    for rank in range(3):
        assert_same(state_of(run, rank), unfailed)


def test_muon_with_embedding_tables() -> None:
    """A single dense matrix, with and without servers of parameters and of rows."""
    optimizer = {
        "name": "Muon",
        "lr": 0.1,
        "groups": [{"match": "head.bias", "name": "SGD", "lr": 0.5}],
    }
    ring = train(table_job(Words, 2, optimizer=optimizer), Words)
    servers = train(
        table_job(Words, 2, optimizer=optimizer, strategy={"name": "ps-sync", "num_servers": 2}),
        Words,
    )
    assert_close(ring.parameters(), servers.parameters(), 1e-2)
    for number in range(2):
        tables = [torch.from_numpy(table_rows(run.tables, number, ROWS)) for run in (ring, servers)]
        torch.testing.assert_close(*tables, rtol=1e-2, atol=1e-2, equal_nan=True)


class Frozen(Deep):
    """A frozen bias may be in Muon's group, because nothing updates it."""

    unfreezes_in: int | None = None

    def model(self) -> nn.Module:
        model: Any = super().model()
        bias, calls = model.body[0].bias, []
        bias.requires_grad_(False)

        def unfreeze(*args: Any) -> None:
            calls.append(1)
            bias.requires_grad_(len(calls) == self.unfreezes_in)

        model.register_forward_pre_hook(unfreeze)
        return model  # type: ignore[no-any-return]


class Unfreezing(Frozen):
    unfreezes_in = 3


class Tied(Small):
    """An embedding, and a head with the same weight."""

    def model(self) -> nn.Module:
        table, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        head.weight = table.weight
        return nn.Sequential(table, nn.Linear(4, 4, bias=False), head)


def test_embedding_updated_by_muon_gives_a_warning() -> None:
    warnings = prepare(job(optimizer=MUON), Tied()).warnings
    assert any("Muon updates '0.weight', rows of an embedding" in text for text in warnings)
    grouped = {**MUON, "groups": [{"match": "0.*", **ADAMW}]}
    assert prepare(job(optimizer=grouped), Tied()).warnings == []


WITHOUT_BODY_0_BIAS = {**MUON, "groups": [{"match": "body.2.bias,*norm*,head*", **ADAMW}]}


def test_frozen_bias_is_allowed_until_it_is_unfrozen() -> None:
    for strategy in ("ring", "ps-sync"):
        run = train(job(strategy, 2, optimizer=WITHOUT_BODY_0_BIAS), Frozen)
        before = prepare(job(), Deep()).flat.model.get_parameter("body.0.bias")
        assert torch.equal(run.parameters()["body.0.bias"], before)
        with pytest.raises(SpecError, match=r"step 3: 'body.0.bias' has requires_grad=True"):
            train(job(strategy, 2, optimizer=WITHOUT_BODY_0_BIAS), Unfreezing)
        train(job(strategy, 2), Unfreezing)  # AdamW updates the bias


def error_of(optimizer: dict[str, Any], task_class: type[Small] = Deep) -> str:
    with pytest.raises(SpecError) as caught:
        prepare(job(optimizer=optimizer), task_class())
    return str(caught.value)


def test_parameter_that_is_not_a_matrix_is_rejected_by_name() -> None:
    assert error_of(MUON) == (
        "optimizer.name: Muon takes matrices, and 'body.0.bias' is [7] and 4 more\n"
        '  hint: put them into an earlier group: {match: "body.0.bias,body.2.bias,norm.weight,'
        'norm.bias,...", name: AdamW, lr: 3e-4}'
    )
    in_group = {**ADAMW, "groups": [{"match": "body.*", **MUON}]}
    assert error_of(in_group) == (
        "optimizer.groups.0.name: Muon takes matrices, and 'body.0.bias' is [7] and 1 more\n"
        '  hint: put them into an earlier group: {match: "body.0.bias,body.2.bias"}'
    )
    assert "'task:bend' is [3]\n" in error_of(RECIPE, DeepOwn)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"name": "AdamW"}, "optimizer.groups.0.lr: required where a group has a `name`: Muon's"),
        ({"name": "Muon", "lr": 1}, "optimizer.groups.0.name: is Muon, as the optimizer is"),
        ({"name": "Muom", "lr": 1}, "optimizer.groups.0.name: must be 'SGD', 'Adam', "),
        ({"name": "task", "lr": 1}, "optimizer.groups.0.name: must be 'SGD', 'Adam', "),
        (
            {"name": "AdamW", "lr": 1, "ns_steps": 3},
            "optimizer.groups.0.ns_steps: is no argument of AdamW",
        ),
        ({"betas": [0.9, 0.9]}, "optimizer.groups.0.betas: is no argument of Muon"),
        (
            {"name": "SGD", "lr": 1, "nesterov": True},
            "optimizer.groups.0.nesterov: needs momentum > 0",
        ),
    ],
)
def test_name_and_arguments_of_a_group_are_checked(group: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(optimizer={**MUON, "groups": [{"match": "*.bias", **group}]})
    assert str(caught.value).startswith(message)


def test_incompatible_options_are_rejected() -> None:
    mixed = {**ADAMW, "groups": [{"match": "body*", **MUON}]}
    with pytest.raises(SpecError, match="cannot measure a server's speed with AdamW and Muon"):
        job({"name": "ps-sync", "num_servers": 2, "split": "load"}, optimizer=mixed)
    with pytest.raises(SpecError, match="needs whole tensors, and `tensor: 2` cuts them"):
        job({"name": "hybrid", "tensor": 2, "tensor_plan": {"body": "column"}}, 2, optimizer=mixed)


def test_resume_rejects_another_assignment_of_optimizers() -> None:
    """An optimizer cannot use the state of another one; its arguments may change."""
    saved = {**saved_of(job(), "a", {}), "step": 2}
    changed = {**RECIPE, "groups": [{"match": REST, **ADAMW, "lr": 0.5, "weight_decay": 0}]}
    assert mismatches(saved, job(optimizer=changed)) == []
    for groups in ([{"match": f"{REST},*2*", **ADAMW}], [{"match": REST, "name": "SGD", "lr": 1}]):
        (problem,) = mismatches(saved, job(optimizer={**MUON, "groups": groups}))
        assert problem.where == ("optimizer", "groups")
    (problem,) = mismatches({**saved_of(job(optimizer=MUON), "a", {}), "step": 2}, job())
    assert problem.where == ("optimizer", "groups")
    (problem,) = mismatches(saved, job(optimizer=MUON))
    assert "the checkpoint was made with [{'match': " in problem.message


def test_job_file_round_trip_of_muon_with_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(
        "name: small\ntask: small:Small\nstrategy: ring\nsteps: 3\nglobal_batch_size: 8\n"
        "optimizer:\n  name: Muon\n  lr: 0.02\n"
        '  groups: [{match: "*.bias,*norm*,head*", name: AdamW, lr: 3e-4}]\n'
    )
    loaded = read_job(Path("job.yaml"))
    assert [variant.name for variant in loaded.optimizer.variants()] == ["Muon", "AdamW"]
    assert loaded.optimizer.variants()[1].weight_decay == 0.01  # AdamW's own default
    Path("again.yaml").write_text(render_job(loaded))
    assert read_job(Path("again.yaml")) == loaded


def test_promoted_backup_has_the_state_of_each_optimizer() -> None:
    """A primary dies between two steps; its backup has the state of Muon and AdamW."""
    strategy = {"name": "ps-sync", "num_servers": 2, "replication": 2}
    optimizer = {**MUON, "groups": [{"match": "*.bias", **ADAMW}]}
    config = job(strategy, optimizer=optimizer, lr_schedule={"name": "constant"})
    servers = Servers(with_timeouts(config, 10.0), make_strategy(config).roles(config))
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    other = deepcopy(model)
    flat = FlatModel(model, group_of=config.optimizer.group_of)
    shards = servers.shards(0, STEPS)
    shards.connect(flat)
    wait_for_backups(servers)
    weights = [p for p in other.parameters() if p.ndim == 2]
    optimizers = [
        torch.optim.Muon(weights, lr=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in other.parameters() if p.ndim == 1], lr=0.01),
    ]
    for step in range(STEPS):
        if step == 3:
            servers.nodes["server-0"].die("a test")
        for slot, parameter in zip(flat.slots, other.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape)
            slot.view(flat.grads).copy_(parameter.grad)
        shards.push(step, record_of(flat), task=step)
        for torch_optimizer in optimizers:
            torch_optimizer.step()
    for parameter, expected in zip(flat.parameters, other.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    servers.close()
