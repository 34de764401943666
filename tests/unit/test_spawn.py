"""What Ray is asked for, of what a job says."""

import pytest
import ray
from jobs import job_of

from distplat.actors import spawn
from distplat.actors.spawn import _resources
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy


@pytest.mark.parametrize("needs", [{"CPU": 1, "memory": 2e9, "slot": 0.5}, {"memory": 0}, {}])
def test_resources_become_options_that_ray_takes(needs: dict[str, float]) -> None:
    options = _resources(needs)
    ray.remote(type("Anything", (), {})).options(**options)
    assert {"CPU", "GPU", "memory"}.isdisjoint(options["resources"])
    assert options.get("memory", 0) == needs.get("memory", 0)


def test_what_was_made_is_ended_where_the_rest_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first kill fails, too: the others are made all the same."""
    killed = []

    def make(job: Job, run: str, attempt: int, rank: int, placement: object) -> int:
        if rank == 2:
            raise ValueError("Ray does not want to")
        return rank

    def kill(actor: int) -> None:
        killed.append(actor)
        if actor == 0:
            raise ValueError("no such actor")

    monkeypatch.setattr(spawn, "_check_feasible", lambda job, roles: None)
    monkeypatch.setattr(spawn, "spawn_worker", make)
    monkeypatch.setattr(ray, "kill", kill)
    job = job_of("ring", 3)
    with pytest.raises(ValueError, match="does not want to"):
        spawn.spawn(job, make_strategy(job).roles(job), "run", 0)
    assert killed == [0, 1]
