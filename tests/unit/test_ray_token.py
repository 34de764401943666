"""The file of Ray's token is readable by its owner only."""

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


def test_new_token_is_readable_by_its_owner_only(tmp_path: Path) -> None:
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


def test_permissions_of_a_token_of_ray_are_restricted(tmp_path: Path) -> None:
    token = file_in(tmp_path)
    token.parent.mkdir()
    token.write_text("of Ray")
    token.chmod(0o644)
    assert "could be read by other users" in secure_token(tmp_path, {"RAY_AUTH_MODE": "token"})
    assert (mode(token), token.read_text()) == (0o600, "of Ray")
    assert secure_token(tmp_path, {}) == ""


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_no_token_is_created_if_a_variable_is_set(name: str, tmp_path: Path) -> None:
    assert secure_token(tmp_path, {name: "x"}) == ""
    assert not file_in(tmp_path).exists()


@pytest.mark.parametrize(
    ("folder_mode", "file_mode", "warns"),
    [(0o755, 0o644, True), (0o755, 0o600, False), (0o700, 0o644, False)],
)
def test_readable_token_file_of_the_user_gives_a_warning(
    folder_mode: int, file_mode: int, warns: bool
) -> None:
    """Not in pytest's directory, which other users cannot enter."""
    with TemporaryDirectory(dir="/tmp") as name:
        token = Path(name) / "token"
        token.write_text("mine")
        token.chmod(file_mode)
        token.parent.chmod(folder_mode)
        warning = secure_token(token.parent, {"RAY_AUTH_TOKEN_PATH": str(token)})
        expected = f"{token} (RAY_AUTH_TOKEN_PATH) can be read by other users"
        assert warning.startswith(expected) if warns else warning == ""
        assert mode(token) == file_mode


@pytest.mark.parametrize("content", [b"\xff\xfe", "schlüssel".encode(), b"two\nlines"])
@pytest.mark.parametrize("source", ["home", "file", "variable"])
def test_invalid_characters_in_a_token_are_rejected(
    source: str, content: bytes, tmp_path: Path
) -> None:
    file = file_in(tmp_path)
    file.parent.mkdir()
    file.write_bytes(content)
    environments = {
        "home": {},
        "file": {"RAY_AUTH_TOKEN_PATH": str(file)},
        "variable": {"RAY_AUTH_TOKEN": os.fsdecode(content)},
    }
    with pytest.raises(SpecError, match="holds no token") as raised:
        token_of(tmp_path, environments[source])
    assert ("RAY_AUTH_TOKEN" if source == "variable" else str(file)) in str(raised.value)


def test_unreadable_token_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_in(tmp_path)
    file.parent.mkdir()
    file.write_text("of root")

    def deny(path: Path, mode: str) -> None:  # root, usual in containers, can read all files
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(SpecError) as raised:
        token_of(tmp_path, {})
    assert str(raised.value) == f"{file}: Permission denied"


@pytest.mark.parametrize(
    ("mode", "content", "message"),
    [
        ("token", b"\xff", "holds no token"),
        ("TOKEN", b" \n", r"\(RAY_AUTH_TOKEN_PATH\) does not exist or is empty"),
        ("token", b"mine\n", ""),
        ("disabled", b"\xff", ""),
        ("", b"\xff", ""),
    ],
)
def test_check_token_rejects_an_invalid_token_in_token_mode(
    mode: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "token").write_bytes(content)
    environment = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    with pytest.raises(SpecError, match=message) if message else nullcontext():
        check_token(tmp_path, environment)


@pytest.mark.parametrize("client", ["the job API", "a driver"])
def test_invalid_token_is_rejected_before_any_connection(
    client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "two\nlines")
    connections: list[object] = []
    monkeypatch.setattr(cluster, "_connect", lambda *args: connections.append(args))
    monkeypatch.setattr(ray_compat, "check_gcs", lambda *args: connections.append(args))
    for module in (cluster, join):
        monkeypatch.setattr(module, "check_listening", lambda address: None)
    monkeypatch.setattr(join, "check_is_ray", lambda address, environ: None)
    with pytest.raises(SpecError, match="RAY_AUTH_TOKEN holds no token"):
        if client == "a driver":
            join.connected("127.0.0.1:1", {}).__enter__()
        else:
            cluster.Jobs("http://127.0.0.1:1")
    assert connections == []


@pytest.mark.parametrize("case", ["nothing", "a directory", "empty"])
def test_missing_or_empty_token_file_gives_no_token(case: str, tmp_path: Path) -> None:
    file = file_in(tmp_path)
    file.parent.mkdir()
    if case == "a directory":
        file.mkdir()
    if case == "empty":
        file.touch()
    assert token_of(tmp_path, {}) == ""


def test_disabled_tokens_give_a_warning(tmp_path: Path) -> None:
    warning = secure_token(tmp_path, {"RAY_AUTH_MODE": "disabled"})
    assert "every user of this machine can run code" in warning
    assert not file_in(tmp_path).exists()


def test_token_is_in_the_environment_if_the_home_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / ".ray").write_text("a file in the way")
    environment: dict[str, str] = {}
    warning = secure_token(tmp_path, environment)
    assert "auth_token cannot be created" in warning
    assert "`distplat status` and `stop`" in warning
    token = environment["RAY_AUTH_TOKEN"]
    assert len(token) == 64 and token not in warning
    assert secure_token(tmp_path, environment) == "", "the next run of the process keeps the token"
