"""
Compare the local versions of Ray and Python with those of a cluster, before an upload.

A job submitted to the job API runs in the cluster's Python, which must be new enough. A driver that
joins a cluster must have the same versions as the cluster, which Ray itself checks.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from typing_extensions import override

from distplat.platform.errors import ClusterUnreachable

OLDEST_PYTHON = (3, 11)
OLDEST_RAY = (2, 59)
_REPLACES_PYTHON = {"conda", "container", "image_uri", "py_executable"}
"""Fields of a runtime environment that may replace the cluster's Python."""
_MISMATCH = re.compile(r"Ray: (\S+)\s+Python: (\S+)")
"""Versions in Ray's "Version mismatch" error: first those of the cluster, then the driver's."""
_LEVEL = "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"


@dataclass(frozen=True)
class Versions:
    """Versions of Ray and its Python."""

    ray: str
    python: str
    """Empty: unknown."""

    @override
    def __str__(self) -> str:
        """`Ray 2.60.0 on Python 3.11.9`."""
        return f"Ray {self.ray} on Python {self.python}" if self.python else f"Ray {self.ray}"


def check_cluster(address: str, theirs: Versions, ours: Versions, env_keys: Collection[str]) -> str:
    """
    Check whether a job can run in the Python of a cluster.

    Args:
        address: address of the job API.
        theirs: versions of the cluster.
        ours: local versions.
        env_keys: fields of the user's runtime environment.

    Returns:
        A note about different versions; empty: the versions are equal.

    Raises:
        ClusterUnreachable: the cluster is too old.
    """
    has_own_python = bool(_REPLACES_PYTHON & set(env_keys))
    uses_python = theirs.python and not has_own_python
    is_python_old = uses_python and _numbers(theirs.python)[:2] < OLDEST_PYTHON
    if _numbers(theirs.ray)[:2] < OLDEST_RAY or is_python_old:
        ray, python = (".".join(map(str, version)) for version in (OLDEST_RAY, OLDEST_PYTHON))
        raise ClusterUnreachable(
            f"the cluster at {address} has {theirs}, and distplat needs Ray {ray} and Python "
            f"{python} there, or later; this machine has {ours}: start the cluster with that"
        )
    is_same_python = not uses_python or _minor(theirs.python) == _minor(ours.python)
    if theirs.ray == ours.ray and is_same_python:
        return ""
    return f"the cluster has {theirs}, this machine {ours}: the job runs with the cluster's"


def driver_mismatch(address: str, text: str) -> str:
    """
    Return a message for Ray's version mismatch error; empty: the error has another cause.

    Args:
        address: address of the cluster.
        text: Ray's error message.
    """
    versions = [Versions(*pair) for pair in _MISMATCH.findall(text)]
    if len(versions) != 2:
        return ""
    cluster, ours = versions
    if cluster.ray == ours.ray and _minor(cluster.python) == _minor(ours.python):
        remedy = f"set {_LEVEL}=minor, which lets a driver of another patch release of Python join"
    else:
        remedy = (
            f"install ray=={cluster.ray} in a Python {cluster.python} here; or give the job API, "
            "--address http://HOST:8265: then the driver runs in the cluster's Python"
        )
    return (
        f"the Ray cluster at {address} has {cluster}, this process {ours}: a driver must have the "
        f"same; {remedy}"
    )


def _minor(version: str) -> tuple[int, ...]:
    return _numbers(version)[:2]


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: (2, 60, 0) for `2.60.0rc1`."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))
