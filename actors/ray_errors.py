"""
Classification of Ray's exceptions: one table; a test checks that no class is missing.

Ray reports a lost actor through a dozen exceptions besides `RayActorError`, for example after a
kill by the memory monitor, the removal of a placement group, or the end of a node. Other modules
use this classification instead of Ray's classes.
"""

from __future__ import annotations

import re
from enum import Enum

from ray import exceptions

from distplat.actors.transport import ActorDied, AnswerPending, TransportError, Unanswered
from distplat.platform.errors import DistplatError, InfrastructureError, Problem, SpecError


class Meaning(Enum):
    """Class of an error, by its consequence."""

    LATE = "no answer within the timeout"
    UNANSWERED = "the call or its answer was lost; the call may be repeated"
    LOST = "the actor and its state are lost"
    RAISED = "the method raised an exception, which is the cause"
    CLUSTER = "the cluster failed"
    USER = "the user's request cannot be satisfied"
    OURS = "distplat has misused Ray"


MEANINGS: dict[type[exceptions.RayError], Meaning] = {
    exceptions.GetTimeoutError: Meaning.LATE,
    exceptions.PlasmaObjectNotAvailable: Meaning.LATE,
    exceptions.ActorUnavailableError: Meaning.UNANSWERED,
    exceptions.ObjectFetchTimedOutError: Meaning.UNANSWERED,
    exceptions.TaskCancelledError: Meaning.UNANSWERED,
    exceptions.RayActorError: Meaning.LOST,
    exceptions.ActorDiedError: Meaning.LOST,
    exceptions.ActorPlacementGroupRemoved: Meaning.LOST,
    exceptions.ActorUnschedulableError: Meaning.LOST,
    exceptions.AsyncioActorExit: Meaning.LOST,
    exceptions.NodeDiedError: Meaning.LOST,
    exceptions.OutOfMemoryError: Meaning.LOST,
    exceptions.TaskPlacementGroupRemoved: Meaning.LOST,
    exceptions.TaskUnschedulableError: Meaning.LOST,
    exceptions.WorkerCrashedError: Meaning.LOST,
    # A lost object was an answer or state of its owner, lost with its process or node.
    exceptions.ObjectLostError: Meaning.LOST,
    exceptions.ObjectReconstructionFailedError: Meaning.LOST,
    exceptions.OwnerDiedError: Meaning.LOST,
    exceptions.ReferenceCountingAssertionError: Meaning.LOST,
    exceptions.RayTaskError: Meaning.RAISED,
    exceptions.AuthenticationError: Meaning.CLUSTER,
    exceptions.LocalRayletDiedError: Meaning.CLUSTER,
    exceptions.ObjectStoreFullError: Meaning.CLUSTER,
    exceptions.OutOfDiskError: Meaning.CLUSTER,
    exceptions.RayChannelError: Meaning.CLUSTER,
    exceptions.RayChannelTimeoutError: Meaning.CLUSTER,
    exceptions.RayDirectTransportError: Meaning.CLUSTER,
    exceptions.RayError: Meaning.CLUSTER,
    exceptions.RaySystemError: Meaning.CLUSTER,
    exceptions.RpcError: Meaning.CLUSTER,
    exceptions.RuntimeEnvSetupError: Meaning.USER,
    exceptions.UserCodeException: Meaning.USER,
    exceptions.ActorAlreadyExistsError: Meaning.OURS,
    exceptions.ActorHandleNotFoundError: Meaning.OURS,
    exceptions.CrossLanguageError: Meaning.OURS,
    exceptions.ObjectFreedError: Meaning.OURS,
    exceptions.ObjectRefStreamEndOfStreamError: Meaning.OURS,
    exceptions.OufOfBandObjectRefSerializationException: Meaning.OURS,
    exceptions.PendingCallsLimitExceeded: Meaning.OURS,
    exceptions.RayCgraphCapacityExceeded: Meaning.OURS,
    exceptions.StreamingGeneratorReplayInconsistentError: Meaning.OURS,
    exceptions.UnserializableException: Meaning.OURS,
}

_CAUSES: dict[type[exceptions.RayError], str] = {
    exceptions.OutOfMemoryError: "killed by Ray's memory monitor: its node ran out of memory",
    exceptions.NodeDiedError: "its node ended",
    exceptions.ActorPlacementGroupRemoved: "its placement group was removed",
    exceptions.ActorUnschedulableError: "no node can schedule it",
}
"""Prefixes of Ray's own messages."""

_GUESSES = re.compile(r" (?:Some common causes|There are some potential root causes)")
"""Start of a passage about common causes in Ray's messages, which is cut off."""

_ENDED = "its process ended unexpectedly"
"""Ray does not know by which signal."""

