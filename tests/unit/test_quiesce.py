"""How workers are stopped: all before the same step, whenever they hear of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.errors import Abandoned, ActorLost
from distplat.platform.job import Event, Failed, Heard, JobState, Phase, Resize, Tick
from distplat.platform.quiesce import Agreement, Next, Resting, Stop, how_to_stop
from distplat.platform.recovery import Policy, Restart
from distplat.platform.spec import Failure


@pytest.mark.parametrize(
    ("failed", "agreed", "how"),
    [
        (False, None, Stop.REST),
        (False, 0, Stop.REST_AT),
        (False, 7, Stop.REST_AT),
        (True, None, Stop.ABANDON),
        (True, 7, Stop.ABANDON),
    ],
)
def test_how_workers_are_stopped(failed: bool, agreed: int | None, how: Stop) -> None:
    assert how_to_stop(failed, agreed) is how


def test_a_later_way_to_stop_goes_further() -> None:
    assert Stop.REST < Stop.REST_AT < Stop.ABANDON


@pytest.mark.parametrize(
    ("answers", "agreed"),
    [
        ([], None),
        ([(0, 5), (1, 6)], None),
        ([(0, 5), (1, 6), (2, None)], None),
        ([(0, 5), (1, 6), (2, 5)], 6),
        ([(2, 0), (1, 0), (0, 0)], 0),
        ([(2, None), (0, 5), (1, 5), (2, 5)], 5),
        ([(0, 5), (1, 6), (0, 7), (2, 5), (2, 8)], 6),  # told again once it has gone on
    ],
)
def test_all_stop_before_the_first_step_that_nobody_has_begun(
    answers: list[tuple[int, int | None]], agreed: int | None
) -> None:
    agreement = Agreement()
    for rank, step in answers:
        agreement.answered(rank, step)
    assert agreement.step(range(3)) == agreed


def test_who_has_not_answered_is_known() -> None:
    agreement = Agreement()
    agreement.answered(1, 0)
    agreement.answered(2, None)
    assert agreement.missing(range(3)) == {0, 2}


Act = Callable[[Resting], object]


def asks(r: Resting) -> None:
    r.rest()


def starts(r: Resting) -> None:
    r.start(5)


def at(step: int, what: Next) -> Act:
    def act(r: Resting) -> None:
        assert r.before(step) is what

    return act


def told(step: int) -> Act:
    return lambda r: r.rest_at(step)


def told_to_end(step: int) -> Act:
    return lambda r: r.end_at(step)


BEGIN, WAIT, STOP, END = Next.BEGIN, Next.WAIT, Next.STOP, Next.END


@pytest.mark.parametrize(
    ("acts", "answer"),
    [
        ([], None),
        ([starts, at(5, BEGIN), at(6, BEGIN)], None),  # nobody asks
        ([asks], None),  # its first step is not known
        ([asks, starts], 5),
        ([starts, asks], 5),
        ([asks, at(5, WAIT), at(5, WAIT)], 5),
        ([starts, at(5, BEGIN), asks], 6),  # in step 5
        ([at(5, BEGIN), asks, at(6, WAIT)], 6),
        ([at(5, BEGIN), asks, at(6, WAIT), told(6), at(6, STOP)], 6),
        ([at(5, BEGIN), asks, told(7), at(6, BEGIN)], 7),
        ([at(5, BEGIN), asks, told(7), at(6, BEGIN), at(7, STOP)], 7),
        ([asks, starts, told(5), at(5, STOP)], 5),
        ([asks, starts, told_to_end(5), at(5, END)], 5),
        ([at(5, BEGIN), asks, told_to_end(7), at(6, BEGIN), at(7, END)], 7),
    ],
)
def test_what_a_worker_is_to_do_before_a_step(acts: list[Act], answer: int | None) -> None:
    resting = Resting()
    for act in acts:
        act(resting)
    assert resting.answer == answer


@dataclass
class Simulated:
    """A worker; a step ends when enough workers have begun it."""

    resting: Resting = field(default_factory=Resting)
    step: int = 0
    """The next one, or the one under way."""
    begun: list[int] = field(default_factory=list)
    stopped: bool = False

    @property
    def within(self) -> bool:
        return bool(self.begun) and self.begun[-1] == self.step


class World:
    """
    Workers in step, a controller that calls them off, and messages on their way.

    Args:
        workers: how many.
        steps: of the run.
        backup: a step is made without so many of them.
    """

    def __init__(self, workers: int, steps: int, backup: int) -> None:
        self.steps, self.enough = steps, workers - backup
        self.workers = [Simulated() for _ in range(workers)]
        self.agreement, self.asked = Agreement(), False

    @property
    def agreed(self) -> int | None:
        return self.agreement.step(range(len(self.workers)))

    def go(self, rank: int) -> None:
        """Let a worker begin a step or end one, if it can."""
        worker = self.workers[rank]
        if worker.stopped or worker.step == self.steps:
            return
        if worker.within:
            begun = sum(worker.step in other.begun for other in self.workers)
            worker.step += begun >= self.enough
            return
        what = worker.resting.before(worker.step)
        worker.stopped = what is STOP
        if what is BEGIN:
            worker.begun.append(worker.step)

    def hear(self, rank: int) -> None:
        """Let what the controller says reach a worker."""
        if self.agreed is not None:
            self.workers[rank].resting.rest_at(self.agreed)
        elif self.asked:
            self.workers[rank].resting.rest()

    def ask(self, rank: int) -> None:
        """Let the controller hear of a worker."""
        self.agreement.answered(rank, self.workers[rank].resting.answer)

    def settle(self) -> None:
        """Let everything come to pass that can."""
        self.asked = True
        for _ in range(2 * self.steps + 5):
            for rank in range(len(self.workers)):
                self.hear(rank)
                self.ask(rank)
                self.go(rank)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2), st.integers(0, 40), st.data())
def test_all_stop_before_the_same_step_whenever_they_hear_of_it(
    workers: int, steps: int, backup: int, told_after: int, data: st.DataObject
) -> None:
    world = World(workers, steps, min(backup, workers - 1))
    acts = st.tuples(st.sampled_from(["go", "hear", "ask"]), st.integers(0, workers - 1))
    for number, (act, rank) in enumerate(data.draw(st.lists(acts, max_size=120))):
        world.asked = world.asked or number >= told_after
        getattr(world, act)(rank)
    agreed_before = world.agreed
    world.settle()
    agreed = world.agreed
    assert agreed is not None and agreed_before in (None, agreed)
    for worker in world.workers:
        assert worker.step == agreed, "somebody waits for ever, or has gone too far"
        assert worker.begun == list(range(agreed)), "all begin all steps before, and no other"
        assert worker.stopped is (agreed < steps), "or the run has come to its end"


LIMITS = Failure(start_timeout_s=60, step_timeout_s=20, heartbeat_timeout_s=10)


class Run(World):
    """The same with all that the controller decides, and a worker that may be lost."""

    def __init__(self, workers: int, steps: int, backup: int) -> None:
        super().__init__(workers, steps, backup)
        self.state = JobState(workers, LIMITS, 0.0, Policy(1, survivors_go_on=True))
        self.lost: int | None = None
        for rank in range(workers):
            self.state.handle(Heard(rank, 1, 0, False), 0.0)

    @property
    def agreed(self) -> int | None:
        return self.state.agreed

    def resize(self) -> None:
        runs = self.state.phase is Phase.RUNNING  # else it has other cares
        self.state.handle(Resize(5), 0.0)
        self.asked |= runs and self.state.phase is Phase.SETTLING

    def go(self, rank: int) -> None:
        if rank != self.lost:
            super().go(rank)

    def hear(self, rank: int) -> None:
        if self.state.error is None:
            super().hear(rank)
        else:
            self.workers[rank].stopped |= self.workers[rank].step < self.steps

    def ask(self, rank: int) -> None:
        name, worker = f"worker-{rank}", self.workers[rank]
        events: list[Event] = []
        if rank == self.lost:
            events.append(Failed(name, ActorLost(name, None, "killed"), gone=True))
        else:
            done = worker.step == self.steps
            events.append(Heard(rank, 1 + worker.step, worker.step, done, worker.resting.answer))
            events += [Failed(name, Abandoned("as it was told"))] if worker.stopped else []
        for event in events:
            self.state.handle(event, 0.0)

    def settle(self) -> None:
        self.resize()
        for _ in range(2 * self.steps + 5):
            for rank in range(len(self.workers)):
                self.hear(rank)
                self.go(rank)
                self.ask(rank)
        self.state.handle(Tick(), 0.0)


@given(
    st.integers(2, 4),
    st.integers(1, 9),
    st.integers(0, 1),
    st.integers(0, 40),
    st.none() | st.tuples(st.integers(0, 40), st.integers(0, 3)),
    st.data(),
)
def test_the_next_attempt_begins_where_all_have_stopped_whoever_is_lost(
    workers: int,
    steps: int,
    backup: int,
    told_after: int,
    loss: tuple[int, int] | None,
    data: st.DataObject,
) -> None:
    run = Run(workers, steps, backup)
    acts = st.tuples(st.sampled_from(["go", "hear", "ask"]), st.integers(0, workers - 1))
    for number, (act, rank) in enumerate(data.draw(st.lists(acts, max_size=120))):
        if number == told_after:
            run.resize()
        if loss is not None and number == loss[0]:
            run.lost = loss[1] % workers
        getattr(run, act)(rank)
    run.settle()
    state, world = run.state, 5 if run.asked else None
    if state.phase is Phase.SUCCEEDED:
        assert all(worker.step == steps for worker in run.workers)
    elif run.lost is None:
        assert state.restart == Restart(1, (), everything=False, wait_s=0.0, world=5)
        assert state.agreed == state.furthest == state.steps_done < steps
    else:
        assert state.restart is not None
        assert (state.restart.replace, state.restart.everything) == ((run.lost,), False)
        assert state.restart.world == world
