"""Muon for the matrices of hidden layers, another optimizer for the rest: by name, in groups."""

from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from control_records import record_of
from embedding_jobs import job as table_job
from grouped_task import BATCH, SAMPLES, STEPS, STRATEGIES, Own, Small, close
from grouped_task import job as grouped_job
from hybrid_models import Gpt, grid_of, hybrid_job, whole
from hybrid_workers import UntilOneIsLost
from local_run import LocalRun, impatient, train
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
"""The same by step: rates without rounding."""


class Deep(Small):
    """Two hidden matrices, of which servers may have one each."""

    def model(self) -> nn.Module:
        model: Any = super().model()
        model.body = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()
        return model  # type: ignore[no-any-return]


class DeepOwn(Own, Deep):
    pass


def job(strategy: Any = "ring", world: int = 1, **more: Any) -> Job:
    fields = {"optimizer": RECIPE, "lr_schedule": SCHEDULE, **more}
    return grouped_job(strategy, world, **fields)


def beside(named: dict[str, Any], rest: dict[str, Any] = ADAMW) -> list[torch.optim.Optimizer]:
    """Muon of torch, and another."""
    hidden = [p for n, p in named.items() if n.startswith("body") and p.ndim == 2]
    others = [p for p in named.values() if all(p is not one for one in hidden)]
    arguments = {k: v for k, v in rest.items() if k != "name"}
    return [
        torch.optim.Muon(hidden, lr=0.05, adjust_lr_fn="match_rms_adamw"),
        class_of(rest["name"])(others, **arguments),
    ]


def plain(
    kind: type[Small] = Deep, clip_norm: float | None = None, make: Any = beside
) -> dict[str, Tensor]:
    """The loop that a user would write."""
    task = kind()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    named: Any = dict(model.named_parameters())
    named |= {"task:bend": task.bend} if isinstance(task, Own) else {}
    optimizers = make(named)
    factor = lambda step: [*SCALES, 0.0][step]  # noqa: E731
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in optimizers]
    sampler = Sampler(SAMPLES, BATCH, 1, seed=5)
    for step in range(STEPS):
        inputs, targets = zip(*(data[int(i)] for i in sampler.batch_ids(step)), strict=True)
        for one in named.values():
            one.grad = None
        loss: Any = task.loss(model(torch.stack(inputs)), torch.stack(targets))
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([*named.values()], clip_norm)
        for one, schedule in zip(optimizers, schedules, strict=True):
            one.step()
            schedule.step()
    return {name: value.detach().clone() for name, value in named.items()}


def state_of(run: LocalRun, rank: int = 0) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in run.ranks[rank].prepared.flat.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


ALONE: dict[str, Any] = {
    "ring": "ring",
    "sharded": {"name": "ring", "shard_optimizer": True},
    "ps-sync-3-servers": {"name": "ps-sync", "num_servers": 3},
    "ps-sync-more-servers-than-tensors": {"name": "ps-sync", "num_servers": 12},
    "ps-sync-kept-twice": {"name": "ps-sync", "num_servers": 2, "replication": 2},
    "ps-async": {"name": "ps-async", "num_servers": 2},
    "hybrid": "hybrid",
}


@pytest.mark.parametrize("name", ALONE)
def test_with_one_worker_a_run_has_the_bits_of_a_plain_loop(name: str) -> None:
    same(state_of(train(job(ALONE[name]), Deep)), plain())


@pytest.mark.sweep(2)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("name", STRATEGIES)
def test_with_several_it_is_near(name: str, clip_norm: float | None) -> None:
    """Other sums of gradients, which Muon rounds to bfloat16."""
    run = train(job(*STRATEGIES[name], clip_norm=clip_norm), Deep)
    close(state_of(run), plain(clip_norm=clip_norm), 1e-3)
    for rank in range(1, STRATEGIES[name][1]):
        same(state_of(run, rank), state_of(run))


