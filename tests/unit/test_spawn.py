"""What Ray is asked for, of what a job says."""

import pytest
import ray

from distplat.actors.spawn import _resources


@pytest.mark.parametrize("needs", [{"CPU": 1, "memory": 2e9, "slot": 0.5}, {"memory": 0}, {}])
def test_resources_become_options_that_ray_takes(needs: dict[str, float]) -> None:
    options = _resources(needs)
    ray.remote(type("Anything", (), {})).options(**options)
    assert {"CPU", "GPU", "memory"}.isdisjoint(options["resources"])
    assert options.get("memory", 0) == needs.get("memory", 0)
