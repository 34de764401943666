"""The target of a job: the address, its source, and whether Ray listens there."""

import grp
import os
import pwd
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IFREG
from types import SimpleNamespace

import pytest
from ray._private import ray_constants

from distplat.actors import ray_compat
from distplat.cli import join
from distplat.cli.address import (
    Target,
    check_is_ray,
    check_listening,
    foreign_listener,
    is_this_machine,
    target_of,
    token_at_hand,
    why_untrusted,
)
from distplat.cli.join import own_ray_address, running_here
from distplat.cli.submit import choose_target, connection
from distplat.platform.errors import ClusterUnreachable, SpecError


@pytest.mark.parametrize(
    ("option", "environ", "expected"),
    [
        (None, {}, Target("local", "local", "")),
        (None, {"RAY_ADDRESS": ""}, Target("local", "local", "")),
        ("local", {"RAY_ADDRESS": "auto"}, Target("local", "local", "--address")),
        ("auto", {}, Target("driver", "auto", "--address")),
        ("10.0.0.1:6379", {}, Target("driver", "10.0.0.1:6379", "--address")),
        ("[::1]:6379", {}, Target("driver", "[::1]:6379", "--address")),
        ("http://h:8265/", {}, Target("jobs", "http://h:8265", "--address")),
        ("https://h", {"RAY_ADDRESS": "auto"}, Target("jobs", "https://h", "--address")),
        (None, {"RAY_ADDRESS": "h:1"}, Target("driver", "h:1", "RAY_ADDRESS")),
        (
            None,
            {"RAY_ADDRESS": "h:1", "RAY_API_SERVER_ADDRESS": "http://h:2"},
            Target("jobs", "http://h:2", "RAY_API_SERVER_ADDRESS"),
        ),
    ],
)
def test_precedence_of_address_sources(
    option: str | None, environ: dict[str, str], expected: Target
) -> None:
    assert target_of(option, environ) == expected


@pytest.mark.parametrize(
    "text", ["h", "h:", "h:x", "h:99999", "http://", "http://h:x", "http://h:99999", "ftp://h:1"]
)
def test_rejects_invalid_addresses(text: str) -> None:
    with pytest.raises(SpecError, match="is no address"):
        target_of(text, {})


@pytest.mark.parametrize(
    ("environ", "file", "expected"),
    [
        ({}, None, None),
        ({}, "in_file\n", "in_file"),
        ({"RAY_AUTH_TOKEN": "in_variable"}, "in_file", "in_variable"),
        ({"RAY_AUTH_TOKEN": "in_variable", "RAY_AUTH_MODE": "disabled"}, "in_file", None),
    ],
)
def test_reads_the_token_from_the_places_of_ray(
    environ: dict[str, str], file: str | None, expected: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if file is not None:
        path.write_text(file)
    environ = {**environ, "RAY_AUTH_TOKEN_PATH": str(path)}
    assert token_at_hand("http://127.0.0.1:1", environ) == expected
    assert token_at_hand("auto", environ) == expected


def test_rejects_file_without_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff")
    with pytest.raises(SpecError, match="token holds no token"):
        token_at_hand("http://127.0.0.1:1", {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})


def test_closed_port_fails_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=rf"127.0.0.1:{port} \(connection refused\)"):
        check_listening(f"http://127.0.0.1:{port}")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "text",
    [
        "http://user:pa55word@proxy:8265",
        "https://pa55word@proxy",
        "user:pa55word@h:6379",
        "http://h:8265/?token=pa55word",
        "http://h:8265/#pa55word",
        "ftp://user:pa55word@h:1",
    ],
)
def test_rejects_password_in_address_without_repeating_it(text: str) -> None:
    with pytest.raises(SpecError, match="may have no user name, password") as raised:
        target_of(text, {})
    assert "pa55word" not in str(raised.value)


@pytest.mark.parametrize("variable", [{"RAY_AUTH_TOKEN": "secret"}, {}])
@pytest.mark.parametrize(
    "address",
    [
        "http://192.0.2.1:8265",
        "192.0.2.1:6379",
        "http://localhost.evil:8265",
        "http://[2001:db8::1]",
    ],
)
def test_sends_no_token_to_other_machines(
    address: str, variable: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret")
    environ = {**variable, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert token_at_hand(address, environ) is None


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("::1", True),
        (own_address(), True),
        ("192.0.2.1", False),
        ("2001:db8::1", False),
        ("localhost.evil", False),
        ("", False),
    ],
)
def test_is_this_machine(host: str, is_local: bool) -> None:
    assert is_this_machine(host) == is_local


SERVER = """
import os, socket, sys
os.setuid(54321)
s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()
"""
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can switch users")


