"""
Workers are lost under `data_strategy: ps-sync`; the recovered run is bit-identical.

The servers of different stages are independent: one stage may have applied a step that another has
not. The sweep covers the operation at which a rank is lost and the progress of the other ranks.
"""

import time
from collections.abc import Callable, Set
from functools import cache
from typing import Any

import pytest
from hybrid_models import Normed
from hybrid_workers import WORLD, Workers, same_tensors, samples_per_step
from torch import Tensor

from distplat.actors.servers.shards import RemoteShards
from distplat.platform.errors import CollectiveError, StateLost
from distplat.strategies.fakes import Fabric
from distplat.strategies.loop.control import StepControl
from distplat.strategies.ports import Pushed

LOST_AT = 3


def workers_of(clip: float | None, servers: int = 1, **fields: Any) -> Workers:
    options = {"data_strategy": "ps-sync", "num_servers": servers}
    return Workers(Normed, options=options, clip_norm=clip, **fields)


@cache
def uninterrupted(clip: float | None) -> dict[str, Tensor]:
    model = workers_of(clip).attempt()
    assert model is not None
    return model


def recover_and_compare(
    workers: Workers, lost: Set[int], clip: float | None, unreported: int = 0
) -> None:
    """Replace ranks and compare the result; `unreported`: samples whose report was lost."""
    for rank in lost:
        workers.renew(rank)
    model = workers.attempt()
    assert model is not None and same_tensors(model, uninterrupted(clip))
    assert min(workers.starts) == max(workers.starts), "all stages start at the same step"
    samples_by_step = samples_per_step(workers, workers.job)
    assert [*map(max, samples_by_step, [16, 16, 13] * 2)] == [16, 16, 13] * 2
    assert sum(samples_by_step) >= 90 - unreported, "each step is reported"


@pytest.mark.sweep(8)
@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize(
    ("group", "after", "clip"),
    [
        *(("dp-", 16, clip) for clip in (None, 0.5)),  # in the average of running statistics
        *(("world", 3, clip) for clip in (None, 0.5)),  # in the agreement that all have pushed
        *(("world", 6, clip) for clip in (None, 0.5)),
        ("replica", 2, 0.5),  # on the gradient norm
        ("replica", 5, 0.5),
    ],
)
def test_rank_lost_at_any_operation(
    group: str, after: int, victim: int, clip: float | None
) -> None:
    workers, fabric = workers_of(clip), Fabric(WORLD)
    fabric.kill(victim, after=after, group=group)
    assert workers.attempt(fabric) is None, "the rank is not killed"
    # The report of a rank is lost with it, even if the servers have its push.
    recover_and_compare(
        workers, {victim}, clip, unreported=8 if (victim, group, clip) == (3, "world", None) else 0
    )
    assert workers.starts[0] > 0, "survivors keep their state"


@pytest.mark.sweep(4)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize("after", [13, 16])
def test_rank_lost_at_a_message_between_stages(after: int, victim: int, clip: float | None) -> None:
    workers, fabric = workers_of(clip), Fabric(WORLD)
    fabric.kill_at_message(victim, after=after)
    assert workers.attempt(fabric) is None, "the rank is not killed"
    recover_and_compare(workers, {victim}, clip)
    assert workers.starts[0] > 0, "survivors keep their state"


def lost_before(
    workers: Workers, ranks: Set[int], call: str, *, others_first: bool
) -> Callable[[int, RemoteShards], RemoteShards]:
    """Stop ranks before they push or commit a step, optionally after the other stage has it."""

    def around(rank: int, shards: RemoteShards) -> RemoteShards:
        real = getattr(shards, call)

        def call_or_fail(step: int, *args: float) -> object:
            if step != LOST_AT:
                return real(step, *args)
            if others_first:
                wait_until_applied(workers, 1 - workers.division.part_of(rank))
            raise CollectiveError("test", call, step, (rank,), "the rank is lost")

        if rank in ranks:
            setattr(shards, call, call_or_fail)
        return shards

    return around


def steps_applied_by(workers: Workers, part: int) -> int:
    """Return the number of steps that all servers of a stage have applied."""
    assert workers.servers is not None
    return min(service.store.version for service in workers.servers.shard_servers(part))


def wait_until_applied(workers: Workers, part: int) -> None:
    """Wait until the servers of a stage have applied step LOST_AT."""
    deadline = time.monotonic() + 20
    while steps_applied_by(workers, part) <= LOST_AT:
        assert time.monotonic() < deadline, "the other stage applies the step"
        time.sleep(0.001)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("victim", range(WORLD))
def test_rank_lost_before_its_push(victim: int, servers: int) -> None:
    """The other stage has applied the step and returns to the previous version."""
    workers = workers_of(None, servers)
    around = lost_before(workers, {victim}, "push", others_first=True)
    assert workers.attempt(Fabric(WORLD), wrap_shards=around) is None
    recover_and_compare(workers, {victim}, None)
    assert workers.starts == [LOST_AT] * WORLD


@pytest.mark.sweep(2)
@pytest.mark.parametrize("lost", [set(), {0}, {3}])
@pytest.mark.parametrize("stopped", [{0, 2}, {1, 3}])
def test_ranks_stopped_before_commit_of_one_stage(stopped: set[int], lost: set[int]) -> None:
    """Both peers had pushed; the running statistics of the stage ahead are restored, too."""
    workers = workers_of(0.5)
    around = lost_before(workers, stopped, "commit", others_first=True)
    assert workers.attempt(Fabric(WORLD), wrap_shards=around) is None
    recover_and_compare(workers, lost, 0.5)
    assert workers.starts == [LOST_AT] * WORLD


