"""
Workers are lost under `data_strategy: ps-sync`; the others go on, to the same bits.

Servers of the parts know nothing of each other: those of one stage may have made a step that the
others have not. What is swept: in which operation a rank is lost, and who had come how far then.
"""

import time
from collections.abc import Callable, Set
from functools import cache
from typing import Any

import pytest
from hybrid_models import Normed
from hybrid_workers import WORLD, Workers, same, samples
from torch import Tensor

from distplat.actors.servers.shards import RemoteShards
from distplat.platform.errors import CollectiveError, StateLost
from distplat.strategies.fakes import Fabric
from distplat.strategies.loop.control import StepControl
from distplat.strategies.ports import Pushed

LOST_AT = 3


def workers_of(clip: float | None, servers: int = 1, **more: Any) -> Workers:
    options = {"data_strategy": "ps-sync", "num_servers": servers}
    return Workers(Normed, options=options, clip_norm=clip, **more)


@cache
def unfailed(clip: float | None) -> dict[str, Tensor]:
    model = workers_of(clip).attempt()
    assert model is not None
    return model


def goes_on(workers: Workers, lost: Set[int], clip: float | None, untold: int = 0) -> None:
    """Replace ranks, and compare what all come to; `untold`: samples whose report was lost."""
    for rank in lost:
        workers.renew(rank)
    model = workers.attempt()
    assert model is not None and same(model, unfailed(clip))
    assert min(workers.starts) == max(workers.starts), "no part is ahead of another"
    told = samples(workers, workers.job)
    assert [*map(max, told, [16, 16, 13] * 2)] == [16, 16, 13] * 2
    assert sum(told) >= 90 - untold, "each step is told of"


@pytest.mark.sweep(4)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("victim", [0, 3])
@pytest.mark.parametrize(
    ("group", "after"),
    [
        ("dp-", 16),  # in the average of running statistics
        ("world", 3),  # in the agreement that all have pushed
        ("world", 6),
        ("replica", 9),  # in a message between stages, or on the norm
        ("replica", 10),
    ],
)
def test_one_is_lost_at_any_operation(
    group: str, after: int, victim: int, clip: float | None
) -> None:
    workers, fabric = workers_of(clip), Fabric(WORLD)
    fabric.kill(victim, after=after, group=group)
    if workers.attempt(fabric) is not None:
        assert group == "replica", "without clipping there are fewer operations"
        return
    # A rank that is lost when the servers have its push takes its report with it.
    goes_on(workers, {victim}, clip, untold=8 if (victim, group, clip) == (3, "world", None) else 0)
    assert workers.starts[0] > 0, "survivors keep what they have"


def gone_before(
    workers: Workers, ranks: Set[int], call: str, *, others_first: bool
) -> Callable[[int, RemoteShards], RemoteShards]:
    """Have ranks stop before they push, or commit, a step; others of their replica are quicker."""

    def around(rank: int, shards: RemoteShards) -> RemoteShards:
        real = getattr(shards, call)

        def until_gone(step: int, *args: float) -> object:
            if step != LOST_AT:
                return real(step, *args)
            if others_first:
                wait_until_made(workers, 1 - workers.division.part_of(rank))
            raise CollectiveError("test", call, step, (rank,), "it is gone")

        if rank in ranks:
            setattr(shards, call, until_gone)
        return shards

    return around


def made_by(workers: Workers, part: int) -> int:
    """Count the steps that all servers of a part have made."""
    assert workers.servers is not None
    return min(service.store.version for service in workers.servers.shard_servers(part))


def wait_until_made(workers: Workers, part: int) -> None:
    """Return when servers of a part have made the step."""
    until = time.monotonic() + 20
    while made_by(workers, part) <= LOST_AT:
        assert time.monotonic() < until, "the other part makes the step"
        time.sleep(0.001)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("victim", range(WORLD))
def test_one_is_lost_before_its_push(victim: int, servers: int) -> None:
    """The other stage has made the step, and goes back to the version before."""
    workers = workers_of(None, servers)
    around = gone_before(workers, {victim}, "push", others_first=True)
    assert workers.attempt(Fabric(WORLD), around=around) is None
    goes_on(workers, {victim}, None)
    assert workers.starts == [LOST_AT] * WORLD