@pytest.fixture
def foreign_port() -> Iterator[int]:
    """Return a port on which another user listens."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout is not None and server.stdin is not None
        yield int(server.stdout.readline())
        server.stdin.close()


@ROOT
def test_sends_no_token_to_a_port_of_another_user(foreign_port: int, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    environ = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert token_at_hand(f"http://127.0.0.1:{foreign_port}", environ) is None
    assert (
        foreign_listener(f"127.0.0.1:{foreign_port}")
        == f"port {foreign_port} belongs to user 54321"
    )


def test_own_port_is_not_foreign() -> None:
    with socket.create_server(("127.0.0.1", 0)) as own:
        assert foreign_listener(f"127.0.0.1:{own.getsockname()[1]}") == ""


ME = os.geteuid()
PRIVATE, SHARED, USERS, UNNAMED = 1001, 1002, 100, 54321
GROUPS = {
    0: ("root", []),
    PRIVATE: ("ann", ["ann"]),
    SHARED: ("ann", ["bob"]),
    USERS: ("users", []),
}
NAMES = {0: "root", ME: "ann"}
OWNER_WRITES, GROUP_WRITES = S_IFREG | 0o644, S_IFREG | 0o664


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "why"),
    [
        (OWNER_WRITES, ME, USERS, ""),
        (GROUP_WRITES, ME, PRIVATE, ""),  # umask 002, with a group per user
        (GROUP_WRITES, ME, SHARED, "others may write f"),
        (GROUP_WRITES, ME, USERS, "others may write f"),  # one group for all users
        (GROUP_WRITES, ME, UNNAMED, "others may write f"),
        (OWNER_WRITES, 0, 0, ""),
        (S_IFREG | 0o666, ME, PRIVATE, "others may write f"),
        (OWNER_WRITES, 54321, PRIVATE, "f belongs to user 54321"),
    ],
)
def test_why_untrusted(
    mode: int, uid: int, gid: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getegid", lambda: gid)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name=NAMES[uid]))
    groups = {
        gid: SimpleNamespace(gr_name=name, gr_mem=members)
        for gid, (name, members) in GROUPS.items()
    }
    monkeypatch.setattr(grp, "getgrgid", lambda gid: groups[gid])
    stat = os.stat_result((mode, 0, 0, 1, uid, gid, 0, 0, 0, 0))
    assert why_untrusted(Path("f"), stat) == why


@pytest.fixture
def address_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file in which `ray start` writes its address."""
    file = tmp_path / "ray_current_cluster"
    monkeypatch.setattr(ray_compat, "address_file", lambda: file)
    return file


def test_joins_own_ray(address_file: Path) -> None:
    messages: list[str] = []
    assert running_here(messages.append) is None
    with socket.create_server(("127.0.0.1", 0)) as own:
        address = f"127.0.0.1:{own.getsockname()[1]}"
        address_file.write_text(address)
        assert running_here(messages.append) == address
    assert running_here(messages.append) is None  # no process listens any more
    address_file.write_text("no address")
    assert running_here(messages.append) is None
    assert messages == []


@ROOT
def test_does_not_join_ray_of_another_user(address_file: Path) -> None:
    messages: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as own:
        address_file.write_text(address := f"127.0.0.1:{own.getsockname()[1]}")
        os.chown(address_file, 54321, 54321)
        assert running_here(messages.append) is None
    why = f"{address_file} belongs to user 54321; `--address {address}` joins it anyway"
    assert messages == [f"not joining the Ray of this machine: {why}"]


def test_ignores_untrusted_address_files(address_file: Path) -> None:
    messages: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as own:
        address_file.write_text(f"127.0.0.1:{own.getsockname()[1]}")
        address_file.chmod(0o666)
        assert running_here(messages.append) is None
        address_file.chmod(0o644)
        address_file.rename(address_file.with_name("other"))
        address_file.symlink_to("other")
        assert running_here(messages.append) is None
        address_file.unlink()
        os.mkfifo(address_file)
        assert running_here(messages.append) is None
    reasons = zip(
        messages, ("others may write", "it is a link", "it is not a regular file"), strict=True
    )
    assert all(reason in message for message, reason in reasons)


