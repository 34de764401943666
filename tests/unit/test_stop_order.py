"""How workers are told to stop: all stop after the same step, whoever hears of it first."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.errors import Abandoned, ActorLost
from distplat.platform.job import Event, Failed, JobState, Phase, PollAnswered, Resize, Tick
from distplat.platform.recovery import Policy, Restart
from distplat.platform.spec import Failure
from distplat.platform.stop_order import StopOrder
from distplat.strategies.loop.control import StepControl

NONE, RESIZE, END, SAVE, ABANDON = StopOrder


@pytest.mark.parametrize(
    ("told", "done"),
    [
        ([NONE, NONE, NONE], NONE),
        ([NONE, RESIZE, NONE], RESIZE),
        ([RESIZE, RESIZE, RESIZE], RESIZE),
        ([NONE, NONE, END], END),
        ([RESIZE, END, NONE], END),
        ([NONE, SAVE, NONE], SAVE),
        ([END, SAVE, RESIZE], SAVE),
    ],
)
def test_what_one_rank_was_told_all_ranks_do(told: list[StopOrder], done: StopOrder) -> None:
    records = [StepControl(4.0, 4.0, stop=one) for one in told]
    assert StepControl.total([one.pack() for one in records]).stop is done


LIMITS = Failure(start_timeout_s=60, step_timeout_s=20, heartbeat_timeout_s=10)


@dataclass
class Simulated:
    """A worker: between two steps, or in one that waits for the others."""

    told: StopOrder = NONE
    step: int = 0
    """The next one, or the one under way."""
    records: list[StepControl] = field(default_factory=list)
    """Of each step that it has begun."""
    agreed: StopOrder = NONE
    lost: bool = False

    @property
    def within(self) -> bool:
        return len(self.records) > self.step


class Run:
    """Workers in step, what the controller decides, and orders on their way."""

    def __init__(self, workers: int, steps: int) -> None:
        self.steps = steps
        self.workers = [Simulated() for _ in range(workers)]
        self.state = JobState(workers, LIMITS, 0.0, Policy(1, survives_worker_loss=True))
        for rank in range(workers):
            self.state.handle(PollAnswered(rank, 1, 0, False), 0.0)

    def go(self, rank: int) -> None:
        """Let a worker begin a step or end one, if it can."""
        worker = self.workers[rank]
        if worker.lost or worker.agreed or worker.told is ABANDON or worker.step == self.steps:
            return
        if not worker.within:
            worker.records.append(StepControl(1.0, 1.0, stop=worker.told))
            return
        begun = [one.records[worker.step] for one in self.workers if len(one.records) > worker.step]
        if len(begun) == len(self.workers):
            worker.agreed = StepControl.total([one.pack() for one in begun]).stop
            worker.step += 1

    def hear(self, rank: int) -> None:
        """Let what the controller says reach a worker."""
        worker = self.workers[rank]
        worker.told = max(worker.told, self.state.stop_order)

    def ask(self, rank: int) -> None:
        """Let the controller hear of a worker."""
        name, worker = f"worker-{rank}", self.workers[rank]
        events: list[Event] = []
        if worker.lost:
            events.append(Failed(name, ActorLost(name, None, "killed"), dead=True))
        else:
            done = worker.step == self.steps
            events.append(PollAnswered(rank, 1 + worker.step, worker.step, done))
            stopped = not done and (worker.agreed or worker.told is ABANDON)
            events += [Failed(name, Abandoned("as it was told"))] if stopped else []
        for event in events:
            self.state.handle(event, 0.0)

    def settle(self) -> None:
        """Let everything come to pass that can."""
        for _ in range(2 * self.steps + 5):
            for rank in range(len(self.workers)):
                self.hear(rank)
                self.go(rank)
                self.ask(rank)
        self.state.handle(Tick(), 0.0)


@given(
    st.integers(2, 4),
    st.integers(1, 9),
    st.integers(0, 40),
    st.none() | st.tuples(st.integers(0, 40), st.integers(0, 3)),
    st.data(),
)
def test_all_stop_after_the_same_step_whenever_they_hear_of_it_and_whoever_is_lost(
    workers: int, steps: int, told_after: int, loss: tuple[int, int] | None, data: st.DataObject
) -> None:
    run, world = Run(workers, steps), None
    acts = st.tuples(st.sampled_from(["go", "hear", "ask"]), st.integers(0, workers - 1))
    drawn = data.draw(st.lists(acts, max_size=120))
    for number, (act, rank) in enumerate([*drawn, ("ask", 0)]):
        if number == min(told_after, len(drawn)):
            world = 5 if run.state.phase is Phase.RUNNING and run.workers[0].step < steps else None
            run.state.handle(Resize(5), 0.0)
            world = world if run.state.stop_order is RESIZE else None
        if loss is not None and number == loss[0]:
            run.workers[loss[1] % workers].lost = True
        getattr(run, act)(rank)
    run.settle()
    state, lost = run.state, [rank for rank, one in enumerate(run.workers) if one.lost]
    if state.phase is Phase.SUCCEEDED:
        assert all(worker.step == steps for worker in run.workers)
    elif not lost:
        assert state.restart == Restart(1, (), restarts_all=False, wait_s=0.0, world=5)
        assert state.max_step == state.steps_done < steps, "somebody has gone too far"
        assert not any(worker.within for worker in run.workers), "a gradient is made for nothing"
    else:
        assert state.restart is not None
        assert (state.restart.replace, state.restart.restarts_all) == (tuple(lost), False)
        assert state.restart.world == world
