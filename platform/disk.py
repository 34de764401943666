"""What a catalogue does to a disk, operation by operation: a crash may come between any two."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

Content = Iterable[bytes | memoryview]
"""A file, in parts."""


class Disk(Protocol):
    """The operations that a crash may come between; tests put one of their own in its place."""

    def make(self, path: Path) -> None:
        """Make a directory, for its owner alone."""

    def write(self, path: Path, content: Content) -> tuple[int, str]:
        """Write a file and sync it; give its size and SHA-256."""

    def sync(self, path: Path) -> None:
        """Sync a directory: the names in it."""

    def rename(self, old: Path, new: Path) -> None:
        """Give a directory another name, at once or not at all."""

    def remove(self, path: Path) -> None:
        """Remove a directory with all in it."""


class RealDisk:
    """See `Disk`."""

    def make(self, path: Path) -> None:
        """See `Disk`."""
        path.mkdir(mode=0o700)

    def write(self, path: Path, content: Content) -> tuple[int, str]:
        """See `Disk`."""
        size, digest = 0, hashlib.sha256()
        with path.open("xb") as file:
            for part in content:
                file.write(part)
                digest.update(part)
                size += len(part)
            file.flush()
            os.fsync(file.fileno())
        return size, digest.hexdigest()

    def sync(self, path: Path) -> None:
        """See `Disk`."""
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def rename(self, old: Path, new: Path) -> None:
        """See `Disk`."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """See `Disk`."""
        shutil.rmtree(path)
