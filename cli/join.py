"""
Being a driver of a cluster, in this process. Importing this imports Ray.

Apart from `cli/cluster.py`, whose HTTP client a driver would load for nothing.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.runtime_env import RuntimeEnv

import distplat
from distplat.actors import ray_compat
from distplat.actors.ray_compat import JOB_CONFIG_VARIABLE
from distplat.actors.ray_token import check_token
from distplat.cli.address import (
    LOOPBACK,
    check_is_ray,
    check_listening,
    foreign_listener,
    host_and_port,
    is_host_port,
    is_this_machine,
    one_line,
    unset,
    why_untrusted,
)
from distplat.cli.package import Package, measure_environment
from distplat.cli.shipping import JOB_VARIABLE
from distplat.cli.versions import driver_mismatch
from distplat.platform.disk import open_regular
from distplat.platform.errors import ClusterUnreachable, Problem, SpecError, StorageError, nearest

_REPLACEABLE = {"working_dir", "py_modules", "excludes", "env_vars"}
"""Parts of a runtime environment that come to the same thing on the driver's own node."""
_GCS_S = 5.0
_NONE_HERE = "no Ray can be joined on this machine"


@contextmanager
def without_job_environment() -> Iterator[bool]:
    """
    Hide the runtime environment that the job API left for its driver, if it can be done without.

    Yields:
        Whether something is hidden: who joins a larger cluster must join again with it.
    """
    job_config = os.environ.get(JOB_CONFIG_VARIABLE)
    config = json.loads(job_config) if job_config else {}
    if job_config is None or not replaceable(config.get("runtime_env", {})):
        yield False
        return
    os.environ[JOB_CONFIG_VARIABLE] = json.dumps({**config, "runtime_env": {}})
    try:
        yield True
    finally:
        os.environ[JOB_CONFIG_VARIABLE] = job_config


def replaceable(environment: Mapping[str, Any]) -> bool:
    """Say whether the driver's own node has everything of a runtime environment anyway."""
    ours_alone = set(environment.get("env_vars", {})) <= {JOB_VARIABLE}
    one_module = len(environment.get("py_modules", {})) <= 1
    public = {key for key in environment if not key.startswith("_")}
    return ours_alone and one_module and public <= _REPLACEABLE


def ignores(folder: Path) -> list[Callable[[Path], bool]]:
    """
    Give the tests that Ray takes from the ignore files of a folder when it packs it.

    Raises:
        SpecError: one of them is no text, or holds no pattern of such a file.
    """
    logger = logging.getLogger("distplat.ignores")
    logger.setLevel(logging.ERROR)  # or each file that it reads is named
    try:
        return ray_compat.ignore_tests(folder, logger)
    except (ValueError, IndexError) as error:  # the latter for a line with `!` alone
        text = f"Ray cannot read .gitignore or .rayignore of {folder}: {one_line(error)}"
        raise SpecError(Problem(("--working-dir",), text)) from None


def running_here(say: Callable[[str], None]) -> str | None:
    """
    Find the cluster that `ray start` started on this machine.

    Not `ray.init(address="auto")`: that finds the private Ray of another `submit` too, which ends
    with that run and would take ours along. Anybody may write where Ray notes the address, and a
    driver runs what its cluster sends: so only a Ray of this user or root is joined unasked. The
    note outlives its Ray, too, and the address of a head elsewhere may be somebody else's by now.

    Args:
        say: is told of one that is not.
    """
    path = ray_compat.address_file()
    try:
        with open_regular(path) as file:
            if file is None:
                return None
            address = file.read(300).decode(errors="replace").strip()
            reason = why_untrusted(path, os.fstat(file.fileno()))
    except StorageError as error:
        address, reason = "", one_line(error)
    if not reason and not is_host_port(address):
        return None
    if not reason:
        try:
            check_listening(address)
        except ClusterUnreachable:  # the file outlives a cluster that was killed
            return None
        reason = _foreign(address)
    if reason:
        remedy = f"; `--address {address}` joins it all the same" if is_host_port(address) else ""
        say(f"not joining the Ray of this machine: {reason}{remedy}")
        return None
    return address


def own_ray_address() -> str:
    """
    Find what `auto` would join.

    Raises:
        ClusterUnreachable: nothing runs on this machine, or somebody else's Ray does.
    """
    try:
        with unset("RAY_ADDRESS"):
            address = ray_compat.address_of_auto()
    except (OSError, ValueError) as error:  # everybody may write where it is noted
        raise ClusterUnreachable(f"{_NONE_HERE}: {one_line(error)}") from error
    if not is_host_port(address):
        raise ClusterUnreachable(f"{_NONE_HERE}: {ray_compat.address_file()} holds no address")
    if why := _foreign(address):
        hint = f"`--address {address}` joins it all the same"
        raise ClusterUnreachable(f"not joining the Ray at {address}: {why}; {hint}")
    return address


def rays_here() -> list[str]:
    """Give the addresses of the Rays of this machine that this user, or root, has started."""
    addresses = ray_compat.addresses_here()
    return sorted(address for address in addresses if not _foreign(address))


