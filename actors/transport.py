"""
The seam below the ports: calls to actors, and objects that are fetched by whoever needs them.

    client ── call(server, "push", ...) ──▶ reply ── wait, get ──▶ answer, or an exception

What a client does when an answer is late, got lost or will never come is the same over Ray
(`ray_transport.py`) and between threads of one process (`local_transport.py`), where all of these
can be made to happen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class TransportError(Exception):
    """Why there is no answer."""


class AnswerPending(TransportError):
    """The answer, or the object, has not come in time."""


class Unanswered(TransportError):
    """The call may have been carried out, or not: its answer got lost."""


class ActorDied(TransportError):
    """The actor is gone, and what it kept with it; the text says why."""


class Transport(Protocol):
    """One process's way to the actors of its run. Handles, replies and references are opaque."""

    @property
    def node(self) -> str:
        """Name of this process's node: processes of one node may share memory."""

    def call(self, actor: Any, method: str, *args: Any) -> Any:
        """
        Call an actor's method; returns at once.

        Args:
            actor: its handle.
            method: its name.
            args: are copied, so that the caller may write into its arrays afterwards.

        Returns:
            The reply, which will hold the answer.
        """

    def wait(
        self, replies: Sequence[Any], timeout_s: float, *, everything: bool = False
    ) -> list[Any]:
        """
        Wait until one of some replies is here, whatever it holds.

        Args:
            replies: no two are the same.
            timeout_s: how long.
            everything: wait for all of them.

        Returns:
            Some of those that are here; empty: none is.
        """

    def get(self, reference: Any, timeout_s: float) -> Any:
        """
        Give the answer that a reply holds, or an object that somebody has put.

        Raises:
            TransportError: there is none.
            DistplatError: what the method raised; `InfrastructureError` where that is none of ours.
        """

    def put(self, value: Any) -> Any:
        """Keep a copy of an object for others; give the reference, to be sent to them in a list."""

    def prefetch(self, reply: Any, find: Callable[[Any], Any]) -> None:
        """
        Once a reply is here, have an object that it refers to come to this node.

        Args:
            reply: of a call.
            find: gives the object's reference of an answer; None: there is none.
        """

    def kill(self, actor: Any) -> None:
        """End an actor, which may be dead already."""
