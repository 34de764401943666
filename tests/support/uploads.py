"""Uploads of checkpoints to the file system of `storages`."""

from pathlib import Path

import storages  # noqa: F401 - registers `odd://`

from distplat.platform.checkpoints import Catalogue
from distplat.platform.remote_storage import RemoteStorage
from distplat.platform.run_upload import RunUpload

TASKS = Path(__file__).parents[1] / "cluster"


def checkpoint(catalogue: Catalogue, step: int) -> None:
    catalogue.write(step, {"model.safetensors": [b"model" * step]}, {})


def copy_of(folder: Path, warnings: list[str] | None = None, limit_s: float = 20.0) -> RunUpload:
    storage = RemoteStorage(f"odd://bucket/{folder.name}", limit_s)
    messages = warnings if warnings is not None else []
    return RunUpload(folder, storage, messages.append, poll_s=0.01)


def uploaded(tmp_path: Path, steps: tuple[int, ...]) -> str:
    """Upload checkpoints to `odd://bucket/run`; return the URL."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in steps:
        checkpoint(Catalogue(folder / "checkpoints"), step)
    assert copy_of(folder).close() == ""
    return "odd://bucket/run"
