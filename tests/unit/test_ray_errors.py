"""What Ray raises means one thing everywhere, and no class of Ray's is undecided."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from ray import exceptions

import distplat
from distplat.actors.ray_errors import (
    MEANINGS,
    Meaning,
    advice_for,
    as_ours,
    as_transport_error,
    cause_of,
    meaning,
    of_platform,
)
from distplat.actors.transport import ActorDied, AnswerPending, Unanswered
from distplat.platform.errors import (
    ActorLost,
    DistplatError,
    InfrastructureError,
    SpecError,
    StaleError,
)


def raised(cause: Exception) -> exceptions.RayError:
    """Give what a caller gets of what a method raised: of two classes at once."""
    error = exceptions.RayTaskError(
        "push", "Traceback (most recent)", cause, actor_repr="digits/server-0"
    )
    return error.as_instanceof_cause()


def all_of_ray() -> set[type[exceptions.RayError]]:
    found, todo = set(), [exceptions.RayError]
    while todo:
        kind = todo.pop()
        found.add(kind)
        todo += [one for one in kind.__subclasses__() if one not in found]
    public = {one for _, one in inspect.getmembers(exceptions, inspect.isclass)}
    return {kind for kind in found if kind in public and kind.__module__ == exceptions.__name__}


def test_every_class_of_ray_is_decided() -> None:
    undecided = sorted(kind.__name__ for kind in all_of_ray() - MEANINGS.keys())
    assert undecided == [], "say in actors/ray_errors.py what these mean to a run"
    assert len(MEANINGS) > 40, "the walk has found them"


def test_nobody_else_knows_a_class_of_rays_by_name() -> None:
    """Whoever caught `RayActorError` alone would take an out-of-memory kill for a fault of ours."""
    root = Path(distplat.__file__).parent
    files = [path for part in ("actors", "cli") for path in (root / part).rglob("*.py")]
    named = {
        (path.name, name)
        for path in files
        if path.name != "ray_errors.py"
        for name in re.findall(r"exceptions\.(\w+(?:Error|Exception))\b", path.read_text())
        if hasattr(exceptions, name)
    }
    joining = {("cluster.py", "AuthenticationError"), ("join.py", "AuthenticationError")}
    documented = {("ray_compat.py", "AuthenticationError")}
    assert len(files) > 50
    assert {one for one in named if one[1] != "RayError"} == joining | documented


OUT_OF_MEMORY = exceptions.OutOfMemoryError("Task was killed due to the node running low on memory")
KILLED = "killed by Ray's memory monitor"


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (OUT_OF_MEMORY, ActorDied, KILLED),
        (exceptions.ActorDiedError(), ActorDied, "The actor died unexpectedly"),
        (exceptions.ActorPlacementGroupRemoved(), ActorDied, "placement group was removed"),
        (exceptions.ActorUnschedulableError("node gone"), ActorDied, "no node can schedule it"),
        (exceptions.NodeDiedError("10.0.0.2"), ActorDied, "its node ended: 10.0.0.2"),
        (exceptions.OwnerDiedError("ab", None, ""), ActorDied, ""),
        (exceptions.ObjectLostError("ab", None, ""), ActorDied, ""),
        (exceptions.ActorUnavailableError("no word", None), Unanswered, "no word"),
        (exceptions.ObjectFetchTimedOutError("ab", None, ""), Unanswered, ""),
        (exceptions.GetTimeoutError("late"), AnswerPending, ""),
        (exceptions.ObjectStoreFullError("full"), InfrastructureError, "object_store_memory"),
        (exceptions.RaySystemError("raylet"), InfrastructureError, "the cluster fails"),
        (exceptions.RuntimeEnvSetupError("no matching package"), SpecError, "no matching package"),
        (exceptions.PendingCallsLimitExceeded("9"), DistplatError, "error inside distplat"),
        (raised(StaleError("push 2")), StaleError, "push 2"),
        (raised(KeyError("w")), InfrastructureError, "error inside digits/server-0: KeyError: 'w'"),
        (raised(OUT_OF_MEMORY), InfrastructureError, KILLED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_answer_that_does_not_come(
    error: exceptions.RayError, expected: type[Exception], text: str
) -> None:
    found = as_transport_error(error)
    assert type(found) is expected
    assert text in str(found)


def test_what_a_method_raised_is_no_death_of_its_actor() -> None:
    assert meaning(raised(exceptions.ActorDiedError())) is Meaning.RAISED


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OUT_OF_MEMORY, InfrastructureError),
        (exceptions.ObjectStoreFullError("full"), InfrastructureError),
        (raised(ActorLost("server-0", None, "died")), ActorLost),
        (raised(ValueError("in the user's own actor")), type(None)),
        (ValueError("in the user's code"), type(None)),
        (exceptions.UserCodeException("in the user's data set"), type(None)),
        (exceptions.GetTimeoutError("a deadline of the user's"), type(None)),
        (exceptions.ActorAlreadyExistsError("an actor of the user's"), type(None)),
        (AnswerPending(), InfrastructureError),
        (ActorDied("killed"), InfrastructureError),
    ],
)
def test_whose_fault_it_is(error: Exception, expected: type[Any]) -> None:
    found = of_platform(error)
    assert type(found) is expected
    assert found is None or found.exit_code == 4


def test_a_cause_is_one_line_and_never_empty() -> None:
    assert cause_of(exceptions.ActorDiedError()) == "The actor died unexpectedly before " + (
        "finishing this task."
    )
    assert cause_of(exceptions.RayActorError(error_msg="")) == "RayActorError"
    told = "The actor died unexpectedly.\n\tclass_name: Worker\n\tpid: 17\nEnd of file."
    for guesses in (
        " There are some potential root causes. (1) x",
        " Some common causes include: (1)",
    ):
        error = exceptions.RayActorError(error_msg=told + guesses)
        assert cause_of(error) == told.splitlines()[-1]
    error = exceptions.RayActorError(
        error_msg="The actor died in its creation task\n  File x\nImportError: no numpy",
        actor_init_failed=True,
    )
    assert cause_of(error) == "it could not be created: ImportError: no numpy"
    assert as_ours(error).exit_code == 4


def test_an_owner_that_the_cluster_cannot_call_is_told_so() -> None:
    """Ray's words, of a driver with a token on a cluster without one: they name no cause."""
    error = exceptions.ActorDiedError()
    error.error_msg = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: ControllerActor\n"
        "The actor is dead because all references to the actor were removed including lineage ref "
        "count."
    )
    being_made = exceptions.RaySystemError("Actor creation cancelled.")
    for one in (error, being_made):
        assert "cannot call the process that created it" in cause_of(one)
        assert "RAY_AUTH_MODE" in str(as_ours(one))


@pytest.mark.parametrize(
    ("role", "said", "advised"),
    [
        (
            "worker-1",
            "Worker unexpectedly exits with a connection error code 2. End of file.",
            True,
        ),
        (
            "server-1",
            "Worker unexpectedly exits with a connection error code 2. End of file.",
            False,
        ),
        ("worker-1", "its node ended", False),
    ],
)
def test_where_to_look_when_ray_does_not_know_how_a_worker_ended(
    role: str, said: str, advised: bool
) -> None:
    error = exceptions.RayActorError(error_msg=f"The actor died.\n\tpid: 17\n{said}")
    found = advice_for(role, cause_of(error))
    assert bool(found) == advised
    assert ("`dmesg`" in cause_of(error)) == ("exits" in said)
    if advised:
        told = str(ActorLost(role, 3, cause_of(error), found))
        assert "logs/worker-1.log shows SIGABRT" in told and "different sizes" in told
