"""The server manager requests new servers from the controller; messages may be lost."""

import threading

import pytest
from call_faults import Fault, inject

from distplat.actors.local_transport import Actor, LocalCluster
from distplat.actors.servers.manager import ServerProvisioning
from distplat.platform.errors import ActorLost, DeadlineExceeded, FencedError, NotReadyError


class Controller:
    """Create one server per name; the first `not_ready` requests fail."""

    def __init__(self, not_ready: int = 0) -> None:
        self.not_ready = not_ready
        self.servers: dict[str, str] = {}
        self.requests: list[str] = []

    def make_server(self, attempt: int, server: str, beside: str) -> str:
        if attempt != 1:
            raise FencedError("there is a later manager")
        self.requests.append(server)
        if len(self.requests) <= self.not_ready:
            raise NotReadyError("the run has not begun yet")
        return self.servers.setdefault(server, f"{server} not on {beside}")


def make_provisioning(
    cluster: LocalCluster, attempt: int = 1, limit_s: float = 60.0
) -> ServerProvisioning:
    return ServerProvisioning(cluster.transport("here", "server-manager"), attempt, limit_s)


def spawn_controller(body: Controller) -> tuple[LocalCluster, Actor]:
    cluster = LocalCluster()
    return cluster, cluster.spawn("controller", "here", lambda _: body)


@pytest.mark.parametrize(
    ("fault", "times", "requests"),
    [(Fault(), 1, 1), (Fault(lose="request"), 2, 1), (Fault(lose="reply"), 2, 3)],
)
def test_server_is_created_once_despite_lost_messages(
    fault: Fault, times: int, requests: int
) -> None:
    body = Controller()
    cluster, controller = spawn_controller(body)
    inject(cluster, "make_server", fault, times=times)
    servers = make_provisioning(cluster)
    servers.begin(controller)
    servers.begin(controller)
    assert servers.make("server-2", "node-1") == "server-2 not on node-1"
    assert body.requests == ["server-2"] * requests
    assert servers.make("server-3", "node-2") == "server-3 not on node-2"


def test_retries_until_controller_is_ready() -> None:
    body = Controller(not_ready=3)
    cluster, controller = spawn_controller(body)
    servers = make_provisioning(cluster)
    servers.begin(controller)
    assert servers.make("server-2", "node-1") == "server-2 not on node-1"
    assert len(body.requests) == 4
    body = Controller(not_ready=10**9)
    cluster, controller = spawn_controller(body)
    never = make_provisioning(cluster, limit_s=0.05)
    never.begin(controller)
    with pytest.raises(NotReadyError):
        never.make("server-2", "node-1")
    assert body.requests


def test_waits_for_late_controller() -> None:
    cluster, controller = spawn_controller(Controller())
    servers, results = make_provisioning(cluster), list[str]()
    thread = threading.Thread(
        target=lambda: results.append(servers.make("server-2", "node-1")), daemon=True
    )
    thread.start()
    servers.begin(controller)
    thread.join(60.0)
    assert results == ["server-2 not on node-1"]


def test_missing_controller_is_named_after_the_deadline() -> None:
    with pytest.raises(DeadlineExceeded, match="start_timeout_s") as caught:
        make_provisioning(LocalCluster(), limit_s=0.05).make("server-2", "node-1")
    assert caught.value.missing == ("controller",)


def test_errors_of_lost_controller_and_later_manager() -> None:
    cluster, controller = spawn_controller(Controller())
    earlier = make_provisioning(cluster, attempt=0)
    earlier.begin(controller)
    with pytest.raises(FencedError, match="a later manager"):
        earlier.make("server-2", "node-1")
    controller.die("killed by the test")
    servers = make_provisioning(cluster)
    servers.begin(controller)
    with pytest.raises(ActorLost, match="controller was lost"):
        servers.make("server-2", "node-1")
