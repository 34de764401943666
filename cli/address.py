"""
Cluster addresses: parsing, trust checks and connection checks.

    http://HOST:8265    job API of a cluster; the driver runs there    `cli/remote.py`
    HOST:6379, auto     a cluster of which this machine is a node; the driver runs here
    local               a private Ray instance that lives as long as the run
    (nothing)           the cluster that `ray start` started on this machine, else as `local`

The order of precedence is the same as in Ray: `--address`, RAY_API_SERVER_ADDRESS, RAY_ADDRESS.
"""

import grp
import ipaddress
import os
import pwd
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from distplat.actors.ray_token import MODE, token_of
from distplat.platform.disk import run_in_thread
from distplat.platform.errors import ClusterUnreachable, Problem, SpecError

_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_HOST_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[\w.-]+):\d{1,5}")
_CONNECT_TIMEOUT_S = 5.0
_FIRST_FRAME_TIMEOUT_S = 8.0
_FRAME, _SETTINGS = 9, b"\4\0\0\0\0\0"
"""Length of an HTTP/2 frame header; type, flags and stream id of a settings frame."""
_LISTENERS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))

FORMS = "http://HOST:8265, HOST:6379, auto, or local"

VERSION_KEY = "distplat_version"
"""Job API metadata key that marks jobs submitted by distplat."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts of the loopback interface."""


@dataclass(frozen=True)
class Target:
    """Address to run at, and the setting that selected it."""

    kind: Literal["local", "here", "driver", "jobs"]
    address: str
    origin: str
    """Option or environment variable with the address; empty: no address was given."""


def target_of(option: str | None, environ: Mapping[str, str]) -> Target:
    """
    Choose the target from the option and the environment; without an address: `local`.

    Raises:
        SpecError: the address has an unknown format.
    """
    pairs = [("--address", option or "")] + [(name, environ.get(name, "")) for name in _VARIABLES]
    for origin, text in pairs:
        if text:
            return _parse(text, origin)
    return Target("local", "local", "")


def token_at_hand(address: str, environ: Mapping[str, str]) -> str | None:
    """
    Return the user's Ray token, if the address is trusted: a cluster on this machine.

    The token authorizes access to all clusters of the user. So it is not sent to other machines or
    to ports of other users, unless RAY_AUTH_MODE=token is set: then Ray itself sends the token to
    any address.

    Raises:
        SpecError: see `token_of`.
    """
    if MODE in environ or (address != "auto" and foreign_listener(address)):
        return None
    return token_of(Path.home(), environ) or None


def enable_token(target: Target) -> None:
    """Enable Ray's token authentication for a trusted address; call before importing Ray."""
    if target.kind == "driver" and token_at_hand(target.address, os.environ):
        os.environ[MODE] = "token"  # Ray reads the variable only once


def _parse(text: str, origin: str) -> Target:
    if text in ("local", "auto"):
        return Target("local" if text == "local" else "driver", text, origin)
    if text.startswith("ray://"):
        hint = "use the job API, http://HOST:8265, or HOST:6379 on a machine of the cluster"
        raise SpecError(Problem((origin,), "Ray Client (ray://) is not supported", hint))
    if any(mark in text for mark in "@?#"):
        # The message does not quote the address, which may contain a password.
        message = "an address may have no user name, password, query or fragment"
        raise SpecError(Problem((origin,), message, "a token goes into RAY_AUTH_TOKEN"))
    is_url = text.startswith(("http://", "https://"))
    if (is_url or _HOST_PORT.fullmatch(text)) and _is_valid(text):
        return Target("jobs" if is_url else "driver", text.rstrip("/"), origin)
    quoted = text if text.isprintable() else repr(text)
    raise SpecError(Problem((origin,), f"{quoted[:80]!r} is no address", f"one of {FORMS}"))


def is_host_port(text: str) -> bool:
    """Return whether a string has the form `HOST:PORT`."""
    return bool(_HOST_PORT.fullmatch(text)) and _is_valid(text)


def _is_valid(address: str) -> bool:
    try:
        host, _ = host_and_port(address)
    except ValueError:  # a port above 65535, half of an IPv6 address
        return False
    return bool(host)


