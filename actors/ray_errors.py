"""
What each error of Ray means to a run: one table, and a test that no class of Ray's is missing in.

Ray says that an actor is gone in a dozen ways, of which `RayActorError` is one: a kill by its
memory monitor, a placement group that was taken away and a node that ended are others. Whoever
waits for an answer asks here, and knows no class of Ray's by name.
"""

from __future__ import annotations

import re
from enum import Enum

from ray import exceptions

from distplat.actors.transport import ActorDied, AnswerPending, TransportError, Unanswered
from distplat.platform.errors import DistplatError, InfrastructureError, Problem, SpecError


class Meaning(Enum):
    """What is to be done about an error."""

    LATE = "nothing has come in time"
    UNANSWERED = "a call or its answer was lost on the way: it may be made again"
    LOST = "the actor is gone, and what it kept with it"
    RAISED = "the method raised, and what it raised travels inside"
    CLUSTER = "the cluster cannot do what it was asked"
    USER = "what the user asked for cannot be had"
    OURS = "Ray was asked for something that it does not do"


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
    # An object that is lost was an answer, or what its owner kept: with its process, or its node.
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
    exceptions.OutOfMemoryError: "killed by Ray's memory monitor, for its node ran out of memory",
    exceptions.NodeDiedError: "its node ended",
    exceptions.ActorPlacementGroupRemoved: "its placement group was removed",
    exceptions.ActorUnschedulableError: "no node can take it",
}
"""What stands before Ray's own words."""

_GUESSES = re.compile(r" (?:Some common causes|There are some potential root causes)")
"""What follows in Ray's own words says how processes die in general."""

_ENDED = "its process ended without a word"
"""Ray does not see by which signal."""

UNREACHABLE = (
    "the cluster cannot call the process that made it: a firewall is between them, or one of them "
    "wants a token and the other has none (`RAY_AUTH_MODE`: a cluster that was started with "
    "`disabled` is used with `disabled`)"
)
_PLAIN = {
    "because all references to the actor were removed": UNREACHABLE,
    "unexpectedly exits with a connection error": (
        f"{_ENDED}: it was killed, or crashed in native code; if the kernel killed it for memory, "
        "`dmesg` on its node says so"
    ),
    "Actor creation cancelled": f"its start was cancelled: the cluster ends, or {UNREACHABLE}",
}
"""What Ray says, and what it means. Nobody asks an actor without a reference: so Ray says this of
one whose owner it cannot call, and the other of one that is being made."""

_REMEDIES: dict[type[exceptions.RayError], str] = {
    exceptions.ObjectStoreFullError: "give Ray a larger object store (`object_store_memory`)",
    exceptions.OutOfDiskError: "free some of the disk that Ray spills to",
    exceptions.RuntimeEnvSetupError: "mend what --runtime-env, or its JSON, asks for",
}


def meaning(error: exceptions.RayError) -> Meaning:
    """Give what an error means; of a class that is not in the table, what its base class does."""
    # What a method raised is of two classes at once: Ray's own comes first.
    return next(MEANINGS[kind] for kind in type(error).__mro__ if kind in MEANINGS)


def cause_of(error: exceptions.RayError) -> str:
    """Say in one line why something is lost."""
    if isinstance(error, exceptions.ObjectLostError):  # Ray speaks of the object, by its number
        return f"what it kept is gone with it ({type(error).__name__})"
    lines = str(error).strip().splitlines()
    reasons = [line for line in lines[1:] if not line.startswith("\t")]  # the others name the actor
    reason = _GUESSES.split((reasons or lines or [type(error).__name__])[0])[0]
    if lines and getattr(error, "actor_init_failed", False):
        reason = f"it could not be made: {lines[-1].strip()}"
    reason = next((plain for words, plain in _PLAIN.items() if words in reason), reason)
    before = _CAUSES.get(type(error))
    return f"{before}: {reason}" if before else reason


def advice_for(role: str, cause: str) -> str:
    """
    Say where to look, where a worker's process ended and Ray does not know how.

    Args:
        role: who was lost.
        cause: what `cause_of` gave.
    """
    if _ENDED not in cause or not role.startswith("worker-"):
        return ""
    return (
        f"if logs/{role}.log tells of SIGABRT or a `Fatal Python error`, native code has crashed: "
        "gloo does where ranks of a group of your own bring tensors of different "
        "sizes (`distplat.all_gather` takes them)"
    )


def taken_away(error: exceptions.RayError) -> bool:
    """Tell whether the owner of an actor's machine took it away."""
    return bool(getattr(error, "preempted", False))


def as_ours(error: exceptions.RayError) -> DistplatError:
    """
    Translate an error of Ray's that no retry helps into one of distplat's.

    What a method raised comes out of it; where that is none of our errors, something is wrong in
    the actor, and neither the user's task nor whoever asked is to blame.
    """
    kind, cause = meaning(error), cause_of(error)
    remedy = _REMEDIES.get(type(error), "")
    if kind is Meaning.RAISED:
        return _raised(error)
    if kind is Meaning.USER:
        return SpecError(Problem(("--runtime-env",), str(error).strip(), remedy))
    if kind is Meaning.OURS:
        return DistplatError(f"error inside distplat: {type(error).__name__}: {cause}")
    head = "a process of the cluster was lost" if kind is Meaning.LOST else "the cluster fails"
    return InfrastructureError(f"{head}: {cause}" + (f"; {remedy}" if remedy else ""))


def _raised(error: exceptions.RayError) -> DistplatError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, DistplatError):
        return cause
    if isinstance(cause, exceptions.RayError):
        return as_ours(cause)
    named = re.search(r"repr=([^,)]+)", str(error))  # no attribute: the class is the cause's, too
    who = named[1] if named else "an actor"
    return InfrastructureError(f"error inside {who}: {type(cause).__name__}: {cause}")


def as_transport_error(error: exceptions.RayError) -> Exception:
    """Give what `Transport.get` raises."""
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
    Give our error for what came through the user's code, or past it, and is not his; else None.

    Of what a method raised only our own errors are meant: others are of actors that the user's
    code has made itself. So are deadlines, of which ours come through a transport, and what Ray
    does not do.
    """
    if isinstance(error, TransportError):
        return InfrastructureError(f"a process of the run does not answer: {error}".rstrip(": "))
    if not isinstance(error, exceptions.RayError):
        return None
    if meaning(error) in (Meaning.RAISED, Meaning.USER, Meaning.LATE, Meaning.OURS):
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, DistplatError) else None
    return as_ours(error)
