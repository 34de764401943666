"""
Where a job goes: the address that was given, or what runs on this machine.

    http://HOST:8265    job API of a cluster; the driver runs there    `cli/remote.py`
    HOST:6379, auto     a cluster this machine belongs to; the driver runs here
    local               a Ray of our own, for the time of the run
    (nothing)           the cluster that `ray start` started here, else as `local`

The order of precedence is Ray's: `--address`, RAY_API_SERVER_ADDRESS, RAY_ADDRESS.
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
_REACH_S = 5.0
_GREETING_S = 8.0
_FRAME, _SETTINGS = 9, b"\4\0\0\0\0\0"
"""Bytes of the head of a frame of HTTP/2; kind, flags and stream of settings, after the length."""
_LISTENERS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))

FORMS = "http://HOST:8265, HOST:6379, auto, or local"

VERSION_KEY = "distplat_version"
"""Metadata of a job at the job API that only our jobs have."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that are this machine and that no other reaches."""


@dataclass(frozen=True)
class Target:
    """Where to run, and what chose it."""

    kind: Literal["local", "here", "driver", "jobs"]
    address: str
    origin: str
    """The option or variable that gave the address; empty: nothing did."""


def target_of(option: str | None, environ: Mapping[str, str]) -> Target:
    """
    Choose by option and environment alone; nothing given: `local`, with an empty `origin`.

    Raises:
        SpecError: the address has none of the forms that we know.
    """
    pairs = [("--address", option or "")] + [(name, environ.get(name, "")) for name in _VARIABLES]
    for origin, text in pairs:
        if text:
            return _parse(text, origin)
    return Target("local", "local", "")


def token_at_hand(address: str, environ: Mapping[str, str]) -> str | None:
    """
    Give the token that lies where Ray looks, for a cluster of this machine.

    It opens the user's own clusters. So it goes to no other machine and to no port of another user,
    unless RAY_AUTH_MODE=token says so: then Ray itself sends it to whatever address is given.

    Raises:
        SpecError: see `token_of`.
    """
    if MODE in environ or (address != "auto" and foreign_listener(address)):
        return None
    return token_of(Path.home(), environ) or None


def bring_token(target: Target) -> None:
    """Have Ray use the token at hand for an address that it is given; before it is imported."""
    if target.kind == "driver" and token_at_hand(target.address, os.environ):
        os.environ[MODE] = "token"  # Ray reads it once


def _parse(text: str, origin: str) -> Target:
    if text in ("local", "auto"):
        return Target("local" if text == "local" else "driver", text, origin)
    if text.startswith("ray://"):
        hint = "use the job API, http://HOST:8265, or HOST:6379 on a machine of the cluster"
        raise SpecError(Problem((origin,), "Ray Client (ray://) is not supported", hint))
    if any(mark in text for mark in "@?#"):
        message = "an address may have no user name, password, query or fragment"  # not repeated
        raise SpecError(Problem((origin,), message, "a token goes into RAY_AUTH_TOKEN"))
    is_url = text.startswith(("http://", "https://"))
    if (is_url or _HOST_PORT.fullmatch(text)) and _is_sound(text):
        return Target("jobs" if is_url else "driver", text.rstrip("/"), origin)
    quoted = text if text.isprintable() else repr(text)
    raise SpecError(Problem((origin,), f"{quoted[:80]!r} is no address", f"one of {FORMS}"))


def is_host_port(text: str) -> bool:
    """Say whether a text is `HOST:PORT`."""
    return bool(_HOST_PORT.fullmatch(text)) and _is_sound(text)


def _is_sound(address: str) -> bool:
    try:
        host, _ = host_and_port(address)
    except ValueError:  # a port above 65535, half of an IPv6 address
        return False
    return bool(host)


