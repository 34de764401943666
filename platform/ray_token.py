"""
The token of Ray's authentication: who can read it may run code in the user's name.

Ray keeps it in `~/.ray/auth_token`, which it writes for everybody to read. Here the file is made
for its owner alone before Ray looks for it, and one that Ray has made is closed to others.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

TOKEN_ELSEWHERE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables that Ray takes the token from instead."""
AUTH_MODE = "RAY_AUTH_MODE"


def secure_token(home: Path, environment: Mapping[str, str]) -> str:
    """
    See that a Ray that starts now has a token that nobody else can read.

    Args:
        home: the user's directory.
        environment: of this process.

    Returns:
        A warning; empty: the token is safe.
    """
    if environment.get(AUTH_MODE, "token").lower() != "token":
        return (
            f"{AUTH_MODE}={environment[AUTH_MODE]}: every user of this machine can run code "
            f"in this run; unset it to have Ray ask for a token"
        )
    if any(environment.get(name) for name in TOKEN_ELSEWHERE):
        return ""
    path = home / ".ray" / "auth_token"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _make(path)
        return _close_to_others(path)
    except OSError as error:
        return f"{path} could not be secured: {error.strerror}"


def _make(path: Path) -> None:
    """Make the file with a new token, unless there is one."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        file = os.open(path, flags, 0o600)
    except FileExistsError:
        return
    with open(file, "w") as text:
        text.write(secrets.token_hex(32))


def _close_to_others(path: Path) -> str:
    """Take the rights of others away, where the file is the user's own."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        about = os.fstat(file)
        if not stat.S_IMODE(about.st_mode) & 0o077:
            return ""
        if about.st_uid != os.geteuid():
            return f"{path} belongs to another user, and others may read it"
        os.fchmod(file, 0o600)
        return (
            f"{path} could be read by other users, and no longer can; whoever read it still has it"
        )
    finally:
        os.close(file)
