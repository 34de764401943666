"""
Connect this process to a Ray cluster as a driver. Importing this module imports Ray.

Separate from `cli/cluster.py`, so that a driver does not import its HTTP client.
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
"""Fields of a runtime environment that have no effect on the driver's own node."""
_GCS_S = 5.0
_NONE_HERE = "no Ray can be joined on this machine"


@contextmanager
def without_job_environment() -> Iterator[bool]:
    """
    Hide the runtime environment that the job API set for its driver, if it is not needed.

    Yields:
        Whether it is hidden. To use a cluster of several nodes, connect again without hiding it.
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
    """Return whether workers on the driver's node can run without a runtime environment."""
    no_user_variables = set(environment.get("env_vars", {})) <= {JOB_VARIABLE}
    no_user_modules = len(environment.get("py_modules", {})) <= 1
    public = {key for key in environment if not key.startswith("_")}
    return no_user_variables and no_user_modules and public <= _REPLACEABLE


def ignores(folder: Path) -> list[Callable[[Path], bool]]:
    """
    Return the tests that Ray derives from the ignore files of a folder.

    Raises:
        SpecError: an ignore file is not text, or has an invalid pattern.
    """
    logger = logging.getLogger("distplat.ignores")
    logger.setLevel(logging.ERROR)  # otherwise Ray logs the name of each ignore file
    try:
        return ray_compat.ignore_tests(folder, logger)
    except (ValueError, IndexError) as error:  # IndexError: a line with only `!`
        text = f"Ray cannot read .gitignore or .rayignore of {folder}: {one_line(error)}"
        raise SpecError(Problem(("--working-dir",), text)) from None