def test_parameters_of_the_task_too() -> None:
    rule = {**MUON, "groups": [{"match": f"{REST}, task:*", **ADAMW}]}
    for strategy in ("ring", {"name": "ps-sync", "num_servers": 2}):
        same(state_of(train(job(strategy, optimizer=rule), DeepOwn)), plain(DeepOwn))


def test_it_is_verified_with_the_sums_of_the_ranks() -> None:
    of = job(*STRATEGIES["ps-sync-3-servers"], steps=4, task="a:A")
    of = of.model_copy(update={"checkpoint": CheckpointConfig(every_steps=1, num_to_keep=9)})
    assert {row.verdict for row in rows(Deep, of).values()} == {EQUAL}


RULES = [
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
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["name"])
def test_any_rule_may_stand_beside_it(rule: dict[str, Any]) -> None:
    """In a group, or with Muon in one; from a checkpoint on it has the same bits."""
    groups = [{"match": REST, **rule}]
    strategy = {"name": "ps-sync", "num_servers": 2}
    run = train(job(optimizer={**MUON, "groups": groups}, checkpoint={"every_steps": 3}), Deep)
    same(state_of(run), plain(make=partial(beside, rest=rule)))
    swapped = {**rule, "groups": [{"match": "body.?.weight", **MUON}]}
    of = job(strategy, optimizer=swapped, checkpoint={"every_steps": 3})
    other = train(of, Deep)
    same(state_of(other), plain(make=partial(beside, rest=rule)))
    same(
        state_of(train(of, Deep, saved=other.checkpoints[3])),
        plain(make=partial(beside, rest=rule)),
    )


def test_two_groups_may_name_the_same_rule() -> None:
    two = [{"match": "head.*", **ADAMW}, {"match": "*.bias, *norm*", **ADAMW}]
    same(state_of(train(job(optimizer={**MUON, "groups": two}), Deep)), plain())
    other = [two[0], {**two[1], "lr": 0.02, "weight_decay": 0.5}]
    found = state_of(train(job(optimizer={**MUON, "groups": other}), Deep))
    assert not torch.equal(found["norm.weight"], plain()["norm.weight"])


@pytest.mark.parametrize("name", ["ring-2", "sharded", "ps-sync-3-servers", "ps-async"])
def test_two_that_look_at_elements_may_stand_side_by_side(name: str) -> None:
    """Where none looks at tensors, either."""
    sgd = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    groups = [{"match": "head*", **sgd}]

    def two(named: dict[str, Any]) -> list[torch.optim.Optimizer]:
        head = [p for n, p in named.items() if n.startswith("head")]
        rest = [p for n, p in named.items() if not n.startswith("head")]
        return [torch.optim.AdamW(rest, lr=0.01), torch.optim.SGD(head, lr=0.1, momentum=0.9)]

    run = train(job(*STRATEGIES[name], optimizer={**ADAMW, "groups": groups}), Small)
    close(state_of(run), plain(Small, make=two))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["name"])
def test_what_has_loaded_nothing_is_as_new(rule: dict[str, Any]) -> None:
    of = job(optimizer={**MUON, "groups": [{"match": "bias", **rule}]}).optimizer
    model = nn.Linear(4, 3)
    flat = FlatModel(model, group_of=of.group_of)
    made = TensorOptimizer(of, flat.params, flat.grads, flat.layout)
    before, found = flat.params.clone(), []
    flat.grads.fill_(0.5)
    for _ in range(2):
        assert made.state() == {}
        flat.params.copy_(before)
        made.step(of.rates())
        made.step(of.rates())
        assert made.state_bytes > 0
        found.append(flat.params.clone())
        made.load({})
    assert torch.equal(*found) and not torch.equal(found[0], before)


