"""Requests to Ray: resources, placement groups, clean-up, limits."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from jobs import job_of

from distplat.actors import hash_seed, ray_compat, spawn
from distplat.actors.spawn import _resources
from distplat.platform.errors import SpecError
from distplat.platform.spec import Job, Scaling
from distplat.strategies.catalog import make_strategy


@pytest.fixture(autouse=True)
def allow_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let actors run on any machine."""
    monkeypatch.setattr(ray_compat, "stays_on_machine", lambda: False)


@pytest.mark.parametrize("needs", [{"CPU": 1, "memory": 2e9, "slot": 0.5}, {"memory": 0}, {}])
def test_resources_are_valid_ray_options(needs: dict[str, float]) -> None:
    options = _resources(needs)
    ray.remote(type("Anything", (), {})).options(**options)
    assert {"CPU", "GPU", "memory"}.isdisjoint(options["resources"])
    assert options.get("memory", 0) == needs.get("memory", 0)


def test_kills_spawned_workers_if_a_later_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first kill fails; the other workers are killed nevertheless."""
    killed = []

    def spawn_worker(job: Job, run: str, attempt: int, rank: int, placement: object) -> int:
        if rank == 2:
            raise ValueError("Ray does not want to")
        return rank

    def kill(actor: int) -> None:
        killed.append(actor)
        if actor == 0:
            raise ValueError("no such actor")

    monkeypatch.setattr(spawn, "_check_feasible", lambda job, roles: None)
    monkeypatch.setattr(spawn, "spawn_worker", spawn_worker)
    monkeypatch.setattr(ray, "kill", kill)
    job = job_of("ring", 3)
    with pytest.raises(ValueError, match="does not want to"):
        spawn.spawn(job, make_strategy(job).roles(job), "run", 0)
    assert killed == [0, 1]


def test_interrupted_spawn_of_script_releases_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The placement group and the spawned processes would exist until the driver ends."""
    ended: list[object] = []

    class ActorClass:
        def options(self, **more: object) -> "ActorClass":
            return self

        def remote(self, location: object) -> str:
            if self in ended:
                raise KeyboardInterrupt
            ended.append(self)
            return "actor"

    actor_class = ActorClass()
    monkeypatch.setattr(ray, "remote", lambda actor: actor_class)
    monkeypatch.setattr(ray, "kill", ended.append)
    monkeypatch.setattr(spawn, "_check_room", lambda needs, settings: None)
    monkeypatch.setattr(spawn, "placement_group", lambda bundles, strategy: "group")
    monkeypatch.setattr(spawn, "remove_placement_group", ended.append)
    with pytest.raises(KeyboardInterrupt):
        spawn.spawn_script(Scaling(num_workers=2), "run", 0)
    assert ended == [actor_class, "actor", "group"]


NODES = ({"CPU": 2.0, "memory": 8e9}, {"CPU": 2.0, "GPU": 1.0, "memory": 4e9}, {"CPU": 16.0})