def running_here(say: Callable[[str], None]) -> str | None:
    """
    Return the address of the cluster that `ray start` started on this machine, or None.

    `ray.init(address="auto")` would also find the private Ray of another `submit`, which ends
    with that run. A driver executes code that its cluster sends, and any user can write the file
    in which Ray records the address. So only a cluster of this user or root is joined without a
    request. The file also outlives its cluster, so that the address of a remote head may belong
    to another user by now.

    Args:
        say: called with the reason if a cluster is found but not joined.
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
        except ClusterUnreachable:  # the file of a killed cluster remains
            return None
        reason = _foreign(address)
    if reason:
        remedy = f"; `--address {address}` joins it anyway" if is_host_port(address) else ""
        say(f"not joining the Ray of this machine: {reason}{remedy}")
        return None
    return address


def own_ray_address() -> str:
    """
    Return the address that `auto` stands for.

    Raises:
        ClusterUnreachable: no Ray runs on this machine, or only a Ray of another user.
    """
    try:
        with unset("RAY_ADDRESS"):
            address = ray_compat.address_of_auto()
    except (OSError, ValueError) as error:  # any user can write the file with the address
        raise ClusterUnreachable(f"{_NONE_HERE}: {one_line(error)}") from error
    if not is_host_port(address):
        raise ClusterUnreachable(f"{_NONE_HERE}: {ray_compat.address_file()} holds no address")
    if reason := _foreign(address):
        hint = f"`--address {address}` joins it anyway"
        raise ClusterUnreachable(f"not joining the Ray at {address}: {reason}; {hint}")
    return address


def rays_here() -> list[str]:
    """Return the addresses of all Ray instances on this machine of this user or root."""
    addresses = ray_compat.addresses_here()
    return sorted(address for address in addresses if not _foreign(address))


def _foreign(address: str) -> str:
    """
    Return why a Ray instance is not this user's or root's; empty if it is.

    If the head is on another machine, a process of the cluster on this machine decides.
    """
    if is_this_machine(host_and_port(address)[0]):
        return foreign_listener(address)
    if address in ray_compat.addresses_here():
        return ""
    return "it is on another machine, and no process of it here is yours or root's"


def check_environment(environment: Mapping[str, Any]) -> None:
    """
    Validate a runtime environment before Ray does: Ray would fail later, or ignore unknown keys.

    An unknown key that is similar to none of Ray's may belong to a plug-in of the cluster.

    Args:
        environment: the user's runtime environment.

    Raises:
        SpecError: the environment has a misspelled key, or Ray rejects it.
    """
    option = "--runtime-env"
    fields = set(RuntimeEnv.known_fields)
    suggestions = {key: nearest(key, fields) for key in environment if key not in fields}
    if problems := [
        Problem((option, key), "unknown key", f"did you mean '{suggestion}'?")
        for key, suggestion in suggestions.items()
        if suggestion is not None
    ]:
        raise SpecError(*problems)
    try:
        RuntimeEnv(**environment)
    except (TypeError, ValueError, AttributeError, LookupError, OSError) as error:
        raise SpecError(Problem((option,), one_line(error))) from error


@contextmanager
def connected_to(address: str, *, own: bool = False) -> Iterator[None]:
    """
    Connect as a driver to an address, which may be that of a run's private Ray.

    A private Ray listens only on loopback. Ray would replace a loopback address by the machine's
    address, at which no process listens.

    Args:
        address: HOST:PORT.
        own: the address is one of `rays_here`: use the user's token, as Ray does for `auto`.

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
    Connect as a driver to the Ray that `auto` stands for, which may be a run's private Ray.

    Raises:
        ClusterUnreachable: see `own_ray_address` and `connected`.
    """
    # Not `auto`, which might resolve to another instance than the one just checked.
    with connected_to(own_ray_address(), own=True):
        yield


@contextmanager
def connected(
    address: str,
    runtime_env: Mapping[str, Any],
    shipping: Callable[[Package], None] = lambda package: None,
) -> Iterator[None]:
    """
    Connect as a driver to a cluster.

    On a cluster of one node no files are uploaded: workers import the user's code and distplat from
    the driver's folders, and start a second faster than with a runtime environment. Nodes on
    other machines that join such a cluster later are not used, since they lack the code.

    Args:
        address: HOST:PORT or `auto`.
        runtime_env: environment of workers on other machines; empty: Ray has it from the job.
        shipping: called with the package before it is uploaded; may raise to refuse it.

    Raises:
        SpecError: the folder cannot be uploaded, or the user's token cannot be sent.
        ClusterUnreachable: the cluster is unreachable, has another version, or rejects the token.
    """
    if address != "auto":
        check_listening(address)
    try:
        with unset("RAY_ADDRESS"):  # Ray prefers it to `auto`
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
    Check that Ray can be joined without a long wait.

    Raises:
        ClusterUnreachable: the cluster requires another token, or the server is not Ray.
        SpecError: see `check_token`.
        RayError, ConnectionError: no cluster answers.
    """
    if address == "auto":
        address = ray_compat.address_of_auto()
        ray_compat.use_token_at_hand()  # as Ray does for `auto`
    check_token(Path.home(), os.environ)
    check_is_ray(address, os.environ)
    try:
        ray_compat.check_gcs(address, _GCS_S)
    except ray.exceptions.AuthenticationError:
        text = f"cannot join Ray at {address}: it requires a token, or another one than yours"
        hint = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; `submit --address local` needs none"
        raise ClusterUnreachable(f"{text}; {hint}") from None


def _joined_without_shipping(address: str) -> bool:
    """Connect without an upload if the cluster has one node; return whether it is connected."""
    with without_job_environment() as hidden:
        if not hidden and ray_compat.JOB_CONFIG_VARIABLE in os.environ:
            return False
        _join(address, {}, one_machine=True)
    if sum(node["Alive"] for node in ray.nodes()) == 1:
        return True
    ray.shutdown()
    return False


def _join(address: str, runtime_env: Mapping[str, Any], *, one_machine: bool = False) -> None:
    # The cluster's Python may lack distplat: workers import it from the driver's folder.
    home = str(Path(distplat.__file__).resolve().parent.parent)
    with ray_compat.own_signals():
        ray.init(
            address=address,
            runtime_env=dict(runtime_env),
            job_config=ray_compat.job_config(home, one_machine=one_machine),
            logging_level="warning",
        )
