"""
Everything private of Ray that distplat uses, behind one function each, with the reason.

A release of Ray may change it without a word; tests/unit/test_compat.py fails then, name by name.
What is private of torch stands in `strategies/torch_compat.py`.
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
"""Has what the job API gave its driver; nothing public tells of it."""
_SOCKET = "/ray-12345678/r/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
"""The longest name of a socket below the system's directory for such files."""
FOLDER_BYTES = (107 if sys.platform == "linux" else 103) - len(_SOCKET)
"""The longest name that this directory may have: that of a socket has a limit."""
MAX_PACKAGE: int = GCS_STORAGE_MAX_SIZE - 1
"""Bytes of a folder or a module that a driver can ship: Ray refuses more when it has packed it."""
_COLORS = "RAY_COLOR_PREFIX"
_ONE_MACHINE = "distplat_one_machine"
LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env")
"""They log each upload at level INFO, which is no part of a command's output."""


def submission_id() -> str | None:
    """Give the id under which the job API started this process; None: it did not."""
    config = json.loads(os.environ.get(JOB_CONFIG_VARIABLE) or "{}")
    submission: str | None = config.get("metadata", {}).get("job_submission_id")
    return submission


def put_first(key: bytes, value: bytes) -> None:
    """Write a key unless it exists: ranks agree without an actor to ask."""
    _internal_kv_put(key, value, overwrite=False)


def put(key: bytes, value: bytes) -> None:
    """Write a key, whatever it was before: ranks of a group meet by it."""
    _internal_kv_put(key, value, overwrite=True)


def delete(key: bytes) -> None:
    """Remove a key; one that is not there is no error."""
    _internal_kv_del(key)


def keys(prefix: bytes) -> list[bytes]:
    """List the keys that begin so."""
    found: list[bytes] = _internal_kv_list(prefix)
    return found


def get(key: bytes) -> bytes | None:
    """Read a key; None: there is none."""
    value: bytes | None = _internal_kv_get(key)
    return value


def delete_all(prefix: bytes) -> None:
    """Remove all keys that begin so: Ray's store outlives a job."""
    _internal_kv_del(prefix, del_by_prefix=True)


def log_as(name: str) -> None:
    """Have Ray print another name before this actor's lines: it was asked for as a spare."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            print(f"{ray_constants.LOG_PREFIX_ACTOR_NAME}{name}", file=stream, flush=True)


@contextmanager
def printed_by_actors(take: Callable[[Mapping[str, Any]], bool]) -> Iterator[None]:
    """
    Have what actors print handed to `take` in this block, by a thread of Ray's.

    Args:
        take: says whether it has taken a batch of lines; the others are Ray's to print.
    """
    dispatcher = global_worker_stdstream_dispatcher
    before = list(dispatcher.handlers)

    def handle(batch: Mapping[str, Any]) -> None:
        # Where nobody reads any more, this would end Ray's thread: no line would come after that.
        with suppress(OSError, ValueError):
            if not take(batch):
                for _, handler in before:
                    handler(batch)

    dispatcher.handlers = [("distplat", handle)]
    try:
        yield
    finally:
        dispatcher.handlers = before


def print_batch(batch: Mapping[str, Any], *, colored: bool) -> None:
    """Print lines of an actor as Ray does, but those too that another actor has printed alike."""
    plain = not colored and _COLORS not in os.environ
    with variables({_COLORS: "0"} if plain else {}):  # what the user's own print is none of ours
        stream = sys.stderr if batch["is_err"] else sys.stdout
        lines = [encodable(line, stream) for line in batch["lines"]]
        print_worker_logs({**batch, "lines": lines}, stream)


def free_resources() -> dict[str, dict[str, float]]:
    """Give what is free by node: `ray.available_resources` sums over the cluster."""
    by_node: dict[str, dict[str, float]] = available_resources_per_node()
    return by_node


def ray_is_ours() -> bool:
    """Tell whether this process has started Ray's head: its processes have our environment."""
    node = ray._private.worker._global_node
    return node is not None and bool(node.head)


def log_folder() -> str | None:
    """Give where Ray's processes log, on each node; None: this process is not connected."""
    node = ray._private.worker._global_node
    return None if node is None else str(node.get_logs_dir_path())


@contextmanager
def loopback() -> Iterator[None]:
    """
    Have a Ray that starts in this block listen on loopback alone.

    `_node_ip_address="127.0.0.1"` does not do it: Ray puts the machine's own address in its place,
    except where it takes clusters for impossible, as on macOS.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def own_process_groups() -> Iterator[None]:
    """
    Have the processes of a Ray that starts in this block hear no signal to the driver's group.

    A terminal that goes away, `timeout` and `kill -- -GROUP` signal the driver and its children.
    Ray protects its own from SIGINT alone: at SIGTERM and SIGHUP its head ended at once, and the
    driver could end nothing in order any more. On Linux they end with the driver; elsewhere Ray
    needs the group to end them.
    """
    before = services.ConsolePopen
    if sys.platform == "linux":
        services.ConsolePopen = partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


@contextmanager
def own_signals() -> Iterator[None]:
    """
    Have SIGTERM stay this process's own while Ray starts, or is joined, in this block.

    Ray would end the process: by `sys.exit` while it starts, afterwards by an abort in C++, whose
    handler lies above Python's.
    """
    before = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before
        ours = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread() and ours is not None:
            signal.signal(signal.SIGTERM, ours)


def address_file() -> Path:
    """Give where `ray start` notes an address; `address="auto"` finds others' Rays, too."""
    return Path(get_ray_address_file(None))


