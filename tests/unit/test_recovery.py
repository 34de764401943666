"""The restart budget: who makes progress goes on at once, who does not waits and then gives up."""

from functools import partial

import pytest

from distplat.platform.errors import ActorLost
from distplat.platform.recovery import (
    MAX_DELAY_S,
    MIN_DELAY_S,
    SAME_STEP_LIMIT,
    Budget,
    Policy,
    policy_of,
)
from distplat.platform.spec import Failure


def spend(budget: Budget, *steps: int, preempted: bool = False) -> list[float | str]:
    return [budget.spend(step, f"lost at {step}", preempted) for step in steps]


def test_progress_costs_no_waiting() -> None:
    assert spend(Budget(Policy(max_failures=4)), 0, 7, 9, 12) == [0.0] * 4


def test_failures_at_one_step_wait_then_end_the_run() -> None:
    first, second, third = spend(Budget(Policy(max_failures=100)), 7, 7, 7)
    assert (first, second) == (0.0, MIN_DELAY_S)
    assert SAME_STEP_LIMIT == 3
    assert isinstance(third, str)
    assert "after step 7" in third


def test_a_step_between_forgives() -> None:
    answers = spend(Budget(Policy(max_failures=100)), 7, 7, 8, 8, 9, 9)
    assert answers == [0.0, MIN_DELAY_S] * 3
    assert max(a for a in answers if isinstance(a, float)) <= MAX_DELAY_S


def test_the_budget_is_spent() -> None:
    budget = Budget(Policy(max_failures=2))
    *before, last = spend(budget, 1, 2, 3)
    assert before == [0.0, 0.0]
    assert last == "`failure.max_failures` is 2"
    assert [s.split(": ")[0] for s in budget.failures] == [
        "attempt 0, after step 1",
        "attempt 1, after step 2",
        "attempt 2, after step 3",
    ]


def test_preemption_has_a_budget_of_its_own() -> None:
    budget = Budget(Policy(max_failures=1, max_preemptions=3))
    assert spend(budget, 5, 5, 5, preempted=True) == [0.0] * 3, "nobody's failure, no waiting"
    assert spend(budget, 5) == [0.0]
    [answer] = spend(budget, 5, preempted=True)
    assert answer == "preempted more than 3 times"


def test_what_follows_from_a_failure_is_paid_for_once() -> None:
    budget = Budget(Policy(max_failures=2))
    follow = partial(budget.spend, 7, "its state is gone", False, consequence=True)
    assert spend(budget, 7, 7) == [0.0, MIN_DELAY_S]
    assert follow() == 0.0
    assert follow() == "`failure.max_failures` is 2", "or a fault of ours would go on for ever"
    assert len(budget.failures) == 4, "all are told"


def test_a_node_dies_once_though_its_processes_are_missed_one_by_one() -> None:
    budget = Budget(Policy(max_failures=2))
    cause = "its node has died"
    assert budget.spend(7, "worker-1 does not answer", False) == 0.0
    assert budget.spend(7, f"server-manager: {cause}", False, node="a1") == MIN_DELAY_S
    for role in ("server-0", "server-1", "worker-1/attempt-1"):
        assert budget.spend(7, f"{role}: {cause}", False, node="a1") == 0.0
    assert len(budget.failures) == 5, "all are told"
    ended = budget.spend(7, f"worker-0: {cause}", False, node="b2")
    assert ended == "`failure.max_failures` is 2"


@pytest.mark.parametrize(
    ("cause", "node"),
    [
        ("The actor died because its node has died. Node Id: 8dd1bf53df", "8dd1bf53df"),
        ("The actor died because its worker process has died.", ""),
    ],
)
def test_the_node_that_died_is_in_rays_words(cause: str, node: str) -> None:
    assert ActorLost("server-0", None, cause).dead_node == node


@pytest.mark.parametrize(
    ("steps", "ends"),
    [
        ((10, 20, 30), True),
        ((10, 20, 109), True),
        ((10, 20, 110), False),
        ((10, 20, 110, 111), True),
        ((10, 20, 220, 221), False),
        ((10, 20, 500, 501, 502), True),
        ((900, 901, 905), True),
        ((10, 110, 20, 110), True),
        (tuple(range(1, 10_000, 100)), False),
    ],
)
def test_progress_gives_failures_back(steps: tuple[int, ...], ends: bool) -> None:
    """Two are allowed; a step that is made again after a rollback is no progress."""
    answers = spend(Budget(Policy(max_failures=2)), *steps)
    assert isinstance(answers[-1], str) is ends
    assert not any(isinstance(answer, str) for answer in answers[:-1])
    preempted = spend(Budget(Policy(max_preemptions=2)), *steps, preempted=True)
    assert isinstance(preempted[-1], str) is ends


@pytest.mark.parametrize(
    ("events", "ends"),
    [
        ("saved 4, lost 5, saved 6, lost 20, saved 21, lost 35, saved 36, lost 50", False),
        ("lost 5, lost 20, lost 35", True),
        ("lost 5, lost 6, saved 5, saved 6, lost 7", True),
        ("lost 5, lost 6, saved 7, lost 8", False),
        ("lost 5, lost 6, saved 7, saved 7, lost 8, lost 9", True),
        ("lost 5, lost 6, saved 7, saved 8, lost 9, lost 10", False),
        ("saved 1, saved 2, saved 3, lost 4, lost 5, lost 6", True),
        ("lost 5, lost 9, saved 6, saved 9, lost 10", True),
        ("lost 5, saved 6, lost 6, saved 6, lost 7, lost 8", True),
    ],
)
def test_a_new_checkpoint_of_a_loop_gives_a_failure_back(events: str, ends: bool) -> None:
    """Two are allowed. A checkpoint that is made again after a rollback is no progress."""
    for preempted in (False, True):
        budget, answers = Budget(Policy(max_failures=2, max_preemptions=2)), []
        for event in events.split(", "):
            kind, step = event.split()
            if kind == "saved":
                budget.checkpoint_saved(int(step))
            else:
                answers += spend(budget, int(step), preempted=preempted)
        assert isinstance(answers[-1], str) is ends
        assert not any(isinstance(answer, str) for answer in answers[:-1])


@pytest.mark.parametrize(
    ("failure", "survives_worker_loss", "policy"),
    [
        (Failure(), True, Policy(3, 100, True, allows_restart_from_scratch=False)),
        (Failure(), False, Policy(0, 0, False, allows_restart_from_scratch=False)),
        (Failure(max_failures=7), False, Policy(7, 0, False)),
        (Failure(max_failures=7), True, Policy(7, 100, True)),
        (Failure(max_failures=0, max_preemptions=1), True, Policy(0, 1, True)),
    ],
)
def test_what_a_job_leaves_open(
    failure: Failure, survives_worker_loss: bool, policy: Policy
) -> None:
    assert policy_of(failure, survives_worker_loss) == policy


def test_checkpoints_make_a_restart_cheap() -> None:
    assert policy_of(Failure(), False, checkpoints=True) == Policy(3, 100, False)
    assert policy_of(Failure(max_failures=0), False, checkpoints=True) == Policy(0, 100, False)
