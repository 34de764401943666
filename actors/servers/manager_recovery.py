"""What a server manager that follows a lost one learns from the servers that are there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distplat.actors.transport import Transport, TransportError
from distplat.platform.server_group import Held, ServerGroup

logger = logging.getLogger(__name__)


def adopt(
    transport: Transport,
    group: ServerGroup,
    servers: Mapping[str, Any],
    generation: int,
    limit_s: float,
) -> list[Held]:
    """
    Have a group take over from a manager that was lost; see `ServerGroup.adopt`.

    Args:
        transport: the manager's.
        group: a new one.
        servers: handles of all servers that were ever made, by name.
        generation: number of managers before.
        limit_s: how long a server may take to answer.

    Returns:
        What the servers say.
    """
    held = _ask_held(transport, servers, limit_s)
    for useless in group.adopt(held, servers, generation):
        logger.info("%s is not needed any more", useless)
        transport.kill(servers[useless])
    return held


def _ask_held(transport: Transport, servers: Mapping[str, Any], limit_s: float) -> list[Held]:
    """
    Ask all servers what they keep; those that are gone, or do not answer in time, are left out.

    Args:
        transport: the manager's.
        servers: handles, by name.
        limit_s: how long an answer may take.
    """
    calls = {transport.call(server, "held"): name for name, server in servers.items()}
    answered = transport.wait(list(calls), limit_s, everything=True)
    found = []
    for call in answered:
        try:
            found.append(replace(transport.get(call, limit_s), server=calls[call]))
        except TransportError as error:
            logger.warning("%s: %s", calls[call], error)
    return sorted(found, key=lambda held: held.server)
