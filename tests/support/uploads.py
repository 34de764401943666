"""Uploads of checkpoints to the file system of `storages`."""

from pathlib import Path

import storages  # noqa: F401 - registers `odd://`

from distplat.platform.checkpoints import Catalogue
from distplat.platform.remote_storage import RemoteStorage
from distplat.platform.run_upload import RunUpload

TASKS = Path(__file__).parents[1] / "cluster"


def write_checkpoint(catalogue: Catalogue, step: int) -> None:
    catalogue.write(step, {"model.safetensors": [b"model" * step]}, {})


def make_upload(
    folder: Path, warnings: list[str] | None = None, limit_s: float = 20.0
) -> RunUpload:
    storage = RemoteStorage(f"odd://bucket/{folder.name}", limit_s)
    messages = warnings if warnings is not None else []
    return RunUpload(folder, storage, messages.append, poll_s=0.01)


def upload_checkpoints(tmp_path: Path, steps: tuple[int, ...]) -> str:
    """Upload checkpoints to `odd://bucket/run`; return the URL."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in steps:
        write_checkpoint(Catalogue(folder / "checkpoints"), step)
    assert make_upload(folder).close() == ""
    return "odd://bucket/run"