def test_a_bare_group_keeps_parameters_from_a_later_one() -> None:
    groups = [{"match": "*.bias"}, {"match": "body.*", **MUON}]
    same(state_of(train(job(optimizer={**ADAMW, "groups": groups}), Deep)), plain())
    with pytest.raises(SpecError, match=r"groups\.1: changes nothing"):
        job(optimizer={**ADAMW, "groups": groups[::-1]})


def test_rates_of_its_groups_are_reported() -> None:
    run = train(job(), Deep)
    figures = [one.figures for one in run.reports[0] if hasattr(one, "figures")]
    steps = [one for one in figures if "lr" in one]
    assert [one["lr"] for one in steps] == [0.05 * scale for scale in SCALES]
    assert [one["lr_group_0"] for one in steps] == [0.01 * scale for scale in SCALES]


class WideGpt(Gpt):
    def model(self) -> nn.Module:
        return super().model().double()


def test_stages_of_a_model() -> None:
    """Each has the optimizers of its own parameters."""
    names = [n for n, p in WideGpt().model().named_parameters() if p.ndim == 2]
    groups = [{"match": ",".join(names[1:-1]), **MUON}]
    fields = {"optimizer": {**ADAMW, "groups": groups}}
    grid, workers = grid_of(2, 1, 1)
    cut = whole(train(hybrid_job(grid, workers, **fields), WideGpt))
    one = train(hybrid_job({}, 1, **fields), WideGpt).parameters()
    start = train(hybrid_job({}, 1, **fields, steps=1), WideGpt).parameters()
    assert max(float((cut[name] - one[name]).abs().max()) for name in one) < 1e-3
    assert max(float((start[name] - one[name]).abs().max()) for name in one) > 2e-2


SAVES = ["ring-2", "sharded", "ps-sync-3-servers", "ps-sync-kept-twice", "hybrid-servers"]


MOVES = [
    ("ring-2", "ps-sync-3-servers"),
    ("ps-sync-3-servers", "ring-2"),
    ("ps-sync-3-servers", "ps-sync-kept-twice"),
    ("sharded", "hybrid-servers"),
    ("hybrid-servers", "sharded"),
]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("name", "to"), [*zip(SAVES, SAVES, strict=True), *MOVES])
def test_it_goes_on_from_a_checkpoint_under_any_strategy(name: str, to: str) -> None:
    unfailed = train(job(*STRATEGIES[name], checkpoint={"every_steps": 2}), Deep)
    resumed = train(job(*STRATEGIES[to]), Deep, saved=unfailed.checkpoints[2])
    if name == to:
        same(resumed.parameters(), unfailed.parameters())
    close(resumed.parameters(), unfailed.parameters(), 1e-3)


def test_a_checkpoint_keeps_what_each_rule_remembers() -> None:
    saved = train(job(checkpoint={"every_steps": 2}), Deep).checkpoints[2]
    kinds = Counter(key.split("/")[1] for key in saved.file("optimizer"))
    assert kinds == {"momentum_buffer": 2, "step": 6, "exp_avg": 6, "exp_avg_sq": 6}


def test_the_average_goes_through_checkpoints_too() -> None:
    of = job(*STRATEGIES["ps-sync-3-servers"], checkpoint={"every_steps": 2}, ema={"decay": 0.5})
    unfailed = train(of, Deep)
    resumed = train(of, Deep, saved=unfailed.checkpoints[2])
    assert "ema:head.weight" in unfailed.trained[0]
    same(resumed.trained[0], unfailed.trained[0])


def test_a_lost_worker_leaves_no_trace() -> None:
    of = job("ring", 3)
    run, fabric = LocalRun(of, Deep), Fabric(3)
    fabric.kill(1, after=12)
    assert not UntilOneIsLost(run, fabric).make()
    run.renew(1)
    attempt = UntilOneIsLost(run)
    assert attempt.make()
    assert min(attempt.starts) > 1
    run.close()
    unfailed = state_of(train(of, Deep))
    for rank in range(3):
        same(state_of(run, rank), unfailed)


