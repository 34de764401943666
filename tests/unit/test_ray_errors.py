"""Every exception class of Ray has one meaning, defined in `actors/ray_errors.py`."""

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


def raised_by_method(cause: Exception) -> exceptions.RayError:
    """Return the error that a caller gets from a method: an instance of both classes."""
    error = exceptions.RayTaskError(
        "push", "Traceback (most recent)", cause, actor_repr="digits/server-0"
    )
    return error.as_instanceof_cause()


def ray_error_classes() -> set[type[exceptions.RayError]]:
    found, todo = set(), [exceptions.RayError]
    while todo:
        cls = todo.pop()
        found.add(cls)
        todo += [subclass for subclass in cls.__subclasses__() if subclass not in found]
    public = {cls for _, cls in inspect.getmembers(exceptions, inspect.isclass)}
    return {cls for cls in found if cls in public and cls.__module__ == exceptions.__name__}


def test_every_class_of_ray_has_a_meaning() -> None:
    missing = sorted(cls.__name__ for cls in ray_error_classes() - MEANINGS.keys())
    assert missing == [], "add the meaning of these classes to actors/ray_errors.py"
    assert len(MEANINGS) > 40, "all classes of Ray were found"


def test_only_ray_errors_names_classes_of_ray() -> None:
    """Code that catches only `RayActorError` treats an out-of-memory kill as an internal error."""
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
    assert {use for use in named if use[1] != "RayError"} == joining | documented


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
        (raised_by_method(StaleError("push 2")), StaleError, "push 2"),
        (
            raised_by_method(KeyError("w")),
            InfrastructureError,
            "error inside digits/server-0: KeyError: 'w'",
        ),
        (raised_by_method(OUT_OF_MEMORY), InfrastructureError, KILLED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_map_to_transport_errors(
    error: exceptions.RayError, expected: type[Exception], text: str
) -> None:
    found = as_transport_error(error)
    assert type(found) is expected
    assert text in str(found)


def test_error_raised_by_a_method_is_not_a_death_of_its_actor() -> None:
    assert meaning(raised_by_method(exceptions.ActorDiedError())) is Meaning.RAISED


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OUT_OF_MEMORY, InfrastructureError),
        (exceptions.ObjectStoreFullError("full"), InfrastructureError),
        (raised_by_method(ActorLost("server-0", None, "died")), ActorLost),
        (raised_by_method(ValueError("in the user's own actor")), type(None)),
        (ValueError("in the user's code"), type(None)),
        (exceptions.UserCodeException("in the user's data set"), type(None)),
        (exceptions.GetTimeoutError("a deadline of the user's"), type(None)),
        (exceptions.ActorAlreadyExistsError("an actor of the user's"), type(None)),
        (AnswerPending(), InfrastructureError),
        (ActorDied("killed"), InfrastructureError),
    ],
)
def test_of_platform_excludes_errors_of_user_code(error: Exception, expected: type[Any]) -> None:
    found = of_platform(error)
    assert type(found) is expected
    assert found is None or found.exit_code == 4


def test_cause_is_one_line_and_not_empty() -> None:
    assert cause_of(exceptions.ActorDiedError()) == "The actor died unexpectedly before " + (
        "finishing this task."
    )
    assert cause_of(exceptions.RayActorError(error_msg="")) == "RayActorError"
    message = "The actor died unexpectedly.\n\tclass_name: Worker\n\tpid: 17\nEnd of file."
    for guesses in (
        " There are some potential root causes. (1) x",
        " Some common causes include: (1)",
    ):
        error = exceptions.RayActorError(error_msg=message + guesses)
        assert cause_of(error) == message.splitlines()[-1]
    error = exceptions.RayActorError(
        error_msg="The actor died in its creation task\n  File x\nImportError: no numpy",
        actor_init_failed=True,
    )
    assert cause_of(error) == "it could not be created: ImportError: no numpy"
    assert as_ours(error).exit_code == 4


def test_cause_names_an_owner_that_the_cluster_cannot_call() -> None:
    """Ray's message for a driver with a token on a cluster without one names no cause."""
    error = exceptions.ActorDiedError()
    error.error_msg = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: ControllerActor\n"
        "The actor is dead because all references to the actor were removed including lineage ref "
        "count."
    )
    cancelled = exceptions.RaySystemError("Actor creation cancelled.")
    for ray_error in (error, cancelled):
        assert "cannot call the process that created it" in cause_of(ray_error)
        assert "RAY_AUTH_MODE" in str(as_ours(ray_error))


@pytest.mark.parametrize(
    ("role", "message", "has_advice"),
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
def test_advice_if_the_cause_of_a_workers_end_is_unknown(
    role: str, message: str, has_advice: bool
) -> None:
    error = exceptions.RayActorError(error_msg=f"The actor died.\n\tpid: 17\n{message}")
    found = advice_for(role, cause_of(error))
    assert bool(found) == has_advice
    assert ("`dmesg`" in cause_of(error)) == ("exits" in message)
    if has_advice:
        text = str(ActorLost(role, 3, cause_of(error), found))
        assert "logs/worker-1.log shows SIGABRT" in text and "different sizes" in text
