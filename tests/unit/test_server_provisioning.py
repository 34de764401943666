"""How the server manager gets new servers: wanted until they have come, each brought once."""

import threading
from typing import Any

import pytest

from distplat.actors.servers.server_provisioning import ServerProvisioning, ServerRequest
from distplat.platform.errors import DeadlineExceeded


def making(
    provisioning: ServerProvisioning, server: str, found: dict[str, Any]
) -> threading.Thread:
    def make() -> None:
        found[server] = provisioning.make(server, "node-1")

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    return thread


def test_a_server_is_wanted_until_it_comes() -> None:
    provisioning, found = ServerProvisioning(10.0), dict[str, Any]()
    assert provisioning.next(0.0) is None
    thread = making(provisioning, "server-2", found)
    wanted = ServerRequest("server-2", "node-1")
    assert provisioning.next(10.0) == wanted
    assert provisioning.next(0.0) == wanted, "the first answer may have been lost"
    provisioning.bring("server-9", "nobody asked for it")
    provisioning.bring("server-2", "handle")
    provisioning.bring("server-2", "the same call once more")
    thread.join(10.0)
    assert found == {"server-2": "handle"}
    assert provisioning.next(0.0) is None


def test_two_at_once() -> None:
    provisioning, found = ServerProvisioning(10.0), dict[str, Any]()
    threads = [making(provisioning, name, found) for name in ("server-2", "server-3")]
    for _ in threads:
        wanted = provisioning.next(10.0)
        assert wanted is not None
        provisioning.bring(wanted.server, wanted.server.upper())
    for thread in threads:
        thread.join(10.0)
    assert found == {"server-2": "SERVER-2", "server-3": "SERVER-3"}


def test_one_that_does_not_come_is_named() -> None:
    provisioning = ServerProvisioning(0.05)
    with pytest.raises(DeadlineExceeded) as caught:
        provisioning.make("server-2", "node-1")
    assert caught.value.missing == ("server-2",)
    assert provisioning.next(0.0) is None