def _foreign(address: str) -> str:
    """
    Say whose a Ray of this machine is, if it is neither this user's nor root's; else empty.

    Its head may be another machine: then a part of it here, which is ours, is what tells of it.
    """
    if is_this_machine(host_and_port(address)[0]):
        return foreign_listener(address)
    if address in ray_compat.addresses_here():
        return ""
    return "it is on another machine, and no process of it here is yours or root's"


def check_environment(given: Mapping[str, Any]) -> None:
    """
    Refuse a runtime environment that Ray would refuse later, or of which it would pass over a part.

    A key that is near none of Ray's may be that of a plug-in of the cluster's.

    Args:
        given: the user's own part.

    Raises:
        SpecError: says what is wrong with it.
    """
    option = "--runtime-env"
    fields = set(RuntimeEnv.known_fields)
    near = {key: nearest(key, fields) for key in given if key not in fields}
    if wrong := [
        Problem((option, key), "unknown key", f"did you mean '{meant}'?")
        for key, meant in near.items()
        if meant is not None
    ]:
        raise SpecError(*wrong)
    try:
        RuntimeEnv(**given)
    except (TypeError, ValueError, AttributeError, LookupError, OSError) as error:
        raise SpecError(Problem((option,), one_line(error))) from error


@contextmanager
def connected_to(address: str, *, own: bool = False) -> Iterator[None]:
    """
    Be a driver at an address; that of a run's private Ray is a loopback one, and Ray puts the
    machine's own in its place, where nobody listens.

    Args:
        address: where.
        own: it is one of `rays_here`, which get the token at hand, as Ray gives it to `auto`.

    Raises:
        ClusterUnreachable: see `connected`.
    """
    private = host_and_port(address)[0] in LOOPBACK and address in ray_compat.addresses_here()
    if own:
        ray_compat.use_token_at_hand()
    with ray_compat.loopback() if private else nullcontext(), connected(address, {}):
        yield


@contextmanager
def connected_here() -> Iterator[None]:
    """
    Be a driver of what `auto` would join; a run's private Ray is reached over loopback alone.

    Raises:
        ClusterUnreachable: see `own_ray_address` and `connected`.
    """
    with connected_to(own_ray_address(), own=True):  # not `auto`: that may be another one by now
        yield


@contextmanager
def connected(
    address: str,
    runtime_env: Mapping[str, Any],
    shipping: Callable[[Package], None] = lambda package: None,
) -> Iterator[None]:
    """
    Be a driver of a cluster.

    On a cluster of one node nothing is shipped: workers find the user's folder and distplat where
    the driver has them, and start a second earlier than behind a runtime environment. Nodes of
    other machines that join later get no part of the run: what is there nobody knows.

    Args:
        address: HOST:PORT or `auto`.
        runtime_env: what workers on other machines need; empty: Ray has it from the job already.
        shipping: is told of the user's folder before it is shipped, and may refuse it.

    Raises:
        SpecError: the folder in it cannot be shipped, or the user's token cannot be sent.
        ClusterUnreachable: it cannot be reached, is another version, or refuses our token.
    """
    if address != "auto":
        check_listening(address)
    try:
        with unset("RAY_ADDRESS"):  # Ray would let it win over `auto`
            _check_ray(address)
            if not (replaceable(runtime_env) and _joined_without_shipping(address)):
                if runtime_env:
                    shipping(measure_environment(runtime_env, ignores, ray_compat.MAX_PACKAGE))
                _join(address, runtime_env)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        text = driver_mismatch(address, str(error))
        text = text or f"cannot join Ray at {address}: {one_line(error)}"
        raise ClusterUnreachable(text) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_ray(address: str) -> None:
    """
    See that Ray would be joined in a moment.

    Raises:
        ClusterUnreachable: it wants another token, or is no Ray.
        SpecError: see `check_token`.
        RayError, ConnectionError: nobody is there.
    """
    if address == "auto":
        address = ray_compat.address_of_auto()
        ray_compat.use_token_at_hand()  # as Ray does for it
    check_token(Path.home(), os.environ)
    check_is_ray(address, os.environ)
    try:
        ray_compat.check_gcs(address, _GCS_S)
    except ray.exceptions.AuthenticationError:
        text = f"cannot join Ray at {address}: it wants another token than the one at hand, or any"
        hint = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; `submit --address local` needs none"
        raise ClusterUnreachable(f"{text}; {hint}") from None


def _joined_without_shipping(address: str) -> bool:
    """Connect and ship nothing, if the cluster is one node; False: not connected."""
    with without_job_environment() as hidden:
        if not hidden and ray_compat.JOB_CONFIG_VARIABLE in os.environ:
            return False
        _join(address, {}, one_machine=True)
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        return True
    ray.shutdown()
    return False


def _join(address: str, runtime_env: Mapping[str, Any], *, one_machine: bool = False) -> None:
    # The cluster's Python may know no distplat: workers look for it where the driver has it.
    home = str(Path(distplat.__file__).resolve().parent.parent)
    with ray_compat.own_signals():
        ray.init(
            address=address,
            runtime_env=dict(runtime_env),
            job_config=ray_compat.job_config(home, one_machine=one_machine),
            logging_level="warning",
        )
