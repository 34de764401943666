"""Orders are repeated until they arrive; errors of actors are reported."""

from typing import Any

import pytest
from call_faults import Fault, drain, inject

from distplat.actors.local_transport import Actor, LocalCluster
from distplat.actors.retrying_calls import Orders
from distplat.platform.errors import InfrastructureError, StaleError


class OrderedActor:
    def __init__(self) -> None:
        self.done: set[int] = set()

    def rest(self, attempt: int) -> None:
        self.done.add(attempt)

    def start(self, order: Exception) -> None:
        raise order


def make_orders() -> tuple[LocalCluster, Actor, Orders]:
    cluster = LocalCluster()
    actor = cluster.spawn("worker-0", "here", lambda _: OrderedActor())
    return cluster, actor, Orders(cluster.transport())


@pytest.mark.parametrize("lost", ["request", "reply"])
def test_lost_order_is_sent_again(lost: Any) -> None:
    cluster, actor, orders = make_orders()
    inject(cluster, "rest", Fault(lose=lost), times=3)
    orders.send("worker-0", actor, "rest", 7)
    for _ in range(5):
        drain(cluster, 5)
        assert orders.poll() == []
    assert actor.body.done == {7}
    assert orders._open == []


def test_error_of_an_order_is_reported_once() -> None:
    cluster, actor, orders = make_orders()
    orders.send("worker-0", actor, "start", StaleError("an old one"))
    orders.send("worker-0", actor, "start", KeyError("a module"))
    drain(cluster, 5)
    (_, stale), (role, error) = orders.poll()
    assert (role, type(stale), type(error)) == ("worker-0", StaleError, InfrastructureError)
    assert "error inside worker-0: KeyError: 'a module'" in str(error)
    assert orders.poll() == []


def test_orders_of_a_dead_actor_are_dropped() -> None:
    cluster, actor, orders = make_orders()
    inject(cluster, "rest", Fault(delay_s=1e6))
    orders.send("worker-0", actor, "rest", 1)
    assert orders.poll() == []
    actor.die("for a test")
    assert orders.poll() == []
    assert orders._open == []
