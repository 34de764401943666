"""
Versions of Ray and Python, here and on a cluster, compared before anything is shipped.

A job that is handed to the job API runs in the cluster's Python: theirs must be new enough. A
driver that joins a cluster must have the cluster's versions, which Ray itself checks.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from distplat.platform.errors import ClusterUnreachable

OLDEST_PYTHON = (3, 11)
OLDEST_RAY = (2, 59)
_BRINGS_PYTHON = {"conda", "container", "image_uri", "py_executable"}
"""Parts of a runtime environment that may bring another Python than the cluster's."""
_RAYS_OWN = re.compile(r"Ray: (\S+)\s+Python: (\S+)")
"""How Ray's "Version mismatch" gives first the cluster's, then the driver's."""
_LEVEL = "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL"


@dataclass(frozen=True)
class Versions:
    """Versions of Ray and of the Python that it runs in."""

    ray: str
    python: str
    """Empty: not known."""

    def __str__(self) -> str:
        """`Ray 2.60.0 on Python 3.11.9`."""
        return f"Ray {self.ray} on Python {self.python}" if self.python else f"Ray {self.ray}"


def check_cluster(address: str, theirs: Versions, ours: Versions, env_keys: Collection[str]) -> str:
    """
    See whether a job that is handed to a cluster's job API can run there.

    Args:
        address: of the job API.
        theirs: what the cluster has.
        ours: what is here.
        env_keys: the parts of the runtime environment that the user gave.

    Returns:
        What is worth a word; empty: the same versions are here and there.

    Raises:
        ClusterUnreachable: the cluster is too old.
    """
    old = _numbers(theirs.ray)[:2] < OLDEST_RAY
    brings_python = bool(_BRINGS_PYTHON & set(env_keys))
    if theirs.python and not brings_python and _numbers(theirs.python)[:2] < OLDEST_PYTHON:
        old = True
    if old:
        ray, python = (".".join(map(str, version)) for version in (OLDEST_RAY, OLDEST_PYTHON))
        raise ClusterUnreachable(
            f"the cluster at {address} has {theirs}, and distplat needs Ray {ray} and Python "
            f"{python} there, or later; this machine has {ours}: start the cluster with that"
        )
    same_python = brings_python or not theirs.python or _minor(theirs.python) == _minor(ours.python)
    if theirs.ray == ours.ray and same_python:
        return ""
    return f"the cluster has {theirs}, this machine {ours}: the job runs with the cluster's"


def driver_mismatch(address: str, text: str) -> str:
    """
    Say in our words why Ray lets this process not join a cluster; empty: not for its versions.

    Args:
        address: of the cluster.
        text: Ray's words.
    """
    versions = [Versions(*pair) for pair in _RAYS_OWN.findall(text)]
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
    """Give the numbers of `2.60.0rc1`; what is no number ends them."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))
