"""The restart budget: with progress a run restarts at once, otherwise it waits and then fails."""

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


def test_progress_restarts_without_delay() -> None:
    assert spend(Budget(Policy(max_failures=4)), 0, 7, 9, 12) == [0.0] * 4


def test_failures_at_one_step_delay_then_end_the_run() -> None:
    first, second, third = spend(Budget(Policy(max_failures=100)), 7, 7, 7)
    assert (first, second) == (0.0, MIN_DELAY_S)
    assert SAME_STEP_LIMIT == 3
    assert isinstance(third, str)
    assert "after step 7" in third


def test_progress_resets_the_delay() -> None:
    answers = spend(Budget(Policy(max_failures=100)), 7, 7, 8, 8, 9, 9)
    assert answers == [0.0, MIN_DELAY_S] * 3
    assert max(a for a in answers if isinstance(a, float)) <= MAX_DELAY_S


def test_exhausted_budget_ends_the_run() -> None:
    budget = Budget(Policy(max_failures=2))
    *before, last = spend(budget, 1, 2, 3)
    assert before == [0.0, 0.0]
    assert last == "`failure.max_failures` is 2"
    assert [s.split(": ")[0] for s in budget.failures] == [
        "attempt 0, after step 1",
        "attempt 1, after step 2",
        "attempt 2, after step 3",
    ]


def test_preemptions_have_their_own_budget() -> None:
    budget = Budget(Policy(max_failures=1, max_preemptions=3))
    assert spend(budget, 5, 5, 5, preempted=True) == [0.0] * 3, "preemptions restart without delay"
    assert spend(budget, 5) == [0.0]
    [answer] = spend(budget, 5, preempted=True)
    assert answer == "preempted more than 3 times"


def test_consequence_of_a_failure_is_free_once() -> None:
    budget = Budget(Policy(max_failures=2))
    spend_consequence = partial(budget.spend, 7, "its state is gone", False, consequence=True)
    assert spend(budget, 7, 7) == [0.0, MIN_DELAY_S]
    assert spend_consequence() == 0.0
    assert spend_consequence() == "`failure.max_failures` is 2", (
        "a repeated consequence may be an internal error"
    )
    assert len(budget.failures) == 4, "all failures are listed"


def test_lost_processes_of_one_node_count_once() -> None:
    budget = Budget(Policy(max_failures=2))
    cause = "its node has died"
    assert budget.spend(7, "worker-1 does not answer", False) == 0.0
    assert budget.spend(7, f"server-manager: {cause}", False, node="a1") == MIN_DELAY_S
    for role in ("server-0", "server-1", "worker-1/attempt-1"):
        assert budget.spend(7, f"{role}: {cause}", False, node="a1") == 0.0
    assert len(budget.failures) == 5, "all failures are listed"
    ended = budget.spend(7, f"worker-0: {cause}", False, node="b2")
    assert ended == "`failure.max_failures` is 2"


@pytest.mark.parametrize(
    ("cause", "node"),
    [
        ("The actor died because its node has died. Node Id: 8dd1bf53df", "8dd1bf53df"),
        ("The actor died because its worker process has died.", ""),
    ],
)
def test_dead_node_is_parsed_from_rays_message(cause: str, node: str) -> None:
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
def test_progress_restores_the_budget(steps: tuple[int, ...], ends: bool) -> None:
    """The budget is two failures. A step repeated after a rollback is no progress."""
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
def test_new_checkpoint_of_a_loop_restores_the_budget(events: str, ends: bool) -> None:
    """The budget is two failures. A checkpoint repeated after a rollback is no progress."""
    for preempted in (False, True):
        budget, answers = Budget(Policy(max_failures=2, max_preemptions=2)), []
        for event in events.split(", "):
            action, step = event.split()
            if action == "saved":
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
def test_policy_of_a_job(failure: Failure, survives_worker_loss: bool, policy: Policy) -> None:
    assert policy_of(failure, survives_worker_loss) == policy


def test_policy_of_a_job_with_checkpoints() -> None:
    assert policy_of(Failure(), False, checkpoints=True) == Policy(3, 100, False)
    assert policy_of(Failure(max_failures=0), False, checkpoints=True) == Policy(0, 100, False)
