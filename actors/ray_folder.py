"""
The directory with the files of a Ray of our own, and what of it is kept.

    /tmp/ray-k2h8x0aa/          for this user alone
        r/session_.../          Ray's own: sockets, logs, spilled objects

Ray makes its directories, sockets and logs too, for everybody to write: whoever may put another
socket there can have workers run code. Hence a directory around them that nobody else enters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from distplat.platform.disk import open_regular
from distplat.platform.errors import StorageError
from distplat.platform.owned_folder import OwnedFolder, remove_orphans

_PREFIX = "ray-"
_MOST_FILES, _MOST_BYTES = 64, 16 * 2**10
"""Number of logs that are kept, and bytes at the end of each: a megabyte in all."""
_FIRST = ("raylet.", "gcs_server.")
"""The logs that tell why a cluster failed come before the others."""
_LEFT_OUT = ("worker-", "runtime_env_agent.log", "runtime_env_setup-")
"""What workers printed is in the run directory; the others show `env_vars`, which may be secret."""


class RayFolder:
    """
    Makes a directory for a Ray that starts, and removes those of drivers that were killed.

    Args:
        base: where.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, base: Path) -> None:
        remove_orphans(base, _PREFIX)
        base.mkdir(parents=True, exist_ok=True)
        self._folder = OwnedFolder(base, _PREFIX)
        self.path = self._folder.path / "r"  #: for Ray, which makes it

    def remove(self) -> None:
        """Remove it with all in it."""
        self._folder.remove()

    def close(self) -> None:
        """Leave what Ray has written to whoever wants to know why it did not start."""
        if self.path.exists():
            self._folder.release()
        else:
            self._folder.remove()

    def ends_of_logs(self, hidden: str) -> bytes:
        """
        Give the last lines of Ray's logs, one log below the other; empty: there are none.

        Args:
            hidden: a text that is left out: Ray's token.
        """
        logs = [
            path
            for path in self.path.glob("session_2*/logs/*")
            if path.is_file() and not path.name.startswith(_LEFT_OUT)
        ]
        logs.sort(key=lambda path: (not path.name.startswith(_FIRST), -path.stat().st_mtime))
        text = "".join(_ends(logs[:_MOST_FILES]))
        return (text.replace(hidden, "***") if hidden else text).encode()


def _ends(logs: list[Path]) -> Iterator[str]:
    for path in logs:
        with suppress(StorageError), open_regular(path) as file:
            if file is None or not (size := os.fstat(file.fileno()).st_size):
                continue
            file.seek(max(0, size - _MOST_BYTES))
            text = file.read(_MOST_BYTES).decode(errors="replace").rstrip()
            yield f"==> {path.name} <==\n{text}\n\n"
