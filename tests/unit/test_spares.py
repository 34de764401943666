"""Spare workers: one on each node, taken once, and never in the way of a run."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
from call_faults import Fault, drain, inject
from jobs import fields_of, job_of

from distplat.actors.local_transport import Actor, LocalCluster
from distplat.actors.spares import Spares
from distplat.platform.errors import Problem, SpecError
from distplat.strategies.catalog import make_job


class _Process:
    def __init__(self, ordered: list[Any], broken: set[str], node: str) -> None:
        self._ordered, self._broken, self._node = ordered, broken, node

    def import_task(self, order: object) -> None:
        if self._node in self._broken:
            raise SpecError(Problem(("task",), "could not import 'train'"))
        self._ordered.append(order)

    def ping(self) -> None:
        pass


class _Run:
    """A cluster with spares on it, and what was made."""

    def __init__(self) -> None:
        self.cluster = LocalCluster()
        self.made: list[Actor] = []
        self.ordered: list[Any] = []
        self.broken: set[str] = set()
        self._order = cast(Any, "the task")
        self.spares = Spares(self.cluster.transport(), self._make, lambda: self._order)

    def impatient(self) -> None:
        """Have spares that are given up soon."""
        order, transport = self._order, self.cluster.transport()
        self.spares = Spares(transport, self._make, lambda: order, answer_s=0.3)

    def _make(self, node: str, number: int) -> Actor:
        body = _Process(self.ordered, self.broken, node)
        actor = self.cluster.spawn(f"spare-{number}", node, lambda transport: body)
        self.made.append(actor)
        return actor

    @property
    def living(self) -> list[str]:
        return [f"{actor.name} on {actor.node}" for actor in self.made if not actor.died]


@pytest.fixture
def run() -> Iterator[_Run]:
    made = _Run()
    yield made
    made.spares.end()
    assert drain(made.cluster, 10)
    assert made.living == []
    made.cluster.close()


def test_there_is_one_on_each_node(run: _Run) -> None:
    for _ in range(3):
        run.spares.keep(["b", "a", "b"])
    assert drain(run.cluster, 10)
    assert run.living == ["spare-0 on a", "spare-1 on b"]
    assert run.ordered == ["the task", "the task"]


def test_one_is_taken_once_and_followed_by_another(run: _Run) -> None:
    run.spares.keep(["a"])
    taken = run.spares.take("a")
    assert taken is run.made[0]
    assert run.spares.take("a") is None
    run.spares.keep(["a"])
    assert run.living == ["spare-0 on a", "spare-1 on a"]
    run.spares.end()
    assert run.living == ["spare-0 on a"], "a worker is ended with the workers"
    run.cluster.transport().kill(taken)


def test_none_is_taken_from_another_node(run: _Run) -> None:
    run.spares.keep(["a"])
    assert run.spares.take("b") is None
    assert run.living == ["spare-0 on a"]


@pytest.mark.parametrize("fault", [Fault(kill="before"), Fault(delay_s=60)], ids=["dead", "frozen"])
def test_one_that_does_not_answer_is_ended(
    run: _Run, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """It died with the worker, or is as frozen as the node is: a new process is made."""
    run.impatient()
    run.spares.keep(["a"])
    inject(run.cluster, "ping", fault)
    assert run.spares.take("a") is None
    assert run.living == []
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("the spare worker on node a is not used: ")


def test_one_that_loads_a_library_is_taken_all_the_same(run: _Run) -> None:
    """Its answer is late, as the loader holds the GIL; a new process has all of it to load."""
    run.spares.keep(["a"])
    inject(run.cluster, "ping", Fault(delay_s=0.6))
    assert run.spares.take("a") is run.made[0]
    run.cluster.transport().kill(run.made[0])


def test_one_that_cannot_import_is_said_once_and_not_made_again(
    run: _Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.broken = {"a"}
    run.spares.keep(["a", "b"])
    assert drain(run.cluster, 10)
    for _ in range(3):
        run.spares.keep(["a", "b"])
    assert run.living == ["spare-1 on b"]
    text = "no spare worker on node a: task: could not import 'train'"
    assert [record.getMessage() for record in caplog.records] == [text]


def test_one_whose_answer_was_lost_may_be_there(run: _Run) -> None:
    inject(run.cluster, "import_task", Fault(lose="reply"))
    run.spares.keep(["a"])
    assert drain(run.cluster, 10)
    run.spares.keep(["a"])
    assert run.spares.take("a") is run.made[0]
    run.cluster.transport().kill(run.made[0])


REFUSED: dict[str, dict[str, Any]] = {
    "a sharded optimizer": fields_of({"name": "ring", "shard_optimizer": True}, 2),
    "a train function": {"name": "job", "task": "a:b", "strategy": "ring", "own_loop": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_none_could_take_a_place_it_is_refused(name: str) -> None:
    with pytest.raises(SpecError) as raised:
        make_job({**REFUSED[name], "failure": {"spare_workers": True}})
    assert [problem.field for problem in raised.value.problems] == ["failure.spare_workers"]


def test_with_gpus_it_is_refused() -> None:
    with pytest.raises(SpecError, match=r"spare_workers: a spare cannot take over .* GPU"):
        job_of("ring", 2, failure={"spare_workers": True}, scaling={"use_gpu": True})
