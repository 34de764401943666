"""Uploads to an S3-compatible server: successful, unresponsive and restarted."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from distplat.platform.checkpoints import MANIFEST, Catalogue
from distplat.platform.errors import SpecError, StorageError
from distplat.platform.remote_storage import PART_BYTES, NoAnswer, RemoteStorage, fetch
from distplat.platform.run_upload import RunUpload, check_access

LIMIT_S = 120.0


def start_server(port: int = 0) -> tuple[ThreadedMotoServer, int]:
    server = ThreadedMotoServer("127.0.0.1", port=port, verbose=False)
    server.start()
    return server, server.get_host_and_port()[1]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ThreadedMotoServer, int]]:
    """Start a server with an empty bucket `runs`, configured by environment variables."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # retries of botocore take seconds
    # No warning under load.
    monkeypatch.setattr("distplat.platform.run_upload._WARN_AFTER_S", LIMIT_S)
    server, port = start_server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    boto3.client("s3").create_bucket(Bucket="runs")
    yield server, port
    server.stop()


def test_upload_and_fetch_round_trip(
    bucket: tuple[ThreadedMotoServer, int], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    catalogue = Catalogue(run / "checkpoints")
    large = bytes(range(251)) * (PART_BYTES // 125)
    for step, content in ((1, b"small"), (2, large)):
        catalogue.write(step, {"model.safetensors": [content]}, {})
    (run / "job.yaml").write_text("name: a")
    (run / "empty").touch()
    warnings = list[str]()
    upload = RunUpload(run, RemoteStorage("s3://runs/a/run", LIMIT_S), warnings.append)
    assert upload.close() == "" and not warnings
    remote = RemoteStorage("s3://runs/a/run", LIMIT_S)
    assert remote.size("empty") == 0
    assert remote.read("job.yaml", 0, 100) == b"name: a"
    (tmp_path / "a").mkdir()
    found = fetch("s3://runs/a/run", tmp_path / "a", LIMIT_S, warnings.append)
    assert found.step == 2 and found.files["model.safetensors"] == large
    remote.remove(f"checkpoints/step-000002/{MANIFEST}")
    remote.remove("checkpoints/step-000002")
    assert remote.names("checkpoints") == ["step-000001"]
    with pytest.raises(SpecError, match="no whole checkpoint"):
        fetch("s3://nobody/run", tmp_path / "a", LIMIT_S, warnings.append)
    with (
        pytest.raises(StorageError, match="s3://nobody/run/a: "),
        (run / "job.yaml").open("rb") as f,
    ):
        RemoteStorage("s3://nobody/run", LIMIT_S).put("a", f, 7)


def test_failed_multipart_upload_leaves_no_object(
    bucket: tuple[ThreadedMotoServer, int], tmp_path: Path
) -> None:
    """The local file is shorter than announced."""
    path = tmp_path / "a"
    path.write_bytes(b"x" * (PART_BYTES + 5))
    remote = RemoteStorage("s3://runs/runs", LIMIT_S)
    with path.open("rb") as file, pytest.raises(OSError, match="has become shorter"):
        remote.put("a", file, PART_BYTES + 6)
    assert remote.names("") == []
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket="runs")


def test_upload_survives_server_restart(
    bucket: tuple[ThreadedMotoServer, int], tmp_path: Path
) -> None:
    server, port = bucket
    (tmp_path / "job.yaml").write_text("name: a")
    warnings, has_warned = list[str](), threading.Event()

    def warn(line: str) -> None:
        warnings.append(line)
        has_warned.set()

    server.stop()
    upload = RunUpload(tmp_path, RemoteStorage("s3://runs/run", LIMIT_S), warn)
    assert has_warned.wait(60)
    restarted, _ = start_server(port)
    try:
        assert upload.close() == ""
        assert "the run continues" in warnings[0] and warnings[1] == "s3://runs/run answers again"
        assert RemoteStorage("s3://runs/run", LIMIT_S).read("job.yaml", 0, 99) == b"name: a"
    finally:
        restarted.stop()


def test_unresponsive_server_times_out(
    bucket: tuple[ThreadedMotoServer, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_text("model")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        upload = RunUpload(tmp_path, RemoteStorage("s3://runs/run", 1.0), lambda line: None)
        missing = upload.close()
        assert missing.startswith("model.safetensors not uploaded to s3://runs/run: ")
        assert "`failure.storage_timeout_s`" in missing
        with pytest.raises(NoAnswer):
            RemoteStorage("s3://runs/run", 0.4).size("a")


def test_check_access_fails_before_training(
    bucket: tuple[ThreadedMotoServer, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run := tmp_path / "run").mkdir()
    (run / "job.yaml").write_text("name: a")
    never_interrupted = lambda: None  # noqa: E731
    check_access(run, "s3://runs/a", LIMIT_S, never_interrupted)
    assert RemoteStorage("s3://runs/a/run", LIMIT_S).read("job.yaml", 0, 99) == b"name: a"
    with pytest.raises(StorageError, match="bucket does not exist; nothing was trained"):
        check_access(run, "s3://nobody/a", LIMIT_S, never_interrupted)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StorageError, match="Unable to locate credentials; nothing was trained"):
        check_access(run, "s3://runs/a", LIMIT_S, never_interrupted)


@pytest.mark.parametrize("server_stopped", [False, True])
def test_close_reports_missing_files_of_failed_upload(
    server_stopped: bool, bucket: tuple[ThreadedMotoServer, int], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_text("model")
    if server_stopped:
        bucket[0].stop()
    results: list[str] = []
    upload = RunUpload(tmp_path, RemoteStorage("s3://nobody/run", 0.5), lambda line: None)
    closer = threading.Thread(target=lambda: results.append(upload.close()), daemon=True)
    closer.start()
    closer.join(60)
    assert results and results[0].startswith("model.safetensors not uploaded to s3://nobody/run: ")
