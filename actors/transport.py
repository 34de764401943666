"""
The lowest seam of all communication: calls of actor methods, and references to stored objects.

    client ── call(server, "push", ...) ──▶ reply ── wait, get ──▶ answer, or an exception

There are two implementations: over Ray (`ray_transport.py`) and between threads of one process
(`local_transport.py`). Clients handle late, lost and missing answers in the same way over both, and
tests inject these faults into the local one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class TransportError(Exception):
    """Base class of the reasons for a missing answer."""


class AnswerPending(TransportError):
    """The answer, or the object, did not arrive before the deadline."""


class Unanswered(TransportError):
    """The answer is lost; the call may or may not have been executed."""


class ActorDied(TransportError):
    """The actor died, and its state is lost; the message has the cause."""


class Transport(Protocol):
    """Calls from one process to the actors of its run. Handles and replies are opaque."""

    @property
    def node(self) -> str:
        """Name of this process's node. Processes on one node may share memory."""

    def call(self, actor: Any, method: str, *args: Any) -> Any:
        """
        Call a method of an actor without waiting.

        Args:
            actor: handle of the actor.
            method: name of the method.
            args: copied before the call returns, so that the caller may modify its arrays.

        Returns:
            The reply, a future of the answer.
        """

    def wait(
        self, replies: Sequence[Any], timeout_s: float, *, everything: bool = False
    ) -> list[Any]:
        """
        Wait until a reply is ready, with an answer or with an error.

        Args:
            replies: distinct replies.
            timeout_s: seconds to wait.
            everything: wait for all replies, not for one.

        Returns:
            Ready replies, at least one; empty: the timeout expired.
        """

    def get(self, reference: Any, timeout_s: float) -> Any:
        """
        Return the answer of a reply, or the object of a reference that `put` returned.

        Raises:
            TransportError: the answer is missing.
            DistplatError: raised by the method; other exceptions become `InfrastructureError`.
        """

    def put(self, value: Any) -> Any:
        """Store a copy of an object; return its reference, to be sent to other actors in a list."""

    def prefetch(self, reply: Any, find: Callable[[Any], Any]) -> None:
        """
        Once a reply is ready, fetch an object that its answer refers to to this node.

        Args:
            reply: the reply.
            find: returns the object's reference in an answer, or None.
        """

    def kill(self, actor: Any) -> None:
        """Kill an actor; an actor that is dead already is ignored."""