def test_embedding_tables_stand_beside_it() -> None:
    """A single dense matrix; servers of parameters and of rows, and none."""
    rule = {"name": "Muon", "lr": 0.1, "groups": [{"match": "head.bias", "name": "SGD", "lr": 0.5}]}
    ring = train(table_job(Words, 2, optimizer=rule), Words)
    servers = train(
        table_job(Words, 2, optimizer=rule, strategy={"name": "ps-sync", "num_servers": 2}), Words
    )
    close(ring.parameters(), servers.parameters(), 1e-2)
    for number in range(2):
        both = [torch.from_numpy(table_rows(run.tables, number, ROWS)) for run in (ring, servers)]
        torch.testing.assert_close(*both, rtol=1e-2, atol=1e-2, equal_nan=True)


class Frozen(Deep):
    """A bias that is frozen: nobody updates it, so it may be in Muon's hands."""

    unfreezes_in: int | None = None

    def model(self) -> nn.Module:
        model: Any = super().model()
        bias, made = model.body[0].bias, []
        bias.requires_grad_(False)

        def unfreeze(*given: Any) -> None:
            made.append(1)
            bias.requires_grad_(len(made) == self.unfreezes_in)

        model.register_forward_pre_hook(unfreeze)
        return model  # type: ignore[no-any-return]


class Unfreezing(Frozen):
    unfreezes_in = 3


class Tied(Small):
    """A table, and a head with the same weight."""

    def model(self) -> nn.Module:
        table, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        head.weight = table.weight
        return nn.Sequential(table, nn.Linear(4, 4, bias=False), head)


def test_a_table_that_muon_would_update_is_warned_of() -> None:
    found = prepare(job(optimizer=MUON), Tied()).warnings
    assert any("Muon updates '0.weight', rows of an embedding" in one for one in found)
    kept = {**MUON, "groups": [{"match": "0.*", **ADAMW}]}
    assert prepare(job(optimizer=kept), Tied()).warnings == []


NOT_OF_BODY_0 = {**MUON, "groups": [{"match": "body.2.bias,*norm*,head*", **ADAMW}]}


def test_what_is_frozen_needs_no_rule_and_may_not_be_unfrozen_into_one() -> None:
    for strategy in ("ring", "ps-sync"):
        run = train(job(strategy, 2, optimizer=NOT_OF_BODY_0), Frozen)
        before = prepare(job(), Deep()).flat.model.get_parameter("body.0.bias")
        assert torch.equal(run.parameters()["body.0.bias"], before)
        with pytest.raises(SpecError, match=r"step 3: 'body.0.bias' has requires_grad=True"):
            train(job(strategy, 2, optimizer=NOT_OF_BODY_0), Unfreezing)
        train(job(strategy, 2), Unfreezing)  # AdamW takes it


def refused(rule: dict[str, Any], kind: type[Small] = Deep) -> str:
    with pytest.raises(SpecError) as caught:
        prepare(job(optimizer=rule), kind())
    return str(caught.value)


def test_a_parameter_that_is_no_matrix_is_refused_by_name() -> None:
    assert refused(MUON) == (
        "optimizer.name: Muon takes matrices, and 'body.0.bias' is [7] and 4 more\n"
        '  hint: put them into an earlier group: {match: "body.0.bias,body.2.bias,norm.weight,'
        'norm.bias,...", name: AdamW, lr: 3e-4}'
    )
    in_group = {**ADAMW, "groups": [{"match": "body.*", **MUON}]}
    assert refused(in_group) == (
        "optimizer.groups.0.name: Muon takes matrices, and 'body.0.bias' is [7] and 1 more\n"
        '  hint: put them into an earlier group: {match: "body.0.bias,body.2.bias"}'
    )
    assert "'task:bend' is [3]\n" in refused(RECIPE, DeepOwn)


