"""
A directory of files as a checkpoint, the form that Ray Train's functions report.

    torch.save(state, folder / "model.pt")
    report(metrics, checkpoint=Checkpoint.from_directory(folder))

    with get_checkpoint().as_directory() as folder:
        state = torch.load(folder / "model.pt")

The bytes of the files are stored as tensors, next to the checkpoint's other values
(`state_tree.py`).
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
    The files of a directory, by relative path.

    Args:
        files: the files' bytes as uint8 tensors. Keys are paths relative to the directory, with `/`
            as separator.

    Raises:
        SpecError: A path leads out of the directory.
    """

    def __init__(self, files: Mapping[str, Tensor]) -> None:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
                raise _invalid(f"a file called {name!r}: it would be outside of the directory")
        self.files = dict(files)

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """
        Read all files of a directory and its subdirectories. The directory may be deleted
        afterwards.

        Raises:
            SpecError: The path is not a directory, or the directory has no files, or contains a
                link or another special file.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise _invalid(f"{str(folder)!r}, which is no directory")
        files = {}
        for entry in sorted(folder.rglob("*")):
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                raise _invalid(f"{str(entry)!r}, which is neither a file nor a directory")
            if entry.is_file():
                content = np.fromfile(entry, dtype=np.uint8)
                files[entry.relative_to(folder).as_posix()] = torch.from_numpy(content)
        if not files:
            raise _invalid(f"{str(folder)!r}, which has no files")
        return cls(files)

    def to_directory(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the files into a directory, by default a new temporary one, and return its path."""
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-") if path is None else path)
        for name, content in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            content.numpy().tofile(target)
        return str(folder)

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        """Context manager: yield the path of a temporary directory with the files."""
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
            yield self.to_directory(folder)


def from_ray_train(checkpoint: Any) -> Any:
    """Convert a checkpoint of Ray Train to a `Checkpoint`; return other values unchanged."""
    if isinstance(checkpoint, Checkpoint) or not hasattr(checkpoint, "as_directory"):
        return checkpoint
    with checkpoint.as_directory() as folder:
        return Checkpoint.from_directory(folder)


def _invalid(what: str) -> SpecError:
    return SpecError(Problem(("checkpoint",), f"got {what}", "use a directory of regular files"))
