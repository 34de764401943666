"""Transport over Ray: actor calls, and objects in Ray's object store."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import ray
from typing_extensions import override

from distplat.actors.process_setup import log_to_stderr
from distplat.actors.ray_errors import as_transport_error
from distplat.actors.transport import Transport
from distplat.platform.torchrun import ProcessLocation


class RayTransport(Transport):
    """`Transport` whose actor handles and object references are Ray's."""

    @property
    @override
    def node(self) -> str:
        """Ray's id of the node."""
        return str(ray.get_runtime_context().get_node_id())

    @override
    def call(self, actor: Any, method: str, *args: Any) -> Any:
        return getattr(actor, method).remote(*args)

    @override
    def wait(
        self, replies: Sequence[Any], timeout_s: float, *, everything: bool = False
    ) -> list[Any]:
        count = len(replies) if everything else 1
        ready: list[Any] = ray.wait(list(replies), num_returns=count, timeout=timeout_s)[0]
        return ready

    @override
    def get(self, reference: Any, timeout_s: float) -> Any:
        try:
            return ray.get(reference, timeout=timeout_s)
        except ray.exceptions.RayError as error:
            raise as_transport_error(error) from None

    @override
    def put(self, value: Any) -> Any:
        return ray.put(value)

    @override
    def prefetch(self, reply: Any, find: Callable[[Any], Any]) -> None:
        """The callback runs on a thread of Ray, which must not block."""

        def on_done(future: Any) -> None:
            reference = find(future.result()) if future.exception() is None else None
            if reference is not None:
                reference.future()

        reply.future().add_done_callback(on_done)

    @override
    def kill(self, actor: Any) -> None:
        ray.kill(actor)


def location_here() -> ProcessLocation:
    """Return the node of this actor, and the GPUs that Ray has assigned to it."""
    context = ray.get_runtime_context()
    gpus = context.get_accelerator_ids().get("GPU", [])
    return ProcessLocation(context.get_node_id(), ray.util.get_node_ip_address(), tuple(gpus))


def host_here() -> str:
    """Return the host name and address of this node, for messages."""
    return f"{socket.gethostname()}, {ray.util.get_node_ip_address()}"


def alone() -> RayTransport:
    """Return the transport of a Ray actor, and set up logging: the actor has its own process."""
    log_to_stderr()
    return RayTransport()
