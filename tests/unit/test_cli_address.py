"""Where a job goes: what the address says, who said it, and whether anybody is there."""

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
def test_the_address_comes_from_the_strongest_source(
    option: str | None, environ: dict[str, str], expected: Target
) -> None:
    assert target_of(option, environ) == expected


@pytest.mark.parametrize(
    "text", ["h", "h:", "h:x", "h:99999", "http://", "http://h:x", "http://h:99999", "ftp://h:1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="is no address"):
        target_of(text, {})


@pytest.mark.parametrize(
    ("environ", "file", "expected"),
    [
        ({}, None, None),
        ({}, "filed\n", "filed"),
        ({"RAY_AUTH_TOKEN": "given"}, "filed", "given"),
        ({"RAY_AUTH_TOKEN": "given", "RAY_AUTH_MODE": "disabled"}, "filed", None),
    ],
)
def test_the_token_is_taken_where_ray_looks(
    environ: dict[str, str], file: str | None, expected: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if file is not None:
        path.write_text(file)
    environ = {**environ, "RAY_AUTH_TOKEN_PATH": str(path)}
    assert token_at_hand("http://127.0.0.1:1", environ) == expected
    assert token_at_hand("auto", environ) == expected


def test_a_file_that_holds_no_token_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff")
    with pytest.raises(SpecError, match="token holds no token"):
        token_at_hand("http://127.0.0.1:1", {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})


def test_a_closed_port_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(ClusterUnreachable, match=rf"127.0.0.1:{port} \(connection refused\)"):
        check_listening(f"http://127.0.0.1:{port}")
    assert time.monotonic() - began < 5


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
def test_a_password_in_an_address_is_refused_and_not_repeated(text: str) -> None:
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
def test_no_token_goes_to_another_machine_unasked(
    address: str, variable: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret")
    environ = {**variable, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert token_at_hand(address, environ) is None


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(way.getsockname()[0])


@pytest.mark.parametrize(
    ("host", "here"),
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
def test_which_hosts_are_this_machine(host: str, here: bool) -> None:
    assert is_this_machine(host) == here


SERVER = """
import os, socket, sys
os.setuid(54321)
s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()
"""
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may be another user")


@pytest.fixture
def foreign_port() -> Iterator[int]:
    """Give a port on which another user listens."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        yield int(other.stdout.readline())
        other.stdin.close()


@ROOT
def test_no_token_goes_to_another_users_port(foreign_port: int, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    environ = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert token_at_hand(f"http://127.0.0.1:{foreign_port}", environ) is None
    assert (
        foreign_listener(f"127.0.0.1:{foreign_port}")
        == f"port {foreign_port} belongs to user 54321"
    )


def test_a_port_of_ones_own_belongs_to_no_stranger() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mine:
        assert foreign_listener(f"127.0.0.1:{mine.getsockname()[1]}") == ""


ME = os.geteuid()
OWN, OTHERS_TOO, USERS, NAMELESS = 1001, 1002, 100, 54321
GROUPS = {
    0: ("root", []),
    OWN: ("ann", ["ann"]),
    OTHERS_TOO: ("ann", ["bob"]),
    USERS: ("users", []),
}
NAMES = {0: "root", ME: "ann"}
OPEN, GROUP_MAY = S_IFREG | 0o644, S_IFREG | 0o664


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "why"),
    [
        (OPEN, ME, USERS, ""),
        (GROUP_MAY, ME, OWN, ""),  # umask 002, where each user has a group
        (GROUP_MAY, ME, OTHERS_TOO, "others may write f"),
        (GROUP_MAY, ME, USERS, "others may write f"),  # where all have the same
        (GROUP_MAY, ME, NAMELESS, "others may write f"),
        (OPEN, 0, 0, ""),
        (S_IFREG | 0o666, ME, OWN, "others may write f"),
        (OPEN, 54321, OWN, "f belongs to user 54321"),
    ],
)
def test_whose_word_is_taken_for_where_ray_is(
    mode: int, uid: int, gid: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getegid", lambda: gid)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name=NAMES[uid]))
    groups = {gid: SimpleNamespace(gr_name=name, gr_mem=of) for gid, (name, of) in GROUPS.items()}
    monkeypatch.setattr(grp, "getgrgid", lambda gid: groups[gid])
    stat = os.stat_result((mode, 0, 0, 1, uid, gid, 0, 0, 0, 0))
    assert why_untrusted(Path("f"), stat) == why


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the file in which `ray start` notes its address."""
    file = tmp_path / "ray_current_cluster"
    monkeypatch.setattr(ray_compat, "address_file", lambda: file)
    return file


def test_ones_own_ray_is_joined(noted: Path) -> None:
    told: list[str] = []
    assert running_here(told.append) is None
    with socket.create_server(("127.0.0.1", 0)) as mine:
        address = f"127.0.0.1:{mine.getsockname()[1]}"
        noted.write_text(address)
        assert running_here(told.append) == address
    assert running_here(told.append) is None  # nobody listens any more
    noted.write_text("no address")
    assert running_here(told.append) is None
    assert told == []


@ROOT
def test_a_ray_that_another_user_noted_is_not_joined(noted: Path) -> None:
    told: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as mine:
        noted.write_text(address := f"127.0.0.1:{mine.getsockname()[1]}")
        os.chown(noted, 54321, 54321)
        assert running_here(told.append) is None
    why = f"{noted} belongs to user 54321; `--address {address}` joins it anyway"
    assert told == [f"not joining the Ray of this machine: {why}"]


def test_a_link_a_pipe_or_a_file_that_others_may_write_is_not_believed(noted: Path) -> None:
    told: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as mine:
        noted.write_text(f"127.0.0.1:{mine.getsockname()[1]}")
        noted.chmod(0o666)
        assert running_here(told.append) is None
        noted.chmod(0o644)
        noted.rename(noted.with_name("other"))
        noted.symlink_to("other")
        assert running_here(told.append) is None
        noted.unlink()
        os.mkfifo(noted)
        assert running_here(told.append) is None
    whys = zip(told, ("others may write", "it is a link", "it is not a regular file"), strict=True)
    assert all(why in one for one, why in whys)


@ROOT
def test_a_ray_on_another_users_port_is_not_joined(
    noted: Path, foreign_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    noted.write_text(f"127.0.0.1:{foreign_port}")
    assert running_here(told.append) is None
    assert f"port {foreign_port} belongs to user 54321" in told[0]
    monkeypatch.setattr(ray_compat, "address_of_auto", lambda: f"127.0.0.1:{foreign_port}")
    with pytest.raises(ClusterUnreachable, match="belongs to user 54321"):
        own_ray_address()


def test_a_head_elsewhere_is_joined_where_a_part_of_it_here_is_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everybody may write the file in which Ray notes addresses, and start a process `raylet`."""
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
    ("content", "told"),
    [
        (b"\xff:1", "'utf-8' codec can't decode"),
        (b"10.0.0.1:x", "holds no address"),
        (b"", "holds"),
    ],
)
def test_a_note_that_is_none_is_no_error_inside_distplat(
    content: bytes, told: str, noted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted.write_bytes(content)
    monkeypatch.setattr(ray_compat, "address_of_auto", noted.read_text)
    with pytest.raises(ClusterUnreachable, match=told):
        own_ray_address()
    noted.unlink()
    noted.mkdir()
    with pytest.raises(ClusterUnreachable, match="Is a directory"):
        own_ray_address()
    assert running_here(lambda line: None) is None


@pytest.mark.parametrize("ours", [True, False])
def test_a_noted_head_elsewhere_is_joined_only_where_a_part_of_it_here_is_ours(
    ours: bool, noted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note stays where a node is killed, and the head's address gets another owner."""
    head, told = "192.0.2.7:6379", list[str]()
    noted.write_text(head)
    monkeypatch.setattr(join, "check_listening", lambda address: None)
    monkeypatch.setattr(ray_compat, "addresses_here", lambda: {head} if ours else set())
    assert running_here(told.append) == (head if ours else None)
    why = "it is on another machine, and no process of it here is yours or root's"
    remedy = f"`--address {head}` joins it anyway"
    assert told == ([] if ours else [f"not joining the Ray of this machine: {why}; {remedy}"])


@pytest.mark.parametrize(
    ("begin", "is_ray"),
    [
        (bytes.fromhex("000018040000000000000300"), True),
        (b"HTTP/1.1 400 Bad Request\r\n", False),
        (b"\0\0", False),
        (b"", False),
        (None, False),  # it says nothing, and stays
    ],
)
def test_what_is_no_ray_is_told_by_its_first_bytes(begin: bytes | None, is_ray: bool) -> None:
    def serve() -> None:
        way, _ = server.accept()
        with way:
            if begin is None:
                way.recv(1)  # until the other one leaves
            else:
                way.sendall(begin)

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        limit_s = 60.0 if begin is not None else 0.2
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
def test_a_private_ray_is_joined_over_loopback(
    address: str, over_loopback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[object, bool]] = []

    @contextmanager
    def connected(where: object, runtime_env: object) -> Iterator[None]:
        seen.append((where, not ray_constants.ENABLE_RAY_CLUSTER))
        yield

    monkeypatch.setattr(join, "own_ray_address", lambda: address)
    monkeypatch.setattr(join, "connected", connected)
    monkeypatch.setattr(ray_compat, "addresses_here", lambda: {address})
    with join.connected_here():
        pass
    assert seen == [(address, over_loopback)]
    assert ray_constants.ENABLE_RAY_CLUSTER
    seen.clear()
    with join.connected_to(address):
        pass
    with join.connected_to("127.0.0.1:6379"):  # of a head that listens everywhere
        pass
    assert seen == [(address, over_loopback), ("127.0.0.1:6379", False)]


@pytest.mark.parametrize(
    ("terminal", "environ", "plain"),
    [
        (False, {}, True),
        (True, {}, False),
        (True, {"NO_COLOR": "1"}, True),
        (True, {"NO_COLOR": ""}, False),
        (False, {"FORCE_COLOR": "1"}, False),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, True),
    ],
)
def test_lines_of_workers_have_no_colours_where_they_are_redirected(
    terminal: bool, environ: dict[str, str], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "RAY_COLOR_PREFIX"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever becomes of it here
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: terminal)
    with connection(Target("local", "", ""), Path(), None, None, lambda package: None):
        assert (os.environ.get("RAY_COLOR_PREFIX") == "0") == plain


def test_a_name_with_a_label_that_is_too_long_is_no_host() -> None:
    with pytest.raises(ClusterUnreachable, match="no such host"):
        check_listening(f"{'a' * 64}:6379")