@ROOT
def test_does_not_join_ray_on_a_port_of_another_user(
    address_file: Path, foreign_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    address_file.write_text(f"127.0.0.1:{foreign_port}")
    assert running_here(messages.append) is None
    assert f"port {foreign_port} belongs to user 54321" in messages[0]
    monkeypatch.setattr(ray_compat, "address_of_auto", lambda: f"127.0.0.1:{foreign_port}")
    with pytest.raises(ClusterUnreachable, match="belongs to user 54321"):
        own_ray_address()


def test_auto_joins_remote_head_only_with_an_own_local_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any user can write the address file of Ray and start a process named `raylet`."""
    head = "192.0.2.7:6379"
    monkeypatch.setattr(ray_compat, "address_of_auto", lambda: head)
    monkeypatch.setattr(ray_compat, "addresses_here", lambda: {head})
    assert own_ray_address() == head
    assert choose_target("auto", print, with_ray=True) == Target("here", head, "--address")
    monkeypatch.setattr(ray_compat, "addresses_here", set)
    with pytest.raises(ClusterUnreachable, match="no process of it here is yours or root's"):
        own_ray_address()
    with pytest.raises(ClusterUnreachable, match=f"`--address {head}` joins it anyway"):
        choose_target("auto", print, with_ray=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff:1", "'utf-8' codec can't decode"),
        (b"10.0.0.1:x", "holds no address"),
        (b"", "holds"),
    ],
)
def test_damaged_address_file_is_not_an_internal_error(
    content: bytes, message: str, address_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address_file.write_bytes(content)
    monkeypatch.setattr(ray_compat, "address_of_auto", address_file.read_text)
    with pytest.raises(ClusterUnreachable, match=message):
        own_ray_address()
    address_file.unlink()
    address_file.mkdir()
    with pytest.raises(ClusterUnreachable, match="Is a directory"):
        own_ray_address()
    assert running_here(lambda line: None) is None


@pytest.mark.parametrize("is_own", [True, False])
def test_address_file_joins_remote_head_only_with_an_own_local_process(
    is_own: bool, address_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file survives the death of the node, and another user may get the head's address."""
    head, messages = "192.0.2.7:6379", list[str]()
    address_file.write_text(head)
    monkeypatch.setattr(join, "check_listening", lambda address: None)
    monkeypatch.setattr(ray_compat, "addresses_here", lambda: {head} if is_own else set())
    assert running_here(messages.append) == (head if is_own else None)
    why = "it is on another machine, and no process of it here is yours or root's"
    remedy = f"`--address {head}` joins it anyway"
    assert messages == ([] if is_own else [f"not joining the Ray of this machine: {why}; {remedy}"])


@pytest.mark.parametrize(
    ("first_bytes", "is_ray"),
    [
        (bytes.fromhex("000018040000000000000300"), True),
        (b"HTTP/1.1 400 Bad Request\r\n", False),
        (b"\0\0", False),
        (b"", False),
        (None, False),  # sends nothing, and keeps the connection open
    ],
)
def test_detects_ray_by_its_first_bytes(first_bytes: bytes | None, is_ray: bool) -> None:
    def serve() -> None:
        client, _ = server.accept()
        with client:
            if first_bytes is None:
                client.recv(1)  # until the client closes
            else:
                client.sendall(first_bytes)

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        limit_s = 60.0 if first_bytes is not None else 0.2
        if is_ray:
            check_is_ray(address, {}, limit_s)
        else:
            check_is_ray(address, {"RAY_USE_TLS": "1"}, limit_s)
            with pytest.raises(ClusterUnreachable, match=f"server at {address} is not Ray"):
                check_is_ray(address, {}, limit_s)
        thread.join(60)


@pytest.mark.parametrize(
    ("address", "over_loopback"), [("127.0.0.1:6380", True), ("192.0.2.1:6379", False)]
)
def test_joins_private_ray_over_loopback(
    address: str, over_loopback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections: list[tuple[object, bool]] = []

    @contextmanager
    def connected(address: object, runtime_env: object) -> Iterator[None]:
        connections.append((address, not ray_constants.ENABLE_RAY_CLUSTER))
        yield

    monkeypatch.setattr(join, "own_ray_address", lambda: address)
    monkeypatch.setattr(join, "connected", connected)
    monkeypatch.setattr(ray_compat, "addresses_here", lambda: {address})
    with join.connected_here():
        pass
    assert connections == [(address, over_loopback)]
    assert ray_constants.ENABLE_RAY_CLUSTER
    connections.clear()
    with join.connected_to(address):
        pass
    with join.connected_to("127.0.0.1:6379"):  # a head that listens on all interfaces
        pass
    assert connections == [(address, over_loopback), ("127.0.0.1:6379", False)]


@pytest.mark.parametrize(
    ("is_terminal", "environ", "is_plain"),
    [
        (False, {}, True),
        (True, {}, False),
        (True, {"NO_COLOR": "1"}, True),
        (True, {"NO_COLOR": ""}, False),
        (False, {"FORCE_COLOR": "1"}, False),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, True),
    ],
)
def test_worker_output_has_no_colors_if_redirected(
    is_terminal: bool, environ: dict[str, str], is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "RAY_COLOR_PREFIX"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    with connection(Target("local", "", ""), Path(), None, None, lambda package: None):
        assert (os.environ.get("RAY_COLOR_PREFIX") == "0") == is_plain


def test_rejects_host_names_with_long_labels() -> None:
    with pytest.raises(ClusterUnreachable, match="no such host"):
        check_listening(f"{'a' * 64}:6379")
