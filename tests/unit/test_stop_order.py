"""Stop orders: all workers stop after the same step, although orders arrive at different times."""

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
    ("orders", "expected"),
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
def test_strongest_order_of_any_rank_applies_to_all(
    orders: list[StopOrder], expected: StopOrder
) -> None:
    records = [StepControl(4.0, 4.0, stop=order) for order in orders]
    assert StepControl.total([record.pack() for record in records]).stop is expected


LIMITS = Failure(start_timeout_s=60, step_timeout_s=20, heartbeat_timeout_s=10)


@dataclass
class SimulatedWorker:
    """A worker: between two steps, or in a step that waits for the others."""

    order: StopOrder = NONE
    step: int = 0
    """The next or the current step."""
    records: list[StepControl] = field(default_factory=list)
    """Control record of each started step."""
    decision: StopOrder = NONE
    lost: bool = False

    @property
    def in_step(self) -> bool:
        return len(self.records) > self.step


class Run:
    """Simulated workers, the controller's state, and messages between them."""

    def __init__(self, workers: int, steps: int) -> None:
        self.steps = steps
        self.workers = [SimulatedWorker() for _ in range(workers)]
        self.state = JobState(workers, LIMITS, 0.0, Policy(1, survives_worker_loss=True))
        for rank in range(workers):
            self.state.handle(PollAnswered(rank, 1, 0, False), 0.0)

    def advance(self, rank: int) -> None:
        """Let a worker start or complete a step, if possible."""
        worker = self.workers[rank]
        if worker.lost or worker.decision or worker.order is ABANDON or worker.step == self.steps:
            return
        if not worker.in_step:
            worker.records.append(StepControl(1.0, 1.0, stop=worker.order))
            return
        records = [
            other.records[worker.step] for other in self.workers if len(other.records) > worker.step
        ]
        if len(records) == len(self.workers):
            worker.decision = StepControl.total([record.pack() for record in records]).stop
            worker.step += 1

    def deliver_order(self, rank: int) -> None:
        """Deliver the controller's order to a worker."""
        worker = self.workers[rank]
        worker.order = max(worker.order, self.state.stop_order)

    def poll(self, rank: int) -> None:
        """Deliver a worker's state to the controller."""
        name, worker = f"worker-{rank}", self.workers[rank]
        events: list[Event] = []
        if worker.lost:
            events.append(Failed(name, ActorLost(name, None, "killed"), dead=True))
        else:
            is_done = worker.step == self.steps
            events.append(PollAnswered(rank, 1 + worker.step, worker.step, is_done))
            is_stopped = not is_done and (worker.decision or worker.order is ABANDON)
            events += [Failed(name, Abandoned("ordered by the controller"))] if is_stopped else []
        for event in events:
            self.state.handle(event, 0.0)

    def run_to_end(self) -> None:
        """Deliver all messages and complete all possible steps."""
        for _ in range(2 * self.steps + 5):
            for rank in range(len(self.workers)):
                self.deliver_order(rank)
                self.advance(rank)
                self.poll(rank)
        self.state.handle(Tick(), 0.0)


@given(
    st.integers(2, 4),
    st.integers(1, 9),
    st.integers(0, 40),
    st.none() | st.tuples(st.integers(0, 40), st.integers(0, 3)),
    st.data(),
)
def test_all_ranks_stop_after_the_same_step(
    workers: int, steps: int, resize_after: int, loss: tuple[int, int] | None, data: st.DataObject
) -> None:
    run, world = Run(workers, steps), None
    actions_strategy = st.tuples(
        st.sampled_from(["advance", "deliver_order", "poll"]), st.integers(0, workers - 1)
    )
    actions = data.draw(st.lists(actions_strategy, max_size=120))
    for number, (action, rank) in enumerate([*actions, ("poll", 0)]):
        if number == min(resize_after, len(actions)):
            world = 5 if run.state.phase is Phase.RUNNING and run.workers[0].step < steps else None
            run.state.handle(Resize(5), 0.0)
            world = world if run.state.stop_order is RESIZE else None
        if loss is not None and number == loss[0]:
            run.workers[loss[1] % workers].lost = True
        getattr(run, action)(rank)
    run.run_to_end()
    state, lost = run.state, [rank for rank, worker in enumerate(run.workers) if worker.lost]
    if state.phase is Phase.SUCCEEDED:
        assert all(worker.step == steps for worker in run.workers)
    elif not lost:
        assert state.restart == Restart(1, (), restarts_all=False, wait_s=0.0, world=5)
        assert state.max_step == state.steps_done < steps, "a worker continued after the stop"
        assert not any(worker.in_step for worker in run.workers), "a worker stopped within a step"
    else:
        assert state.restart is not None
        assert (state.restart.replace, state.restart.restarts_all) == (tuple(lost), False)
        assert state.restart.world == world