@pytest.mark.parametrize(
    ("needs", "problem"),
    [
        ([{"CPU": 1.0}] * 4, ""),
        ([{"CPU": 0.0}, {}, {"GPU": 0.0}], ""),
        ([{"CPU": 2.0, "GPU": 1.0, "memory": 4e9}], ""),
        ([{"CPU": 5.0}], "the job needs 5 CPU; the cluster has 4 CPU"),
        (
            [{"CPU": 1.0}, {"CPU": 3.0}],
            "one process needs 3 CPU, which no node has; at most, a node has 2",
        ),
        ([{"GPU": 1.0, "memory": 8e9}], "one process needs 1 GPU, 8e+09 memory, which no node has"),
    ],
)
def test_rejects_resources_that_the_cluster_lacks(
    needs: list[dict[str, float]], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last node is dead; the other two have 4 CPU in total, and neither has 3."""
    nodes = [{"Alive": resources is not NODES[-1], "Resources": resources} for resources in NODES]
    total = {"CPU": 4.0, "GPU": 1.0, "memory": 12e9}
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    if not problem:
        spawn._check_room(needs)
        return
    with pytest.raises(SpecError, match="scaling: ") as raised:
        spawn._check_room(needs)
    assert problem in str(raised.value)


def test_error_for_scripts_names_command_line_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}] * 2
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    error = r"(?s)^--num-workers: .*hint: lower .*--cpus-per-worker"
    for workers, cpus in ((5, 1.0), (1, 3.0)):
        scaling = Scaling(num_workers=workers, resources_per_worker={"CPU": cpus})
        with pytest.raises(SpecError, match=error) as raised:
            spawn.spawn_script(scaling, "run", 0)
        assert "scaling" not in str(raised.value)


def test_lacks_names_the_missing_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_compat, "free_resources", lambda: {"a": {"CPU": 1.0}, "b": {}})
    job, remedy = job_of("ring", 2), "the job's `scaling.resources_per_worker` says what one takes"
    assert spawn.lacks(job, 1) == ""
    assert spawn.lacks(job, 2) == f"2 more workers need 2 CPU, of which 1 are free; {remedy}"
    monkeypatch.setattr(ray_compat, "free_resources", dict)
    assert spawn.lacks(job, 1) == f"1 more worker needs 1 CPU, of which 0 are free; {remedy}"


DRIVERS, BESIDE, ELSEWHERE = (f"{number:056x}" for number in (1, 2, 3))
FREE = {
    DRIVERS: {"CPU": 1.0, "node:10.0.0.1": 0.9},
    BESIDE: {"CPU": 1.0, "node:10.0.0.1": 1.0},
    ELSEWHERE: {"CPU": 8.0, "node:10.0.0.2": 1.0},
}
HERE = {"node:10.0.0.1": 0.0001}


@pytest.fixture
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a driver without uploaded code, on a cluster with a second machine."""
    monkeypatch.setattr(ray_compat, "stays_on_machine", lambda: True)
    monkeypatch.setattr(ray_compat, "free_resources", lambda: FREE)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")


def test_free_resources_of_other_machines_do_not_count(one_machine: None) -> None:
    job, reason = job_of("ring", 2), "on the driver's machine, where the run stays: it began on"
    assert spawn.lacks(job, 2) == ""
    assert spawn.lacks(job, 3).startswith(
        f"3 more workers need 3 CPU, of which 2 are free {reason}"
    )
    assert spawn.lacks(job, 3).endswith("stop it, and `submit --resume` uses all nodes")


def test_all_processes_stay_on_machine_with_the_code(
    one_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine may have another version of distplat at the same path."""
    groups: list[list[dict[str, float]]] = []
    actor_options: list[dict[str, Any]] = []

    class ActorClass:
        def options(self, **options: Any) -> "ActorClass":
            actor_options.append(options)
            return self

        def remote(self, *args: object, **more: object) -> "ActorClass":
            return self

    def remote(*cls: object, **options: object) -> Any:
        return ActorClass() if cls else lambda cls: ActorClass()

    def group(bundles: list[dict[str, float]], strategy: str) -> object:
        groups.append(bundles)
        return SimpleNamespace(bundle_count=len(bundles), bundle_specs=bundles)

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(spawn, "placement_group", group)
    monkeypatch.setattr(spawn, "_check_room", lambda needs, *hints: None)
    monkeypatch.setattr(hash_seed, "options", dict)
    job = job_of({"name": "ps-sync", "num_servers": 1, "replication": 2}, 2)
    job = job.model_copy(update={"failure": job.failure.model_copy(update={"spare_workers": 1})})
    roles = make_strategy(job).roles(job)
    spawn.spawn(job, roles, "run", 0)
    spawn.spawn_server(job, roles, "run", 1, "server-0", beside=DRIVERS)
    spawn.spawn_spare(job, "run", DRIVERS, 0)
    spawn.spawn_script(Scaling(num_workers=2), "run", 0)
    assert len(actor_options) == 9 and all(
        HERE.items() <= options["resources"].items() for options in actor_options
    )
    assert len(groups) == 3
    assert all(HERE.items() <= bundle.items() for bundles in groups for bundle in bundles)
    [backup] = [
        options for options in actor_options if options["name"].endswith("server-0/attempt-1")
    ]
    assert backup["scheduling_strategy"].node_id == BESIDE