@pytest.mark.sweep(2)
@pytest.mark.parametrize("lost", [set(), {0}, {3}])
@pytest.mark.parametrize("stopped", [{0, 2}, {1, 3}])
def test_one_part_has_committed_and_the_other_not(stopped: set[int], lost: set[int]) -> None:
    """Both peers had pushed; the running statistics of the part that is ahead go back, too."""
    workers = workers_of(0.5)
    around = gone_before(workers, stopped, "commit", others_first=True)
    assert workers.attempt(Fabric(WORLD), around=around) is None
    goes_on(workers, lost, 0.5)
    assert workers.starts == [LOST_AT] * WORLD


@pytest.mark.parametrize("victim", [1, 2])
def test_a_step_that_all_parts_have_is_not_repeated(victim: int) -> None:
    """One rank is lost before its commit; its peer may have committed for both."""
    workers = workers_of(0.5)
    around = gone_before(workers, {victim}, "commit", others_first=True)
    assert workers.attempt(Fabric(WORLD), around=around) is None
    made = made_by(workers, victim % 2) > LOST_AT
    goes_on(workers, {victim}, 0.5, untold=8 if made else 0)
    assert workers.starts == [LOST_AT + made] * WORLD


def test_running_statistics_without_a_holder_are_lost() -> None:
    """The parameters are the servers', but buffers of a stage were its workers'."""
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
def test_another_is_lost_while_they_meet_again(stopped: set[int], after: int, group: str) -> None:
    """Who was ahead, who had pushed and who had not: none mistakes what its buffers are of."""
    workers, call = workers_of(0.5), "commit"
    if len(stopped) == WORLD:  # they do not hear that servers have made the step
        workers, call = workers_of(None), ""
    ahead = len(stopped) < WORLD
    around = gone_before(workers, stopped, call, others_first=True) if ahead else unheard
    assert workers.attempt(Fabric(WORLD), around=around) is None
    fabric = Fabric(WORLD)
    fabric.kill(3, after=after, group=group)
    assert workers.attempt(fabric) is None
    goes_on(workers, {3}, 0.5 if ahead else None, untold=16)


class Waiting(Fabric):
    """A rank does not come to the average of running statistics once the other part has moved."""

    def __init__(self, workers: Workers, victim: int) -> None:
        super().__init__(WORLD)
        self._workers, self._victim = workers, victim

    def start(
        self, group: str, operation: str, number: int, ranks: Any, me: int, gift: Any
    ) -> Callable[[], list[Tensor | None]]:
        if me == self._victim and "dp-" in group and number == 1:
            wait_until_made(self._workers, 1 - self._workers.division.part_of(me))
            raise CollectiveError(group, operation, number, (me,), "it is gone")
        return super().start(group, operation, number, ranks, me, gift)


@pytest.mark.parametrize(("first", "second"), [(0, 3), (1, 2)])
def test_a_step_that_one_part_makes_in_one_attempt_and_one_in_the_next(
    first: int, second: int
) -> None:
    """A rank whose part was ahead has gone back, and does not come to the step's end again."""
    workers = workers_of(None)
    around = gone_before(workers, {first}, "push", others_first=True)
    assert workers.attempt(Fabric(WORLD), around=around) is None
    assert workers.attempt(Waiting(workers, second)) is None
    goes_on(workers, {second}, None, untold=16)
    assert workers.starts == [LOST_AT + 1] * WORLD


def unheard(rank: int, shards: RemoteShards) -> RemoteShards:
    """Have a push be made, and its answer get lost."""
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
def test_a_lost_server_takes_all_back_to_the_checkpoint(part: int, servers: int) -> None:
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

    assert workers.attempt(Fabric(WORLD), around=around) is None
    assert [*workers.checkpoints] == [2]
    workers.start_over()
    model = workers.attempt(saved=workers.checkpoints[2])
    expected = workers_of(0.5, servers).attempt()
    assert model is not None and expected is not None and same(model, expected)
    assert workers.starts == [2] * WORLD


def test_servers_that_were_filled_with_a_first_model_are_no_state_to_go_on_from() -> None:
    """The run began from a checkpoint, and who had it was lost before servers had anything."""
    with pytest.raises(StateLost, match="after step 2"):
        workers_of(None).attempt(Fabric(WORLD), base=2)
