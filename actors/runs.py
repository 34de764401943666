"""
Runs that go on, seen from outside: which there are, and their actors by role.

A run's actors are named, in a namespace of the run's own name; so any process that is connected to
the same Ray finds them, and nothing has to be told where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from distplat.platform.errors import DistplatError, Problem, SpecError, hint


@dataclass(frozen=True)
class RunName:
    """A run that goes on."""

    run: str
    """Its name: unique on the cluster."""
    job: str
    """The name of its job."""

    def actor(self, role: str) -> Any:
        """
        Give the newest actor of a role: one that was replaced has an attempt in its name.

        Raises:
            ValueError: there is none, or no more.
        """
        names = [name for name in named_actors().get(self.run, []) if self._is(name, role)]
        if not names:
            raise ValueError(f"run {self.run} has no {role}")
        return ray.get_actor(max(names, key=_attempt), namespace=self.run)

    def _is(self, name: str, role: str) -> bool:
        return name == f"{self.job}/{role}" or name.startswith(f"{self.job}/{role}/attempt-")


def find_runs(name: str) -> list[RunName]:
    """
    Find runs on the Ray that this process is connected to, the oldest first.

    Args:
        name: of a job, or of a run.

    Raises:
        SpecError: nothing of that name is running.
        DistplatError: this process is not connected to Ray.
    """
    if not ray.is_initialized():
        raise DistplatError("not connected to Ray: call ray.init(address=...) first")
    runs = {
        run: names[0].split("/")[0]
        for run, names in sorted(named_actors().items())
        if "/" in names[0]
    }
    found = [RunName(run, job) for run, job in runs.items() if name in (run, job)]
    if not found:
        known = {*runs, *runs.values()}
        raise SpecError(Problem((), f"no run or job {name!r} is running", hint(name, known)))
    return found  # names of runs end with the time


def named_actors() -> dict[str, list[str]]:
    """Give the names of all named actors by namespace, which for ours is the run."""
    found: dict[str, list[str]] = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        found.setdefault(actor["namespace"], []).append(actor["name"])
    return found


def _attempt(name: str) -> tuple[int, ...]:
    """Read `attempt-3`, or `attempt-3.1` of a worker that was made before that attempt began."""
    numbers = name.rsplit("-", 1)[1] if "/attempt-" in name else "0"
    return tuple(map(int, numbers.split(".")))
