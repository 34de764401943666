"""
Wrappers of all private APIs of Ray that distplat uses, each with the reason.

A release of Ray may change them without notice; tests/unit/test_compat.py then fails and names
them. `strategies/torch_compat.py` has the same for torch.
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_system_temp_dir, get_ray_address_file
from ray._private import ray_constants, services, utils
from ray._private.authentication import authentication_token_setup
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.runtime_env.packaging import (
    GCS_STORAGE_MAX_SIZE,
    _get_excludes,
    get_excludes_from_ignore_files,
)
from ray._private.services import get_ray_address_from_environment
from ray._private.state import available_resources_per_node
from ray._private.worker import print_worker_logs
from ray._raylet import InnerGcsClient  # type: ignore[attr-defined]
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)
from ray.job_config import JobConfig

from distplat.actors.process_setup import variables
from distplat.platform.errors import SpecError, encodable

JOB_CONFIG_VARIABLE: str = RAY_JOB_CONFIG_JSON_ENV_VAR
"""Variable with the job API's settings for its driver; no public API returns them."""
_SOCKET = "/ray-12345678/r/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
"""Longest path of a socket, relative to the temporary directory."""
FOLDER_BYTES = (107 if sys.platform == "linux" else 103) - len(_SOCKET)
"""Longest path of the temporary directory, because paths of sockets are limited."""
MAX_PACKAGE: int = GCS_STORAGE_MAX_SIZE - 1
"""Largest size in bytes of a shipped folder or module; Ray rejects more, but only after packing."""
_COLORS = "RAY_COLOR_PREFIX"
_ONE_MACHINE = "distplat_one_machine"
LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env")
"""Loggers that report each upload at level INFO, which a command should not print."""


def submission_id() -> str | None:
    """Return this process's id in Ray's job API; None: not started through it."""
    config = json.loads(os.environ.get(JOB_CONFIG_VARIABLE) or "{}")
    submission: str | None = config.get("metadata", {}).get("job_submission_id")
    return submission


def put_first(key: bytes, value: bytes) -> None:
    """Write a key unless it exists, so that ranks agree on a value without an actor."""
    _internal_kv_put(key, value, overwrite=False)


def put(key: bytes, value: bytes) -> None:
    """Write or overwrite a key; ranks of a group use it as a rendezvous."""
    _internal_kv_put(key, value, overwrite=True)


def delete(key: bytes) -> None:
    """Delete a key, if it exists."""
    _internal_kv_del(key)


def keys(prefix: bytes) -> list[bytes]:
    """Return the keys with a prefix."""
    matches: list[bytes] = _internal_kv_list(prefix)
    return matches


def get(key: bytes) -> bytes | None:
    """Return the value of a key, or None."""
    value: bytes | None = _internal_kv_get(key)
    return value


def delete_all(prefix: bytes) -> None:
    """Delete all keys with a prefix: Ray's key-value store outlives a job."""
    _internal_kv_del(prefix, del_by_prefix=True)


def log_as(name: str) -> None:
    """Set the name that Ray prints before this actor's output, when a spare becomes a worker."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            print(f"{ray_constants.LOG_PREFIX_ACTOR_NAME}{name}", file=stream, flush=True)


@contextmanager
def printed_by_actors(consume: Callable[[Mapping[str, Any]], bool]) -> Iterator[None]:
    """
    Pass the output of actors to `consume` in this block, on a thread of Ray.

    Args:
        consume: called with each batch of lines; returns whether it has handled the batch. Ray
            prints the other batches.
    """
    dispatcher = global_worker_stdstream_dispatcher
    original = list(dispatcher.handlers)

    def handle(batch: Mapping[str, Any]) -> None:
        # An exception, such as a closed stdout, would end Ray's thread and lose all later lines.
        with suppress(OSError, ValueError):
            if not consume(batch):
                for _, handler in original:
                    handler(batch)

    dispatcher.handlers = [("distplat", handle)]
    try:
        yield
    finally:
        dispatcher.handlers = original


def print_batch(batch: Mapping[str, Any], *, colored: bool) -> None:
    """Print lines of an actor as Ray does, but without its deduplication across actors."""
    plain = not colored and _COLORS not in os.environ
    with variables(
        {_COLORS: "0"} if plain else {}
    ):  # of the prefix; the user's lines keep their colors
        stream = sys.stderr if batch["is_err"] else sys.stdout
        lines = [encodable(line, stream) for line in batch["lines"]]
        print_worker_logs({**batch, "lines": lines}, stream)


def free_resources() -> dict[str, dict[str, float]]:
    """Return the free resources of each node; `ray.available_resources` returns only their sum."""
    by_node: dict[str, dict[str, float]] = available_resources_per_node()
    return by_node


def ray_is_ours() -> bool:
    """Return whether this process started Ray's head, whose processes inherit our environment."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.head)


def log_folder() -> str | None:
    """Return the log folder of Ray on each node; None: this process is not connected."""
    node = ray._private.worker._global_node
    return None if node is None else str(node.get_logs_dir_path())


@contextmanager
def loopback() -> Iterator[None]:
    """
    Make a Ray that starts in this block listen only on loopback.

    `_node_ip_address="127.0.0.1"` has no effect: Ray replaces it by the machine's address, except
    on platforms without support for clusters, such as macOS.
    """
    original = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = original


