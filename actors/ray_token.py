"""
The token of Ray's authentication: any process that can read it can run code as this user.

Ray writes the token to `~/.ray/auth_token`, readable for all users. This module creates the file
with mode 600 before Ray does, and restricts the mode of an existing one.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from distplat.platform.errors import Problem, SpecError, naming_path

MODE = "RAY_AUTH_MODE"
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""Variables with the token, or the path of its file; they take precedence."""
_MAX_BYTES = 2**16
_NO_TOKEN = "holds no token, which is one line of ASCII"


def token_of(home: Path, environment: Mapping[str, str]) -> str:
    """
    Return the token that Ray uses; empty: none.

    Args:
        home: home directory of the user.
        environment: environment variables.

    Raises:
        SpecError: the file cannot be read, or is not a valid token (one line of ASCII).
    """
    if token := environment.get(TOKEN, "").strip():
        source = TOKEN
    else:
        path = _path(home, environment)
        source = str(path)
        with naming_path(path):
            token = _first_bytes(path).decode("latin-1").strip() if path.is_file() else ""
    if not (token.isascii() and token.isprintable()):
        hint = f"fix it, or set {MODE}=disabled for a cluster without authentication"
        raise SpecError(Problem((), f"{source} {_NO_TOKEN}", hint))
    return token


def check_token(home: Path, environment: Mapping[str, str]) -> None:
    """
    Check the token if Ray needs one: without a valid token Ray may abort the process (SIGABRT).

    Raises:
        SpecError: see `token_of`; or the file that a variable names is missing or empty.
    """
    if environment.get(MODE, "").lower() != "token" or token_of(home, environment):
        return
    if environment.get(TOKEN_PATH):
        raise SpecError(f"{environment[TOKEN_PATH]} ({TOKEN_PATH}) does not exist or is empty")


def secure_token(home: Path, environment: MutableMapping[str, str]) -> str:
    """
    Ensure that a local Ray has a token that only this user can read.

    Args:
        home: home directory of the user. If it is not writable, as in many containers, the token
            is stored only in `environment`.
        environment: environment variables of this process, which its children inherit.

    Returns:
        A warning; empty: the token is safe.
    """
    if environment.get(MODE, "token").lower() != "token":
        return (
            f"{MODE}={environment[MODE]}: every user of this machine can run code "
            f"in this run; unset the variable to make Ray require a token"
        )
    if environment.get(TOKEN):
        return ""
    path = _path(home, environment)
    if environment.get(TOKEN_PATH):
        return _warn_of_readers(path)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _create_token(path)
    except OSError as error:
        environment[TOKEN] = secrets.token_hex(32)
        return (
            f"{path} cannot be created ({error.strerror}): only the processes of this run know "
            f"the token of its Ray, so `distplat status` and `stop` cannot connect to it"
        )
    try:
        return _restrict_permissions(path)
    except OSError as error:
        return f"{path} could not be secured: {error.strerror}"


def _path(home: Path, environment: Mapping[str, str]) -> Path:
    return Path(environment.get(TOKEN_PATH) or home / ".ray" / "auth_token")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)


def _warn_of_readers(path: Path) -> str:
    """Return a warning if others can read the user's own token file, which is not modified."""
    try:
        is_readable = path.stat().st_mode & 0o044
        is_in_private_folder = any(
            not folder.stat().st_mode & 0o011 for folder in path.absolute().parents
        )
    except OSError:
        return ""  # Ray reports the error
    if not is_readable or is_in_private_folder:
        return ""
    return f"{path} ({TOKEN_PATH}) can be read by other users, who can then run code in this run"


def _create_token(path: Path) -> None:
    """Create the file with a new token, unless it exists."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        return
    with open(descriptor, "w") as text:
        text.write(secrets.token_hex(32))


def _restrict_permissions(path: Path) -> str:
    """Remove other users' permissions if this user owns the file; return a warning."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        stat_result = os.fstat(descriptor)
        if not stat.S_IMODE(stat_result.st_mode) & 0o077:
            return ""
        if stat_result.st_uid != os.geteuid():
            return f"{path} belongs to another user, and others may read it"
        os.fchmod(descriptor, 0o600)
        return (
            f"{path} could be read by other users, and no longer can; a user who has read the "
            f"token can still use it"
        )
    finally:
        os.close(descriptor)