def temporary_folder() -> Path:
    """
    Give where the folder of a Ray that starts is made: where Ray itself would, if names are short.

    Where that disk is full, Python would choose another one.
    """
    return Path("/tmp" if has_long_name(base := wanted_folder()) else base)


def wanted_folder() -> Path:
    """Give the directory that `RAY_TMPDIR` leads to, on Linux else `TMPDIR`; else `/tmp`."""
    return Path(get_default_system_temp_dir()).absolute()


def has_long_name(folder: Path) -> bool:
    """Say whether sockets below a directory would have too long names."""
    return len(os.fsencode(folder)) > FOLDER_BYTES


def address_of_auto() -> str:
    """
    Give what `address="auto"` would join: what `ray start` noted, or any Ray's process.

    Raises:
        ConnectionError: there is none.
    """
    address: str = get_ray_address_from_environment("auto", None)
    return address


def ask_for_token() -> None:
    """Have a Ray that starts here ask for a token, unless the user has chosen; as Ray 2.60 does."""
    if authentication_token_setup.AUTH_MODE_ENV_VAR not in os.environ:
        authentication_token_setup._enable_token_auth()


def use_token_at_hand() -> None:
    """
    Have Ray send the user's token, as it does for `auto`, but for its warning that it does.

    Raises:
        SpecError: a variable names a file in which there is none.
    """
    logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
    use = authentication_token_setup.maybe_enable_token_auth_if_token_available
    try:
        use(warn_if_disabled=False)
    except ray.exceptions.AuthenticationError as error:
        raise SpecError(str(error).partition(". ")[0]) from None


def check_gcs(address: str, limit_s: float) -> None:
    """
    Check that a Ray answers at an address, and accepts the user's token.

    `ray.init` tries for minutes, and does not say which of the two it was.

    Raises:
        ray.exceptions.AuthenticationError: it wants another token, or any at all.
        ray.exceptions.RayError: nobody who speaks its language answers; after `limit_s` + 10 s.
    """
    InnerGcsClient.standalone(address, None, int(1000 * limit_s))


def addresses_here() -> set[str]:
    """
    Give the addresses of the Rays that this user, or root, has started here, or joined from here.

    As their processes were told them. Ray's own search believes the processes of every user, who
    may name any address.
    """
    addresses: set[str] = set()
    for process in services.psutil.process_iter(["cmdline", "uids"]):
        line, uids = process.info["cmdline"], process.info["uids"]
        if uids is not None and uids.real in (0, os.getuid()) and services._is_raylet_process(line):
            addresses |= {arg.partition("=")[2] for arg in line if arg.startswith("--gcs-address=")}
    return addresses - {"", "None"}


def ignore_tests(folder: Path, logger: logging.Logger) -> list[Callable[[Path], bool]]:
    """Give Ray's tests of a folder's ignore files, to count what it will pack before it does."""
    heeds_git = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    tests: list[Callable[[Path], bool]] = get_excludes_from_ignore_files(folder, heeds_git, logger)
    return tests


def exclude_test(folder: Path, lines: list[str]) -> Callable[[Path], bool]:
    """Give Ray's test of `excludes`, lines of a .gitignore, for what lies in a folder."""
    test: Callable[[Path], bool] = _get_excludes(folder, lines)
    return test


def job_config(folder: str, *, one_machine: bool) -> JobConfig:
    """
    Have workers find modules in a folder of this machine, without a runtime environment.

    Args:
        folder: where modules are.
        one_machine: see `stays_on_machine`.
    """
    metadata = {_ONE_MACHINE: "1"} if one_machine else {}
    return JobConfig(_py_driver_sys_path=[folder], metadata=metadata)


def stays_on_machine() -> bool:
    """Say whether this driver, or that of this actor, has joined for its own machine alone."""
    worker = ray._private.worker.global_worker  # nothing public gives an actor its job's metadata
    core = getattr(worker, "core_worker", None)  # a driver of Ray Client has none, and no such mark
    return core is not None and _ONE_MACHINE in core.get_job_config().metadata


def with_requests(kind: type[Any], request: Callable[..., Any]) -> type[Any]:
    """
    Derive from Ray's `JobSubmissionClient`, which has no deadlines: one place sees each request.

    Args:
        kind: the client's class.
        request: called with the client, what sends, and what is to be sent.
    """

    class Client(kind):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            return request(self, super()._do_request, method, endpoint, **kwargs)

        def ask(self, endpoint: str) -> Any:
            """Give the answer to a question that the client has no method for."""
            return self._do_request("GET", endpoint)

    return Client
