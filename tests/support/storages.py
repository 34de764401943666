"""An fsspec file system with injected hangs and failures, which records its operations."""

import threading
from typing import Any

from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """In-memory file system at `odd://`; class attributes apply to all connections."""

    protocol = "odd"
    hold: threading.Event | None = None
    """Operations wait for this event; None: no wait."""
    failures = 0
    """Number of writes that will fail."""
    refuses = False
    """Whether writes fail at their end, as in an object store without permission."""
    shortens = False
    """Whether the reported sizes of files are wrong."""
    done: list[str] = []  # noqa: RUF012
    """Writes and removals, in order."""
    written = threading.Event()
    """Set by each successful write."""

    @classmethod
    def reset(cls) -> None:
        """Remove all files and faults; operations that wait for `hold` fail."""
        hold, cls.hold, cls.failures = cls.hold, None, 0
        cls.refuses = cls.shortens = False
        if hold is not None:
            hold.set()
        cls.done.clear()
        cls.written.clear()
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("odd://", "memory://"))

    def _wait(self) -> None:
        hold = FaultyFileSystem.hold
        if hold is not None and not (hold.wait(60) and FaultyFileSystem.hold is hold):
            raise OSError("`hold` was not set during the test")

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        self._wait()
        if "w" in mode:
            if FaultyFileSystem.failures > 0:
                FaultyFileSystem.failures -= 1
                raise PermissionError("no entry with key=hush//user:secret@host/")
            FaultyFileSystem.done.append(path)
            FaultyFileSystem.written.set()
        file = super()._open(path, mode, **more)
        if FaultyFileSystem.refuses and "w" in mode:
            file.commit = _refuse
        return file

    def ls(self, path: str, detail: bool = True, **more: Any) -> Any:
        """See `MemoryFileSystem`."""
        self._wait()
        return super().ls(path, detail=detail, **more)

    def info(self, path: str, **more: Any) -> Any:
        """See `MemoryFileSystem`."""
        self._wait()
        found = super().info(path, **more)
        return {**found, "size": found["size"] - 1} if FaultyFileSystem.shortens else found

    def cat_file(self, path: str, *args: Any, **more: Any) -> Any:
        """See `MemoryFileSystem`."""
        self._wait()
        return super().cat_file(path, *args, **more)

    def rm(self, path: str, **more: Any) -> None:
        """See `MemoryFileSystem`."""
        self._wait()
        super().rm(path, **more)
        FaultyFileSystem.done.append(f"rm {self._strip_protocol(path)}")


def _refuse() -> None:
    raise PermissionError("Unable to locate credentials")


register_implementation("odd", FaultyFileSystem, clobber=True)