@pytest.mark.parametrize(
    ("group", "said"),
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
def test_a_groups_name_is_checked_with_its_arguments(group: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(optimizer={**MUON, "groups": [{"match": "*.bias", **group}]})
    assert str(caught.value).startswith(said)


def test_strategies_that_cannot_have_it_say_so() -> None:
    mixed = {**ADAMW, "groups": [{"match": "body*", **MUON}]}
    with pytest.raises(SpecError, match="cannot measure a server's speed with AdamW and Muon"):
        job({"name": "ps-sync", "num_servers": 2, "split": "load"}, optimizer=mixed)
    with pytest.raises(SpecError, match="needs whole tensors, and `tensor: 2` cuts them"):
        job({"name": "hybrid", "tensor": 2, "tensor_plan": {"body": "column"}}, 2, optimizer=mixed)


def test_who_updates_what_stays_where_a_run_goes_on() -> None:
    """A rule could do nothing with what another has remembered; its arguments may change."""
    had = {**saved_of(job(), "a", {}), "step": 2}
    changed = {**RECIPE, "groups": [{"match": REST, **ADAMW, "lr": 0.5, "weight_decay": 0}]}
    assert mismatches(had, job(optimizer=changed)) == []
    for groups in ([{"match": f"{REST},*2*", **ADAMW}], [{"match": REST, "name": "SGD", "lr": 1}]):
        (problem,) = mismatches(had, job(optimizer={**MUON, "groups": groups}))
        assert problem.where == ("optimizer", "groups")
    (problem,) = mismatches({**saved_of(job(optimizer=MUON), "a", {}), "step": 2}, job())
    assert problem.where == ("optimizer", "groups")
    (problem,) = mismatches(had, job(optimizer=MUON))
    assert "the checkpoint was made with [{'match': " in problem.message


def test_a_job_file_says_it_in_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(
        "name: small\ntask: small:Small\nstrategy: ring\nsteps: 3\nglobal_batch_size: 8\n"
        "optimizer:\n  name: Muon\n  lr: 0.02\n"
        '  groups: [{match: "*.bias,*norm*,head*", name: AdamW, lr: 3e-4}]\n'
    )
    read = read_job(Path("job.yaml"))
    assert [one.name for one in read.optimizer.variants()] == ["Muon", "AdamW"]
    assert read.optimizer.variants()[1].weight_decay == 0.01  # AdamW's own default
    Path("again.yaml").write_text(render_job(read))
    assert read_job(Path("again.yaml")) == read


def test_a_promoted_backup_goes_on_with_what_each_rule_remembers() -> None:
    """A primary dies between two steps; its backup has Muon's and AdamW's memory of its shard."""
    strategy = {"name": "ps-sync", "num_servers": 2, "replication": 2}
    rule = {**MUON, "groups": [{"match": "*.bias", **ADAMW}]}
    of = job(strategy, optimizer=rule, lr_schedule={"name": "constant"})
    servers = Servers(impatient(of, 10.0), make_strategy(of).roles(of))
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    other = deepcopy(model)
    flat = FlatModel(model, group_of=of.optimizer.group_of)
    shards = servers.shards(0, STEPS)
    shards.connect(flat)
    wait_for_backups(servers)
    weights = [one for one in other.parameters() if one.ndim == 2]
    optimizers = [
        torch.optim.Muon(weights, lr=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([one for one in other.parameters() if one.ndim == 1], lr=0.01),
    ]
    for step in range(STEPS):
        if step == 3:
            servers.nodes["server-0"].die("a test")
        for slot, one in zip(flat.slots, other.parameters(), strict=True):
            one.grad = torch.randn(one.shape)
            slot.view(flat.grads).copy_(one.grad)
        shards.push(step, record_of(flat), task=step)
        for made in optimizers:
            made.step()
    for one, its in zip(flat.parameters, other.parameters(), strict=True):
        assert torch.equal(one, its)
    servers.close()
