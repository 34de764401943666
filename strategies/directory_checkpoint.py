"""
A directory of files as a checkpoint: what Ray Train's functions report.

    torch.save(state, folder / "model.pt")
    report(metrics, checkpoint=Checkpoint.from_directory(folder))

    with get_checkpoint().as_directory() as folder:
        state = torch.load(folder / "model.pt")

The files' bytes are kept as tensors, beside what else a checkpoint holds (`state_tree.py`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distplat.platform.errors import Problem, SpecError


class Checkpoint:
    """
    Files of a directory, by name.

    Args:
        files: bytes, uint8, by path relative to the directory, with `/` between its parts.

    Raises:
        SpecError: a path leads out of the directory.
    """

    def __init__(self, files: Mapping[str, Tensor]) -> None:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
                raise _refused(f"a file called {name!r}: it would be outside of the directory")
        self.files = dict(files)

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """
        Read all files of a directory and of those below it; it may be deleted then.

        Raises:
            SpecError: it is no directory, has no file, or holds a link or something else.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise _refused(f"{str(folder)!r}, which is no directory")
        files = {}
        for found in sorted(folder.rglob("*")):
            if found.is_symlink() or not (found.is_file() or found.is_dir()):
                raise _refused(f"{str(found)!r}, which is neither a file nor a directory")
            if found.is_file():
                content = np.fromfile(found, dtype=np.uint8)
                files[found.relative_to(folder).as_posix()] = torch.from_numpy(content)
        if not files:
            raise _refused(f"{str(folder)!r}, which has no files")
        return cls(files)

    def to_directory(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the files into a directory, by default a new one; give its path."""
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-") if path is None else path)
        for name, content in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            content.numpy().tofile(target)
        return str(folder)

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        """Give the path of a directory with the files, as long as the `with` block lasts."""
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
            yield self.to_directory(folder)


def of_directory(checkpoint: Any) -> Any:
    """Give a checkpoint of Ray Train's, which is a directory somewhere, as one of ours."""
    if isinstance(checkpoint, Checkpoint) or not hasattr(checkpoint, "as_directory"):
        return checkpoint
    with checkpoint.as_directory() as folder:
        return Checkpoint.from_directory(folder)


def _refused(what: str) -> SpecError:
    return SpecError(Problem(("checkpoint",), f"got {what}", "give a directory of plain files"))