@pytest.mark.parametrize("victim", [1, 2])
def test_step_applied_by_all_stages_is_not_repeated(victim: int) -> None:
    """One rank is lost before its commit; its peer may have committed for both."""
    workers = workers_of(0.5)
    around = lost_before(workers, {victim}, "commit", others_first=True)
    assert workers.attempt(Fabric(WORLD), wrap_shards=around) is None
    is_applied = steps_applied_by(workers, victim % 2) > LOST_AT
    recover_and_compare(workers, {victim}, 0.5, unreported=8 if is_applied else 0)
    assert workers.starts == [LOST_AT + is_applied] * WORLD


def test_losing_both_peers_of_a_stage_loses_the_buffers() -> None:
    """Servers hold the parameters, but only workers hold the buffers of a stage."""
    workers, fabric = workers_of(None), Fabric(WORLD)
    fabric.kill(1, after=6, group="world")
    assert workers.attempt(fabric) is None
    for rank in (1, 3):
        workers.renew(rank)
    with pytest.raises(StateLost, match="buffers"):
        workers.attempt(Fabric(WORLD))


@pytest.mark.sweep(6)
@pytest.mark.parametrize("group", ["world", "dp-"])
@pytest.mark.parametrize("after", range(3))
@pytest.mark.parametrize("stopped", [{0, 2}, {1}, {0, 1, 2, 3}])
def test_second_rank_lost_during_recovery(stopped: set[int], after: int, group: str) -> None:
    """Each rank must know the version of its buffers, whatever its progress."""
    workers, call = workers_of(0.5), "commit"
    if len(stopped) == WORLD:  # no rank receives the answer of the servers
        workers, call = workers_of(None), ""
    ahead = len(stopped) < WORLD
    around = lost_before(workers, stopped, call, others_first=True) if ahead else lose_answer
    assert workers.attempt(Fabric(WORLD), wrap_shards=around) is None
    fabric = Fabric(WORLD)
    fabric.kill(3, after=after, group=group)
    assert workers.attempt(fabric) is None
    recover_and_compare(workers, {3}, 0.5 if ahead else None, unreported=16)


class LosesRank(Fabric):
    """The victim is lost before the average of running statistics, once the other stage moved."""

    def __init__(self, workers: Workers, victim: int) -> None:
        super().__init__(WORLD)
        self._workers, self._victim = workers, victim

    def start(
        self, group: str, operation: str, number: int, ranks: Any, me: int, gift: Any
    ) -> Callable[[], list[Tensor | None]]:
        if me == self._victim and "dp-" in group and number == 1:
            wait_until_applied(self._workers, 1 - self._workers.division.part_of(me))
            raise CollectiveError(group, operation, number, (me,), "the rank is lost")
        return super().start(group, operation, number, ranks, me, gift)


@pytest.mark.parametrize(("first", "second"), [(0, 3), (1, 2)])
def test_stages_apply_a_step_in_different_attempts(first: int, second: int) -> None:
    """A rank of the stage ahead has returned to the previous version; it is lost again."""
    workers = workers_of(None)
    around = lost_before(workers, {first}, "push", others_first=True)
    assert workers.attempt(Fabric(WORLD), wrap_shards=around) is None
    assert workers.attempt(LosesRank(workers, second)) is None
    recover_and_compare(workers, {second}, None, unreported=16)
    assert workers.starts == [LOST_AT + 1] * WORLD


def lose_answer(rank: int, shards: RemoteShards) -> RemoteShards:
    """Let a push be applied, and lose its answer."""
    real = shards.push

    def push(step: int, control: StepControl) -> Pushed:
        answer = real(step, control)
        if step == LOST_AT:
            raise CollectiveError("test", "push", step, (rank,), "the answer is lost")
        return answer

    setattr(shards, "push", push)  # noqa: B010
    return shards


@pytest.mark.sweep(3)
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("part", [0, 1])
def test_lost_server_restarts_from_the_checkpoint(part: int, servers: int) -> None:
    workers = workers_of(0.5, servers, checkpoint={"every_steps": 2})

    def around(rank: int, shards: RemoteShards) -> RemoteShards:
        real = shards.commit

        def commit(step: int, norm: float) -> None:
            if (rank, step) == (part, LOST_AT):
                assert workers.servers is not None
                workers.servers.nodes[f"server-{part * servers}"].die("killed by the test")
            real(step, norm)

        setattr(shards, "commit", commit)  # noqa: B010
        return shards

    assert workers.attempt(Fabric(WORLD), wrap_shards=around) is None
    assert [*workers.checkpoints] == [2]
    workers.start_over()
    model = workers.attempt(saved=workers.checkpoints[2])
    expected = workers_of(0.5, servers).attempt()
    assert model is not None and expected is not None and same_tensors(model, expected)
    assert workers.starts == [2] * WORLD


def test_servers_with_initial_weights_cannot_resume_from_a_checkpoint() -> None:
    """The ranks that loaded the checkpoint were lost before the servers had its state."""
    with pytest.raises(StateLost, match="after step 2"):
        workers_of(None).attempt(Fabric(WORLD), base=2)
