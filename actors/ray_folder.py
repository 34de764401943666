"""
The directory for the files of a local Ray, and the parts of its logs that are kept.

    /tmp/ray-k2h8x0aa/          accessible to this user only
        r/session_.../          files of Ray: sockets, logs, spilled objects

Ray creates its directories, sockets and logs world-writable, so any user could replace a socket and
run code in the workers. Hence they are inside a private directory.
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
_MAX_FILES, _MAX_BYTES = 64, 16 * 2**10
"""Number of logs to keep, and bytes from the end of each: one megabyte in total."""
_FIRST = ("raylet.", "gcs_server.")
"""Logs that come first, because they explain failures of the cluster."""
_EXCLUDED = ("worker-", "runtime_env_agent.log", "runtime_env_setup-")
"""Output of workers is in the run directory; the other logs show `env_vars`, maybe with secrets."""


class RayFolder:
    """
    Creates a directory for a local Ray, and removes those of killed drivers.

    Args:
        base: parent directory.

    Raises:
        OSError: the directory cannot be created.
    """

    def __init__(self, base: Path) -> None:
        remove_orphans(base, _PREFIX)
        base.mkdir(parents=True, exist_ok=True)
        self._folder = OwnedFolder(base, _PREFIX)
        self.path = self._folder.path / "r"  #: created by Ray

    def remove(self) -> None:
        """Delete the directory and its content."""
        self._folder.remove()

    def close(self) -> None:
        """Keep Ray's files to diagnose its failed start; without files delete the directory."""
        if self.path.exists():
            self._folder.release()
        else:
            self._folder.remove()

    def ends_of_logs(self, hidden: str) -> bytes:
        """
        Return the last lines of Ray's logs, concatenated; empty: no logs.

        Args:
            hidden: a text to mask: Ray's token.
        """
        logs = [
            path
            for path in self.path.glob("session_2*/logs/*")
            if path.is_file() and not path.name.startswith(_EXCLUDED)
        ]
        logs.sort(key=lambda path: (not path.name.startswith(_FIRST), -path.stat().st_mtime))
        text = "".join(_tails(logs[:_MAX_FILES]))
        return (text.replace(hidden, "***") if hidden else text).encode()


def _tails(logs: list[Path]) -> Iterator[str]:
    for path in logs:
        with suppress(StorageError), open_regular(path) as file:
            if file is None or not (size := os.fstat(file.fileno()).st_size):
                continue
            file.seek(max(0, size - _MAX_BYTES))
            text = file.read(_MAX_BYTES).decode(errors="replace").rstrip()
            yield f"==> {path.name} <==\n{text}\n\n"