def host_and_port(address: str) -> tuple[str, int]:
    """Take `HOST:PORT` or a URL apart."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def is_this_machine(host: str) -> bool:
    """Say whether a host is this machine; of names, which others could answer for, `localhost`."""
    if host == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(host)
        if ip.is_loopback:
            return True
        family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing, but finds the way
            return bool(probe.getsockname()[0] == host)
    except (ValueError, OSError):
        return False


def foreign_listener(address: str) -> str:
    """Say which other user listens at an address; empty: none that is known."""
    host, port = host_and_port(address)
    if not is_this_machine(host):
        return f"{host} is another machine"
    foreign = {uid for uid in _listeners(port) if uid not in (0, os.geteuid())}
    return f"port {port} belongs to user {min(foreign)}" if foreign else ""


def why_untrusted(path: Path, stat: os.stat_result) -> str:
    """Say why others may have written a file that names a Ray; empty: nobody else can have."""
    if stat.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {stat.st_uid}"
    shared = stat.st_mode & 0o020 and not _is_own_group(stat.st_uid, stat.st_gid)
    return f"others may write {path}" if shared or stat.st_mode & 0o002 else ""


def _is_own_group(uid: int, gid: int) -> bool:
    """Say whether a group is a user's own, as `useradd` makes one: of that name, with no other."""
    try:
        user, group = pwd.getpwuid(uid).pw_name, grp.getgrgid(gid)
    except KeyError:  # a user whom a container has no name for is in root's group
        return gid == 0
    return group.gr_name == user and set(group.gr_mem) <= {user}


def _listeners(port: int) -> set[int]:
    """Give the users who listen on a port of this machine; where the kernel does not tell, none."""
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

    In a thread of its own: a name that no server knows may keep the resolver for a minute.

    Raises:
        ClusterUnreachable: nobody does, or it takes too long to find out.
    """
    where = host_and_port(address)
    connecting = run_in_thread("connect", lambda: socket.create_connection(where, _REACH_S).close())
    try:
        connecting.result(_REACH_S + 1)
    except (OSError, UnicodeError) as error:  # `TimeoutError` is an `OSError`
        text = f"cannot reach Ray at {address} ({_cause(error)}); {_advice(error)}"
        raise ClusterUnreachable(text) from None


def check_is_ray(address: str, environ: Mapping[str, str], limit_s: float = _GREETING_S) -> None:
    """
    Check that the listener at an address begins as Ray does, with gRPC's settings frame.

    Ray itself would wait 15 s for who says nothing.

    Args:
        address: HOST:PORT.
        environ: with `RAY_USE_TLS`, who connects speaks first, and nothing is heard.
        limit_s: how long to listen.

    Raises:
        ClusterUnreachable: it is something else.
    """
    if environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    received, until = b"", time.monotonic() + limit_s
    with suppress(OSError), socket.create_connection(host_and_port(address), limit_s) as connection:
        while len(received) < _FRAME and (left_s := until - time.monotonic()) > 0:
            connection.settimeout(left_s)
            chunk = connection.recv(_FRAME - len(received))
            if not chunk:
                break
            received += chunk
    if received[3:] != _SETTINGS:
        text = f"what listens at {address} is no Ray: it does not begin as one does"
        raise ClusterUnreachable(f"{text}; is the port right?")


def _cause(error: OSError | UnicodeError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_REACH_S:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, socket.gaierror | UnicodeError):  # a label of a name may be too long
        return "no such host"
    return error.strerror or str(error)


def _advice(error: OSError | UnicodeError) -> str:
    if isinstance(error, socket.gaierror | UnicodeError):
        return "is the name right?"
    return "is `ray start --head` running there, and is the port right?"


@contextmanager
def unset(*names: str) -> Iterator[None]:
    """Take variables of Ray away that would win over an address given to it."""
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def one_line(error: BaseException) -> str:
    """Put Ray's paragraphs into one line; a version mismatch is told in the third of them."""
    return " ".join(str(error).split())[:300] or type(error).__name__


Info = dict[str, Any]
"""A job as the API gives it: the fields of Ray's `JobDetails`."""


class NoSuchJob(Exception):
    """The cluster knows no job of that id."""
