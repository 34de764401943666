"""Ray's token is a file that its owner alone reads, however it came to be there."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from distplat.actors import ray_compat
from distplat.actors.ray_token import check_token, secure_token, token_of
from distplat.cli import cluster, join
from distplat.platform.errors import SpecError


def file_in(home: Path) -> Path:
    return home / ".ray" / "auth_token"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_new_token_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert secure_token(tmp_path, {}) == ""
    finally:
        os.umask(before)
    token = file_in(tmp_path)
    assert (mode(token), mode(token.parent)) == (0o600, 0o700)
    assert len(token.read_text()) == 64
    first = token.read_text()
    assert secure_token(tmp_path, {}) == ""
    assert token.read_text() == first


def test_a_token_that_ray_has_made_is_closed_to_others(tmp_path: Path) -> None:
    token = file_in(tmp_path)
    token.parent.mkdir()
    token.write_text("of Ray")
    token.chmod(0o644)
    assert "could be read by other users" in secure_token(tmp_path, {"RAY_AUTH_MODE": "token"})
    assert (mode(token), token.read_text()) == (0o600, "of Ray")
    assert secure_token(tmp_path, {}) == ""


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_from_elsewhere_is_the_users_business(name: str, tmp_path: Path) -> None:
    assert secure_token(tmp_path, {name: "x"}) == ""
    assert not file_in(tmp_path).exists()


@pytest.mark.parametrize(
    ("open_folder", "open_file", "told"),
    [(0o755, 0o644, True), (0o755, 0o600, False), (0o700, 0o644, False)],
)
def test_a_file_of_the_users_own_that_others_can_read_is_told_and_left(
    open_folder: int, open_file: int, told: bool
) -> None:
    """Not in pytest's own directory, which nobody else enters."""
    with TemporaryDirectory(dir="/tmp") as name:
        token = Path(name) / "token"
        token.write_text("mine")
        token.chmod(open_file)
        token.parent.chmod(open_folder)
        said = secure_token(token.parent, {"RAY_AUTH_TOKEN_PATH": str(token)})
        expected = f"{token} (RAY_AUTH_TOKEN_PATH) can be read by other users"
        assert said.startswith(expected) if told else said == ""
        assert mode(token) == open_file


@pytest.mark.parametrize("content", [b"\xff\xfe", "schlüssel".encode(), b"two\nlines"])
@pytest.mark.parametrize("way", ["home", "file", "variable"])
def test_what_no_message_could_hold_is_no_token(way: str, content: bytes, tmp_path: Path) -> None:
    file = file_in(tmp_path)
    file.parent.mkdir()
    file.write_bytes(content)
    by_way = {
        "home": {},
        "file": {"RAY_AUTH_TOKEN_PATH": str(file)},
        "variable": {"RAY_AUTH_TOKEN": os.fsdecode(content)},
    }
    with pytest.raises(SpecError, match="holds no token") as raised:
        token_of(tmp_path, by_way[way])
    assert ("RAY_AUTH_TOKEN" if way == "variable" else str(file)) in str(raised.value)


def test_a_token_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_in(tmp_path)
    file.parent.mkdir()
    file.write_text("of root")

    def refuse(path: Path, mode: str) -> None:  # root, as in many a container, may read all
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SpecError) as raised:
        token_of(tmp_path, {})
    assert str(raised.value) == f"{file}: Permission denied"


@pytest.mark.parametrize(
    ("mode", "content", "told"),
    [
        ("token", b"\xff", "holds no token"),
        ("TOKEN", b" \n", r"\(RAY_AUTH_TOKEN_PATH\) does not exist or is empty"),
        ("token", b"mine\n", ""),
        ("disabled", b"\xff", ""),
        ("", b"\xff", ""),
    ],
)
def test_a_token_that_is_to_be_sent_can_be(
    mode: str, content: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / "token").write_bytes(content)
    environment = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    with pytest.raises(SpecError, match=told) if told else nullcontext():
        check_token(tmp_path, environment)


@pytest.mark.parametrize("way", ["the job API", "a driver"])
def test_nobody_is_asked_with_a_token_at_which_ray_would_end_the_process(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "two\nlines")
    asked: list[object] = []
    monkeypatch.setattr(cluster, "_connect", lambda *what: asked.append(what))
    monkeypatch.setattr(ray_compat, "check_gcs", lambda *what: asked.append(what))
    for module in (cluster, join):
        monkeypatch.setattr(module, "check_listening", lambda address: None)
    monkeypatch.setattr(join, "check_is_ray", lambda address, environ: None)
    with pytest.raises(SpecError, match="RAY_AUTH_TOKEN holds no token"):
        if way == "a driver":
            join.connected("127.0.0.1:1", {}).__enter__()
        else:
            cluster.Jobs("http://127.0.0.1:1")
    assert asked == []


@pytest.mark.parametrize("kind", ["nothing", "a directory", "empty"])
def test_where_there_is_no_token_there_is_none(kind: str, tmp_path: Path) -> None:
    file = file_in(tmp_path)
    file.parent.mkdir()
    if kind == "a directory":
        file.mkdir()
    if kind == "empty":
        file.touch()
    assert token_of(tmp_path, {}) == ""


def test_without_tokens_that_is_said(tmp_path: Path) -> None:
    told = secure_token(tmp_path, {"RAY_AUTH_MODE": "disabled"})
    assert "every user of this machine can run code" in told
    assert not file_in(tmp_path).exists()


def test_where_no_home_can_be_written_the_token_is_in_the_environment(tmp_path: Path) -> None:
    (tmp_path / ".ray").write_text("a file in the way")
    environment: dict[str, str] = {}
    said = secure_token(tmp_path, environment)
    assert "auth_token cannot be created" in said and "`distplat status` and `stop`" in said
    token = environment["RAY_AUTH_TOKEN"]
    assert len(token) == 64 and token not in said
    assert secure_token(tmp_path, environment) == "", "the next run of this process keeps it"