@contextmanager
def own_process_groups() -> Iterator[None]:
    """
    Start Ray's processes in this block in their own process groups.

    A closed terminal, `timeout` and `kill -- -GROUP` signal the driver and its children. Ray
    protects its processes only from SIGINT: on SIGTERM and SIGHUP its head would exit at once, and
    the driver could not shut down cleanly. On Linux Ray's processes still end with the driver; on
    other platforms Ray needs the group to kill them.
    """
    original = services.ConsolePopen
    if sys.platform == "linux":
        services.ConsolePopen = partial(original, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = original


@contextmanager
def own_signals() -> Iterator[None]:
    """
    Keep this process's SIGTERM handler while Ray starts or connects in this block.

    Ray's handler would end the process: by `sys.exit` during the start, later by an abort in C++,
    which replaces Python's handler.
    """
    original = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = original
        handler = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def address_file() -> Path:
    """Return the file with the address of `ray start`; `address="auto"` also finds other Rays."""
    return Path(get_ray_address_file(None))


def temporary_folder() -> Path:
    """
    Return the parent of a local Ray's folder: Ray's default, or `/tmp` if its path is too long.

    Unlike `tempfile.gettempdir` this does not fall back to another disk if one is full.
    """
    return Path("/tmp" if has_long_name(base := wanted_folder()) else base)


def wanted_folder() -> Path:
    """Return `RAY_TMPDIR`, else on Linux `TMPDIR`, else `/tmp`."""
    return Path(get_default_system_temp_dir()).absolute()


def has_long_name(folder: Path) -> bool:
    """Return whether paths of sockets below a directory would be too long."""
    return len(os.fsencode(folder)) > FOLDER_BYTES


def address_of_auto() -> str:
    """
    Return the address that `address="auto"` means: that of `ray start`, or of any Ray process.

    Raises:
        ConnectionError: no Ray was found.
    """
    address: str = get_ray_address_from_environment("auto", None)
    return address


def ask_for_token() -> None:
    """Enable token authentication for a local Ray unless the user has set it, as Ray 2.60 does."""
    if authentication_token_setup.AUTH_MODE_ENV_VAR not in os.environ:
        authentication_token_setup._enable_token_auth()


def use_token_at_hand() -> None:
    """
    Make Ray use the user's token, as for `address="auto"`, but without its warning.

    Raises:
        SpecError: the token file that a variable names is missing or empty.
    """
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    use = authentication_token_setup.maybe_enable_token_auth_if_token_available
    try:
        use(warn_if_disabled=False)
    except ray.exceptions.AuthenticationError as error:
        raise SpecError(str(error).partition(". ")[0]) from None


def check_gcs(address: str, limit_s: float) -> None:
    """
    Check that a Ray answers at an address and accepts the user's token.

    `ray.init` would retry for minutes and not tell the two failures apart.

    Raises:
        ray.exceptions.AuthenticationError: the token is missing or wrong.
        ray.exceptions.RayError: no Ray answers within `limit_s` + 10 s.
    """
    InnerGcsClient.standalone(address, None, int(1000 * limit_s))


def addresses_here() -> set[str]:
    """
    Return the addresses of the Rays that this user or root has started or joined on this machine.

    They are read from command lines of processes. Ray's own search trusts processes of all users,
    which may name any address.
    """
    addresses: set[str] = set()
    for process in services.psutil.process_iter(["cmdline", "uids"]):
        command, uids = process.info["cmdline"], process.info["uids"]
        if uids is None or uids.real not in (0, os.getuid()):
            continue
        if services._is_raylet_process(command):
            options = [arg for arg in command if arg.startswith("--gcs-address=")]
            addresses |= {option.partition("=")[2] for option in options}
    return addresses - {"", "None"}


def ignore_tests(folder: Path, logger: logging.Logger) -> list[Callable[[Path], bool]]:
    """Return Ray's predicates of a folder's ignore files, to count the files that it will pack."""
    uses_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    tests: list[Callable[[Path], bool]] = get_excludes_from_ignore_files(
        folder, uses_gitignore, logger
    )
    return tests


def exclude_test(folder: Path, lines: list[str]) -> Callable[[Path], bool]:
    """Return Ray's predicate of `excludes` (lines of a .gitignore) for paths in a folder."""
    test: Callable[[Path], bool] = _get_excludes(folder, lines)
    return test


def job_config(folder: str, *, one_machine: bool) -> JobConfig:
    """
    Return a config that adds a folder of this machine to the import path of workers.

    Args:
        folder: folder with modules.
        one_machine: see `stays_on_machine`.
    """
    metadata = {_ONE_MACHINE: "1"} if one_machine else {}
    return JobConfig(_py_driver_sys_path=[folder], metadata=metadata)


def stays_on_machine() -> bool:
    """Return whether the driver uses only its own machine of the cluster; see `job_config`."""
    worker = ray._private.worker.global_worker  # no public API returns the job's metadata
    core = getattr(worker, "core_worker", None)  # None: a driver of Ray Client
    return core is not None and _ONE_MACHINE in core.get_job_config().metadata


def with_requests(cls: type[Any], request: Callable[..., Any]) -> type[Any]:
    """
    Derive from Ray's `JobSubmissionClient`, which has no deadlines, to intercept each request.

    Args:
        cls: the client's class.
        request: called with the client, the function that sends a request, and its arguments.
    """

    class Client(cls):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            return request(self, super()._do_request, method, endpoint, **kwargs)

        def ask(self, endpoint: str) -> Any:
            """Send a GET request to an endpoint for which the client has no method."""
            return self._do_request("GET", endpoint)

    return Client