def host_and_port(address: str) -> tuple[str, int]:
    """Split `HOST:PORT` or a URL into host and port."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def is_this_machine(host: str) -> bool:
    """
    Return whether a host is this machine.

    `localhost` is the only accepted name: another machine could answer for any other name.
    """
    if host == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(host)
        if ip.is_loopback:
            return True
        family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends no packet, but selects the source address
            return bool(probe.getsockname()[0] == host)
    except (ValueError, OSError):
        return False


def foreign_listener(address: str) -> str:
    """Return a description of the other user that listens at an address, or an empty string."""
    host, port = host_and_port(address)
    if not is_this_machine(host):
        return f"{host} is another machine"
    foreign = {uid for uid in _listeners(port) if uid not in (0, os.geteuid())}
    return f"port {port} belongs to user {min(foreign)}" if foreign else ""


def why_untrusted(path: Path, stat: os.stat_result) -> str:
    """Return why a file with a Ray address is untrusted; empty: no other user can write it."""
    if stat.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {stat.st_uid}"
    shared = stat.st_mode & 0o020 and not _is_own_group(stat.st_uid, stat.st_gid)
    return f"others may write {path}" if shared or stat.st_mode & 0o002 else ""


def _is_own_group(uid: int, gid: int) -> bool:
    """Return whether a group is the user's private group: named like the user, no other members."""
    try:
        user, group = pwd.getpwuid(uid).pw_name, grp.getgrgid(gid)
    except KeyError:  # in a container, a user without a passwd entry is in root's group
        return gid == 0
    return group.gr_name == user and set(group.gr_mem) <= {user}


def _listeners(port: int) -> set[int]:
    """Return the ids of users that listen on a local port; empty without /proc/net."""
    uids = set()
    for table in _LISTENERS:
        with suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    uids.add(int(fields[7]))
    return uids


def check_listening(address: str) -> None:
    """
    Check that a process listens at an address.

    The check runs in a thread: the resolver may block for a minute on an unknown name.

    Raises:
        ClusterUnreachable: no process listens, or the connection times out.
    """
    endpoint = host_and_port(address)
    connecting = run_in_thread(
        "connect", lambda: socket.create_connection(endpoint, _CONNECT_TIMEOUT_S).close()
    )
    try:
        connecting.result(_CONNECT_TIMEOUT_S + 1)
    except (OSError, UnicodeError) as error:  # `TimeoutError` is an `OSError`
        text = f"cannot reach Ray at {address} ({_cause(error)}); {_advice(error)}"
        raise ClusterUnreachable(text) from None


def check_is_ray(
    address: str, environ: Mapping[str, str], limit_s: float = _FIRST_FRAME_TIMEOUT_S
) -> None:
    """
    Check that the server at an address sends gRPC's settings frame first, as Ray does.

    Ray's own client would wait 15 s for a server that sends nothing.

    Args:
        address: HOST:PORT.
        environ: with `RAY_USE_TLS` the client has to send first, so the check is skipped.
        limit_s: deadline.

    Raises:
        ClusterUnreachable: the server is not Ray.
    """
    if environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    received, deadline = b"", time.monotonic() + limit_s
    with suppress(OSError), socket.create_connection(host_and_port(address), limit_s) as connection:
        while len(received) < _FRAME and (left_s := deadline - time.monotonic()) > 0:
            connection.settimeout(left_s)
            chunk = connection.recv(_FRAME - len(received))
            if not chunk:
                break
            received += chunk
    if received[3:] != _SETTINGS:
        text = f"the server at {address} is not Ray: it does not send Ray's first message"
        raise ClusterUnreachable(f"{text}; is the port right?")


def _cause(error: OSError | UnicodeError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_CONNECT_TIMEOUT_S:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, socket.gaierror | UnicodeError):  # UnicodeError: a label is too long
        return "no such host"
    return error.strerror or str(error)


def _advice(error: OSError | UnicodeError) -> str:
    if isinstance(error, socket.gaierror | UnicodeError):
        return "is the name right?"
    return "is `ray start --head` running there, and is the port right?"


@contextmanager
def unset(*names: str) -> Iterator[None]:
    """Unset environment variables that Ray would prefer to an explicit address."""
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def one_line(error: BaseException) -> str:
    """Join the first 300 characters of an error message into one line."""
    # Ray reports a version mismatch in its third paragraph, so that all paragraphs are joined.
    return " ".join(str(error).split())[:300] or type(error).__name__


Info = dict[str, Any]
"""A job of the job API: the fields of Ray's `JobDetails`."""


class NoSuchJob(Exception):
    """The cluster has no job with this id."""
