"""
Orders to actors, made again until they are carried out: a lost one would be waited for in vain.

An actor may get an order twice, so it must not matter. One that is gone needs no orders: whoever
asks how it is hears of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from distplat.actors.transport import ActorDied, NotHere, Transport, Unanswered
from distplat.platform.errors import DistplatError

_FETCH_S = 5.0
"""How long an answer that is here may take to be read."""


@dataclass
class _Order:
    role: str
    call: Callable[[], Any]
    reply: Any


class Orders:
    """
    Orders that were given and are not known to be carried out.

    Args:
        transport: by which they are given.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._open: list[_Order] = []

    def give(self, role: str, actor: Any, method: str, *args: Any) -> None:
        """Call an actor's method, which answers when it is carried out."""
        call = partial(self._transport.call, actor, method, *args)
        self._open.append(_Order(role, call, call()))

    def look(self) -> list[tuple[str, DistplatError]]:
        """Give those again that were lost; give the roles that could not carry one out, and why."""
        replies = [order.reply for order in self._open]
        come = self._transport.wait(replies, 0.0, everything=True) if replies else []
        failed: list[tuple[str, DistplatError]] = []
        for order in [one for one in self._open if one.reply in come]:
            try:
                self._transport.get(order.reply, _FETCH_S)
            except (Unanswered, NotHere):
                order.reply = order.call()
                continue
            except ActorDied:
                pass
            except DistplatError as error:
                failed.append((order.role, error))
            self._open.remove(order)
        return failed