UNREACHABLE = (
    "the cluster cannot call the process that created it: a firewall is between them, or one of "
    "them requires a token and the other has none (`RAY_AUTH_MODE`: a cluster that was started "
    "with `disabled` is used with `disabled`)"
)
_PLAIN = {
    "because all references to the actor were removed": UNREACHABLE,
    "unexpectedly exits with a connection error": (
        f"{_ENDED}: it was killed, or crashed in native code; `dmesg` on its node shows whether "
        "the kernel killed it for memory"
    ),
    "Actor creation cancelled": f"its start was cancelled: the cluster ends, or {UNREACHABLE}",
}
"""Phrases of Ray, and their meaning. distplat holds a reference to each actor that it calls, so
the first phrase means that Ray cannot reach the actor's owner, as may the last during creation."""

_REMEDIES: dict[type[exceptions.RayError], str] = {
    exceptions.ObjectStoreFullError: "give Ray a larger object store (`object_store_memory`)",
    exceptions.OutOfDiskError: "free some of the disk that Ray spills to",
    exceptions.RuntimeEnvSetupError: "fix the settings of --runtime-env or its JSON",
}


def meaning(error: exceptions.RayError) -> Meaning:
    """Return the class of an error; an exception that is not in the table has that of its base."""
    # The exception of a method derives from two classes; Ray's comes first.
    return next(MEANINGS[cls] for cls in type(error).__mro__ if cls in MEANINGS)


def cause_of(error: exceptions.RayError) -> str:
    """Return the cause of a loss in one line."""
    if isinstance(error, exceptions.ObjectLostError):  # Ray's message has only the object's id
        return f"its objects in Ray's object store are lost with it ({type(error).__name__})"
    lines = str(error).strip().splitlines()
    # indented lines describe the actor
    reasons = [line for line in lines[1:] if not line.startswith("\t")]
    reason = _GUESSES.split((reasons or lines or [type(error).__name__])[0])[0]
    if lines and getattr(error, "actor_init_failed", False):
        reason = f"it could not be created: {lines[-1].strip()}"
    reason = next((plain for phrase, plain in _PLAIN.items() if phrase in reason), reason)
    prefix = _CAUSES.get(type(error))
    return f"{prefix}: {reason}" if prefix else reason


def advice_for(role: str, cause: str) -> str:
    """
    Return advice if a worker's process ended and Ray does not know the cause; else an empty text.

    Args:
        role: role of the lost actor.
        cause: result of `cause_of`.
    """
    if _ENDED not in cause or not role.startswith("worker-"):
        return ""
    return (
        f"if logs/{role}.log shows SIGABRT or a `Fatal Python error`, native code has crashed: "
        "gloo does if ranks of a process group of yours pass tensors of different sizes "
        "(`distplat.all_gather` accepts them)"
    )


def taken_away(error: exceptions.RayError) -> bool:
    """Return whether the actor's machine was preempted."""
    return bool(getattr(error, "preempted", False))


def as_ours(error: exceptions.RayError) -> DistplatError:
    """
    Convert a permanent error of Ray to one of distplat.

    For an exception of a method its cause is returned. A cause that is not a `DistplatError` is an
    error inside the actor.
    """
    error_class, cause = meaning(error), cause_of(error)
    remedy = _REMEDIES.get(type(error), "")
    if error_class is Meaning.RAISED:
        return _raised(error)
    if error_class is Meaning.USER:
        return SpecError(Problem(("--runtime-env",), str(error).strip(), remedy))
    if error_class is Meaning.OURS:
        return DistplatError(f"error inside distplat: {type(error).__name__}: {cause}")
    is_lost = error_class is Meaning.LOST
    problem = "a process of the cluster was lost" if is_lost else "the cluster fails"
    return InfrastructureError(f"{problem}: {cause}" + (f"; {remedy}" if remedy else ""))


def _raised(error: exceptions.RayError) -> DistplatError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, DistplatError):
        return cause
    if isinstance(cause, exceptions.RayError):
        return as_ours(cause)
    name_match = re.search(r"repr=([^,)]+)", str(error))  # the actor's name is in the message only
    actor = name_match[1] if name_match else "an actor"
    return InfrastructureError(f"error inside {actor}: {type(cause).__name__}: {cause}")


def as_transport_error(error: exceptions.RayError) -> Exception:
    """Convert an error to an exception of `Transport.get`."""
    match meaning(error):
        case Meaning.LATE:
            return AnswerPending()
        case Meaning.UNANSWERED:
            return Unanswered(cause_of(error))
        case Meaning.LOST:
            return ActorDied(cause_of(error))
        case _:
            return as_ours(error)


def of_platform(error: BaseException) -> DistplatError | None:
    """
    Convert an exception that passed the user's code but is not the user's; else return None.

    Exceptions of an actor's method are converted only if they are distplat's. Others come from
    actors that the user's code has created, as do Ray's timeouts (distplat's calls raise
    `TransportError`) and misuse of Ray.
    """
    if isinstance(error, TransportError):
        return InfrastructureError(f"a process of the run does not answer: {error}".rstrip(": "))
    if not isinstance(error, exceptions.RayError):
        return None
    if meaning(error) in (Meaning.RAISED, Meaning.USER, Meaning.LATE, Meaning.OURS):
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, DistplatError) else None
    return as_ours(error)
