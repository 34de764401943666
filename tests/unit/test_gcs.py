"""Upload to and resume from `gs://`, with an emulator of Google Cloud Storage."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import fields_of
from line_task import Lin

pytest.importorskip("gcsfs")
server = pytest.importorskip("gcp_storage_emulator.server")

from distplat import Trainer  # noqa: E402
from distplat.platform.errors import StorageError  # noqa: E402
from distplat.platform.remote_storage import PART_BYTES, ObjectNotFound, RemoteStorage  # noqa: E402


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An emulator with an empty bucket `runs`."""
    emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="runs")
    emulator.start()
    port = emulator._api._httpd.server_port
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield
    emulator.stop()


def fields(steps: int) -> dict[str, object]:
    return fields_of(
        "ring",
        0,
        epochs=None,
        steps=steps,
        global_batch_size=16,
        checkpoint={"every_steps": 2, "num_to_keep": 1},
        storage_path="gs://runs/lin",
    )


def test_run_resumes_from_its_upload(
    bucket: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        first = Trainer(fields(4), Lin, working_dir=tmp_path).fit()
        assert first.url is not None
        storage = RemoteStorage(first.url, 60.0)
        assert "model.safetensors" in storage.names("")
        assert storage.names("checkpoints") == ["step-000004"], (
            "older checkpoints are deleted in the bucket, too"
        )
        second = Trainer(fields(6), Lin, working_dir=tmp_path, resume=first.url).fit()
    assert [step.step for step in second.history] == [5, 6]
    assert caplog.text.count("Could not determine bucket type") <= 1


def test_large_empty_and_missing_objects(bucket: None, tmp_path: Path) -> None:
    large = bytes(range(251)) * (PART_BYTES // 125)
    storage = RemoteStorage("gs://runs/a", 60.0)
    for name, content in (("large", large), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with (tmp_path / name).open("rb") as file:
            storage.put(f"run/{name}", file, len(content))
        assert storage.size(f"run/{name}") == len(content)
    assert storage.read("run/large", PART_BYTES - 3, PART_BYTES + 3) == large[PART_BYTES - 3 :][:6]
    storage.remove("run")
    storage.remove("run")
    assert storage.names("run") == []
    with pytest.raises(ObjectNotFound):
        storage.size("run/large")
    with (tmp_path / "empty").open("rb") as file, pytest.raises(StorageError, match="gs://nobody"):
        RemoteStorage("gs://nobody/a", 60.0).put("a", file, 0)
