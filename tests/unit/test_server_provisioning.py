"""How the server manager gets new servers: by a call of the controller, which may be lost."""

import threading

import pytest
from call_faults import Fault, inject

from distplat.actors.local_transport import Actor, LocalCluster
from distplat.actors.servers.manager import ServerProvisioning
from distplat.platform.errors import ActorLost, DeadlineExceeded, FencedError, NotReadyError


class Controller:
    """Makes a server for a name, once; at first it has not begun."""

    def __init__(self, not_ready: int = 0) -> None:
        self.not_ready = not_ready
        self.made: dict[str, str] = {}
        self.asked: list[str] = []

    def make_server(self, attempt: int, server: str, beside: str) -> str:
        if attempt != 1:
            raise FencedError("there is a later manager")
        self.asked.append(server)
        if len(self.asked) <= self.not_ready:
            raise NotReadyError("the run has not begun yet")
        return self.made.setdefault(server, f"{server} not on {beside}")


def provisioning(
    cluster: LocalCluster, attempt: int = 1, limit_s: float = 60.0
) -> ServerProvisioning:
    return ServerProvisioning(cluster.transport("here", "server-manager"), attempt, limit_s)


def controlled(body: Controller) -> tuple[LocalCluster, Actor]:
    cluster = LocalCluster()
    return cluster, cluster.spawn("controller", "here", lambda _: body)


@pytest.mark.parametrize(
    ("fault", "times", "asked"),
    [(Fault(), 1, 1), (Fault(lose="request"), 2, 1), (Fault(lose="reply"), 2, 3)],
)
def test_a_server_is_made_once_whatever_is_lost(fault: Fault, times: int, asked: int) -> None:
    body = Controller()
    cluster, controller = controlled(body)
    inject(cluster, "make_server", fault, times=times)
    servers = provisioning(cluster)
    servers.begin(controller)
    servers.begin(controller)
    assert servers.make("server-2", "node-1") == "server-2 not on node-1"
    assert body.asked == ["server-2"] * asked
    assert servers.make("server-3", "node-2") == "server-3 not on node-2"


def test_a_controller_that_has_not_begun_is_asked_again() -> None:
    body = Controller(not_ready=3)
    cluster, controller = controlled(body)
    servers = provisioning(cluster)
    servers.begin(controller)
    assert servers.make("server-2", "node-1") == "server-2 not on node-1"
    assert len(body.asked) == 4
    never = provisioning(controlled(Controller(not_ready=10**9))[0], limit_s=0.05)
    never.begin(controlled(Controller(not_ready=10**9))[1])
    with pytest.raises(NotReadyError):
        never.make("server-2", "node-1")


def test_a_controller_that_comes_later_is_waited_for() -> None:
    cluster, controller = controlled(Controller())
    servers, found = provisioning(cluster), list[str]()
    thread = threading.Thread(
        target=lambda: found.append(servers.make("server-2", "node-1")), daemon=True
    )
    thread.start()
    servers.begin(controller)
    thread.join(60.0)
    assert found == ["server-2 not on node-1"]


def test_one_that_never_comes_is_named() -> None:
    with pytest.raises(DeadlineExceeded, match="start_timeout_s") as caught:
        provisioning(LocalCluster(), limit_s=0.05).make("server-2", "node-1")
    assert caught.value.missing == ("controller",)


def test_the_controller_is_gone_or_has_a_later_manager() -> None:
    cluster, controller = controlled(Controller())
    earlier = provisioning(cluster, attempt=0)
    earlier.begin(controller)
    with pytest.raises(FencedError, match="a later manager"):
        earlier.make("server-2", "node-1")
    controller.die("for a test")
    servers = provisioning(cluster)
    servers.begin(controller)
    with pytest.raises(ActorLost, match="controller was lost"):
        servers.make("server-2", "node-1")
