"""Spare workers: one per node, taken once; their failures do not affect a run."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
from call_faults import Fault, drain, inject
from jobs import fields_of, job_of

from distplat.actors.local_transport import Actor, LocalCluster
from distplat.actors.spares import Spares
from distplat.platform.errors import Problem, SpecError
from distplat.strategies.catalog import make_job


class FakeProcess:
    def __init__(self, orders: list[Any], broken: set[str], node: str) -> None:
        self._orders, self._broken, self._node = orders, broken, node

    def import_task(self, order: object) -> None:
        if self._node in self._broken:
            raise SpecError(Problem(("task",), "could not import 'train'"))
        self._orders.append(order)

    def ping(self) -> None:
        pass


class SparesOnCluster:
    """Cluster with spares; record the spawned actors and the orders."""

    def __init__(self) -> None:
        self.cluster = LocalCluster()
        self.actors: list[Actor] = []
        self.orders: list[Any] = []
        self.broken: set[str] = set()
        self._order = cast(Any, "the task")
        self.spares = Spares(self.cluster.transport(), self._spawn, lambda: self._order)

    def use_short_deadline(self) -> None:
        """Shorten the deadline of the spares' replies."""
        order, transport = self._order, self.cluster.transport()
        self.spares = Spares(transport, self._spawn, lambda: order, answer_s=0.3)

    def _spawn(self, node: str, number: int) -> Actor:
        body = FakeProcess(self.orders, self.broken, node)
        actor = self.cluster.spawn(f"spare-{number}", node, lambda transport: body)
        self.actors.append(actor)
        return actor

    @property
    def live_actors(self) -> list[str]:
        return [f"{actor.name} on {actor.node}" for actor in self.actors if not actor.died]


@pytest.fixture
def run() -> Iterator[SparesOnCluster]:
    state = SparesOnCluster()
    yield state
    state.spares.end()
    assert drain(state.cluster, 10)
    assert state.live_actors == []
    state.cluster.close()


def test_one_spare_per_node(run: SparesOnCluster) -> None:
    for _ in range(3):
        run.spares.keep(["b", "a", "b"])
    assert drain(run.cluster, 10)
    assert run.live_actors == ["spare-0 on a", "spare-1 on b"]
    assert run.orders == ["the task", "the task"]


def test_spare_is_taken_once_and_replaced(run: SparesOnCluster) -> None:
    run.spares.keep(["a"])
    taken = run.spares.take("a")
    assert taken is run.actors[0]
    assert run.spares.take("a") is None
    run.spares.keep(["a"])
    assert run.live_actors == ["spare-0 on a", "spare-1 on a"]
    run.spares.end()
    assert run.live_actors == ["spare-0 on a"], "a spare in use is ended with the workers"
    run.cluster.transport().kill(taken)


def test_takes_spare_only_from_its_node(run: SparesOnCluster) -> None:
    run.spares.keep(["a"])
    assert run.spares.take("b") is None
    assert run.live_actors == ["spare-0 on a"]


@pytest.mark.parametrize("fault", [Fault(kill="before"), Fault(delay_s=60)], ids=["dead", "frozen"])
def test_unresponsive_spare_is_killed(
    run: SparesOnCluster, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """The spare died with the worker, or froze with the node."""
    run.use_short_deadline()
    run.spares.keep(["a"])
    inject(run.cluster, "ping", fault)
    assert run.spares.take("a") is None
    assert run.live_actors == []
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("the spare worker on node a is not used: ")


def test_slow_reply_does_not_disqualify_spare(run: SparesOnCluster) -> None:
    """An import holds the GIL, so the reply is late; a new process would be slower."""
    run.spares.keep(["a"])
    inject(run.cluster, "ping", Fault(delay_s=0.6))
    assert run.spares.take("a") is run.actors[0]
    run.cluster.transport().kill(run.actors[0])


def test_import_error_is_logged_once_and_not_retried(
    run: SparesOnCluster, caplog: pytest.LogCaptureFixture
) -> None:
    run.broken = {"a"}
    run.spares.keep(["a", "b"])
    assert drain(run.cluster, 10)
    for _ in range(3):
        run.spares.keep(["a", "b"])
    assert run.live_actors == ["spare-1 on b"]
    text = "no spare worker on node a: task: could not import 'train'"
    assert [record.getMessage() for record in caplog.records] == [text]


def test_spare_with_lost_reply_is_usable(run: SparesOnCluster) -> None:
    inject(run.cluster, "import_task", Fault(lose="reply"))
    run.spares.keep(["a"])
    assert drain(run.cluster, 10)
    run.spares.keep(["a"])
    assert run.spares.take("a") is run.actors[0]
    run.cluster.transport().kill(run.actors[0])


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "a sharded optimizer": fields_of({"name": "ring", "shard_optimizer": True}, 2),
    "a train function": {"name": "job", "task": "a:b", "strategy": "ring", "own_loop": True},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_rejects_spares_if_workers_cannot_be_replaced(name: str) -> None:
    with pytest.raises(SpecError) as raised:
        make_job({**UNSUPPORTED[name], "failure": {"spare_workers": True}})
    assert [problem.field for problem in raised.value.problems] == ["failure.spare_workers"]


def test_rejects_spares_with_gpus() -> None:
    with pytest.raises(SpecError, match=r"spare_workers: a spare cannot take over .* GPU"):
        job_of("ring", 2, failure={"spare_workers": True}, scaling={"use_gpu": True})
