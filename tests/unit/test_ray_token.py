"""Ray's token is a file that its owner alone reads, however it came to be there."""

import os
from pathlib import Path

import pytest

from distplat.actors.launch import secure_token


def token_of(home: Path) -> Path:
    return home / ".ray" / "auth_token"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_new_token_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert secure_token(tmp_path, {}) == ""
    finally:
        os.umask(before)
    token = token_of(tmp_path)
    assert (mode(token), mode(token.parent)) == (0o600, 0o700)
    assert len(token.read_text()) == 64
    first = token.read_text()
    assert secure_token(tmp_path, {}) == ""
    assert token.read_text() == first


def test_a_token_that_ray_has_made_is_closed_to_others(tmp_path: Path) -> None:
    token = token_of(tmp_path)
    token.parent.mkdir()
    token.write_text("of Ray")
    token.chmod(0o644)
    assert "could be read by other users" in secure_token(tmp_path, {"RAY_AUTH_MODE": "token"})
    assert (mode(token), token.read_text()) == (0o600, "of Ray")
    assert secure_token(tmp_path, {}) == ""


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_from_elsewhere_is_the_users_business(name: str, tmp_path: Path) -> None:
    assert secure_token(tmp_path, {name: "x"}) == ""
    assert not token_of(tmp_path).exists()


def test_without_tokens_that_is_said(tmp_path: Path) -> None:
    told = secure_token(tmp_path, {"RAY_AUTH_MODE": "disabled"})
    assert "every user of this machine can run code" in told
    assert not token_of(tmp_path).exists()


def test_where_no_home_can_be_written_the_token_is_in_the_environment(tmp_path: Path) -> None:
    (tmp_path / ".ray").write_text("a file in the way")
    environment: dict[str, str] = {}
    said = secure_token(tmp_path, environment)
    assert "auth_token cannot be made" in said and "`distplat status` and `stop`" in said
    token = environment["RAY_AUTH_TOKEN"]
    assert len(token) == 64 and token not in said
    assert secure_token(tmp_path, environment) == "", "the next run of this process keeps it"
