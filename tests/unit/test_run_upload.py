"""Runs whose `storage_path` is a URL: upload, storage faults, fetch and resume."""

import errno
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from botocore.exceptions import NoCredentialsError
from fsspec.registry import _registry
from jobs import fields_of
from storages import FaultyFileSystem
from uploads import TASKS, make_upload, upload_checkpoints, write_checkpoint

from distplat.actors.result import Result
from distplat.actors.trainer import Trainer
from distplat.cli.main import run as command
from distplat.platform import run_upload
from distplat.platform.checkpoints import MANIFEST, STATE, Catalogue
from distplat.platform.errors import Interrupted, SpecError, StorageError
from distplat.platform.owned_folder import OwnedFolder
from distplat.platform.remote_storage import (
    PART_BYTES,
    NoAnswer,
    RemoteStorage,
    fetch,
    is_url,
    missing_library,
    url_problem,
)
from distplat.platform.run_upload import RunUpload, check_access
from distplat.platform.total_memory import DoesNotFit


@pytest.fixture(autouse=True)
def _reset_storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("distplat.platform.run_upload._WARN_AFTER_S", 60.0)  # no warning under load
    FaultyFileSystem.reset()
    yield
    FaultyFileSystem.reset()


def spec(url: str, **more: Any) -> dict[str, Any]:
    fields = {
        "task": "tasks_for_tests:Blobs",
        "optimizer": {"name": "AdamW", "lr": 0.1},
        "global_batch_size": 8,
        "epochs": 4,
        "checkpoint": {"every_epochs": 1},
        "storage_path": url,
    }
    return fields_of(workers=0, **{**fields, **more})


def fit(folder: Path, url: str, resume: str | None = None, **more: Any) -> Result:
    folder.mkdir(exist_ok=True)
    job = spec(url, **more)
    return Trainer(job, working_dir=TASKS, storage_dir=folder, resume=resume).fit()


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_copy_equals_run_directory_and_can_be_resumed(tmp_path: Path) -> None:
    remote = tmp_path / "there"
    first = fit(tmp_path / "one", f"file://{remote}")
    assert first.path.parent == tmp_path / "one" / "runs"
    assert first.url == f"file://{remote}/{first.path.name}"
    copy = contents(remote / first.path.name)
    assert copy == contents(first.path)
    expected = {"job.yaml", "metrics.jsonl", "model.safetensors", "result.json"}
    expected |= {f"checkpoints/step-0000{step}/{MANIFEST}" for step in (15, 20)}
    assert copy.keys() >= expected
    assert not any("step-000010" in name for name in copy), (
        "a pruned checkpoint is also removed remotely"
    )

    other = tmp_path / "empty"
    (other / "runs").mkdir(parents=True)
    leftover = OwnedFolder(other / "runs", ".resumed-")
    leftover.release()  # like a killed driver
    step = f"{first.url}/checkpoints/step-000015"
    resumed = fit(other, f"file://{remote}", resume=step)
    assert resumed.checkpoint is not None and first.checkpoint is not None
    assert resumed.checkpoint.read_bytes() == first.checkpoint.read_bytes()
    assert [summary.step for summary in resumed.history] == list(range(16, 21))
    assert json.loads((resumed.path / "result.json").read_text())["resumed_from"] == step
    longer = fit(other, "runs", resume=first.url, epochs=5)
    assert [summary.step for summary in longer.history] == list(range(21, 26))
    last = f"{first.url}/checkpoints/step-000020"
    assert json.loads((longer.path / "result.json").read_text())["resumed_from"] == last
    assert longer.url is None
    wait_for(lambda: not leftover.path.exists())


def test_hanging_storage_fails_only_the_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop_local_disk_clock(monkeypatch)
    FaultyFileSystem.hold = threading.Event()
    failure = {"storage_timeout_s": 0.8}
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError) as raised:
        fit(tmp_path, "odd://bucket/runs", failure=failure)
    (model,) = tmp_path.glob("runs/*/model.safetensors")
    for part in ("model.safetensors", "checkpoints/step-000020", "storage_timeout_s", str(model)):
        assert part in str(raised.value)
    assert raised.value.exit_code == 5
    facts = json.loads((model.parent / "result.json").read_text())
    assert facts["status"] == "FAILED" and facts["error"] == str(raised.value)
    assert caplog.text.count("cannot upload") == 1
    assert len(list((model.parent / "checkpoints").glob("step-*"))) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError("The specified bucket does not exist"), "bucket does not exist"),
        (PermissionError("Access Denied"), "Access Denied"),
        (NoCredentialsError(), "Unable to locate credentials"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "Not a directory"),
    ],
)
def test_unwritable_storage_fails_before_training(
    error: Exception,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    attempts = []

    def refuse(*args: Any, **more: Any) -> None:
        attempts.append(args)
        raise error

    monkeypatch.setattr(FaultyFileSystem, "_open", refuse)
    with pytest.raises(StorageError, match=f"{message}.*; nothing was trained: create the bucket"):
        fit(tmp_path, "odd://bucket/runs", failure={"storage_timeout_s": 4})
    (result,) = tmp_path.glob("runs/*/result.json")
    assert json.loads(result.read_text())["status"] == "FAILED" and len(attempts) == 2
    assert (result.parent / "metrics.jsonl").read_text() == "" and not caplog.text


def test_transient_storage_failure_does_not_end_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [ConnectionRefusedError("no server"), TimeoutError(), PermissionError("too early")]
    original_open = FaultyFileSystem._open

    def fail_first(self: FaultyFileSystem, *args: Any, **more: Any) -> Any:
        if failures:
            raise failures.pop()
        return original_open(self, *args, **more)

    monkeypatch.setattr(FaultyFileSystem, "_open", fail_first)
    result = fit(tmp_path, "odd://bucket/runs")
    assert not failures and any("result.json" in path for path in FaultyFileSystem.done)
    assert result.url == f"odd://bucket/runs/{result.path.name}"


def test_check_access_can_be_interrupted_and_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FaultyFileSystem.hold = threading.Event()
    (tmp_path / "job.yaml").write_text("name: a")

    def interrupted() -> None:
        raise Interrupted(2)

    with pytest.raises(Interrupted):
        check_access(tmp_path, "odd://bucket/runs", 600.0, interrupted)
    monkeypatch.setattr(run_upload, "_FIRST_UPLOAD_S", 0.1)
    check_access(tmp_path, "odd://bucket/runs", 600.0, lambda: None)


def close_within(upload: RunUpload, within_s: float = 30.0) -> str:
    """Return the result of `upload.close()`; fail if it hangs."""
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(upload.close()), daemon=True)
    thread.start()
    thread.join(within_s)
    assert results, "close() hangs"
    return results[0]


@pytest.mark.parametrize(
    ("flag", "reason"),
    [("refuses", "Unable to locate credentials"), ("shortens", "has 6 bytes, 7 were written")],
)
def test_close_gives_up_if_no_write_succeeds(
    flag: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client library drops its buffer after a failed write, which is no success."""
    monkeypatch.setattr(FaultyFileSystem, flag, True)
    (tmp_path / "job.yaml").write_text("name: a")
    warnings: list[str] = []
    monkeypatch.setattr("distplat.platform.run_upload._WARN_AFTER_S", 0.2)
    missing = close_within(make_upload(tmp_path, warnings, limit_s=0.8))
    assert missing.startswith("job.yaml not uploaded to odd://bucket/")
    assert missing.endswith(f"{reason}; `distplat upload {tmp_path}` uploads it")
    assert len(warnings) == 2 and "the run continues" in warnings[0]
    assert "the end of the run waits for its copy at odd://bucket/" in warnings[1]


def test_interrupted_close_reports_incomplete_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FaultyFileSystem.refuses = True
    (tmp_path / "job.yaml").write_text("name: a")
    warnings: list[str] = []
    upload = make_upload(tmp_path, warnings)

    def interrupt(condition: Callable[[], bool]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(upload, "_wait_until_complete", interrupt)
    with pytest.raises(KeyboardInterrupt):
        upload.close()
    upload._thread.join(30)
    assert not upload._thread.is_alive()
    expected = (
        f"is incomplete: its upload was interrupted; all is in {tmp_path}, and `distplat upload"
    )
    assert [expected in line for line in warnings].count(
        True
    ) == 1  # the upload thread may warn, too


def test_failed_upload_is_reported_once_and_retried(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: a")
    FaultyFileSystem.failures, warnings = 2, list[str]()
    upload = make_upload(tmp_path, warnings)
    assert FaultyFileSystem.written.wait(60)
    (tmp_path / "result.json").write_text("{}")
    assert upload.close() == ""
    assert len(warnings) == 2
    assert "the run continues" in warnings[0] and "user:secret" not in warnings[0]
    assert warnings[1] == f"odd://bucket/{tmp_path.name} answers again"
    assert [path.rpartition("/")[2] for path in FaultyFileSystem.done] == [
        "job.yaml",
        "result.json",
    ]


def test_transient_local_read_error_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(Catalogue(tmp_path / "checkpoints"), 1)
    warnings, read_steps = list[str](), Catalogue.steps

    def fail_once(self: Catalogue) -> list[int]:
        if warnings:
            return read_steps(self)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Catalogue, "steps", fail_once)
    upload = make_upload(tmp_path, warnings)
    assert upload.close() == ""
    assert "Stale file handle; the run continues" in warnings[0]
    assert warnings[1].endswith(" answers again")


def test_manifest_is_uploaded_last_and_removed_first(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    write_checkpoint(catalogue, 1)
    upload = make_upload(tmp_path)
    remote = RemoteStorage(f"odd://bucket/{tmp_path.name}", 20.0)
    wait_for(lambda: MANIFEST in remote.names("checkpoints/step-000001"))
    write_checkpoint(catalogue, 2)
    catalogue.prune(1, written=2)
    assert upload.close() == ""
    root = f"/bucket/{tmp_path.name}/checkpoints"
    first = [f"{root}/step-000001/{name}" for name in ("model.safetensors", STATE, MANIFEST)]
    second = [name.replace("000001", "000002") for name in first]
    removals = [f"rm {first[-1]}", f"rm {root}/step-000001"]
    assert FaultyFileSystem.done == [*first, *second, *removals], (
        "a checkpoint is removed after the upload of the next"
    )
    assert remote.names("checkpoints") == ["step-000002"]


def wait_for(condition: Any) -> None:
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        pause.wait(0.01)
    pytest.fail("condition not met within a minute")


def test_rollback_keeps_later_checkpoints_until_rewritten(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    remote = RemoteStorage(f"odd://bucket/{tmp_path.name}", 20.0)
    for step in (1, 3):
        write_checkpoint(catalogue, step)
    upload = make_upload(tmp_path)
    wait_for(lambda: all(MANIFEST in remote.names(f"checkpoints/step-00000{n}") for n in (1, 3)))
    catalogue.set_aside(1)
    write_checkpoint(catalogue, 2)
    wait_for(lambda: MANIFEST in remote.names("checkpoints/step-000002"))
    assert "step-000003" in remote.names("checkpoints")
    catalogue.write(3, {"model.safetensors": [b"again"]}, {})
    assert upload.close() == ""
    assert remote.read("checkpoints/step-000003/model.safetensors", 0, 99) == b"again"


def test_checkpoint_pruned_during_its_upload_is_complete(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    write_checkpoint(catalogue, 1)
    FaultyFileSystem.hold = threading.Event()
    upload = make_upload(tmp_path, limit_s=240.0)
    wait_for(lambda: upload._checkpoints._held is not None)
    write_checkpoint(catalogue, 2)
    catalogue.prune(1, written=2)
    FaultyFileSystem.hold.set()
    assert upload.close() == ""
    manifests = [path.split("/")[-2] for path in FaultyFileSystem.done if path.endswith(MANIFEST)]
    assert manifests[:2] == ["step-000001", "step-000002"]


def test_fetch_skips_checkpoint_without_manifest(tmp_path: Path) -> None:
    url, warnings = upload_checkpoints(tmp_path, (1, 2)), list[str]()
    RemoteStorage(url, 20.0).remove(f"checkpoints/step-000002/{MANIFEST}")
    (tmp_path / "a").mkdir()
    assert fetch(url, tmp_path / "a", 20.0, warnings.append).step == 1
    assert not warnings
    with pytest.raises(SpecError, match="no whole checkpoint at"):
        fetch(f"{url}/checkpoints/step-000002", tmp_path / "a", 20.0, warnings.append)
    with pytest.raises(SpecError, match="no whole checkpoint at"):
        fetch("odd://bucket/nothing", tmp_path / "a", 20.0, warnings.append)


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "manifest"])
def test_fetch_falls_back_from_damaged_checkpoint(damage: str, tmp_path: Path) -> None:
    url, warnings = upload_checkpoints(tmp_path, (1, 2)), list[str]()

    def spoil(step: int) -> None:
        path = f"/bucket/run/checkpoints/step-00000{step}/model.safetensors"
        if damage == "gone":
            del FaultyFileSystem.store[path]
            return
        if damage == "manifest":
            path = path.replace("model.safetensors", MANIFEST)
        content = bytearray(FaultyFileSystem.store[path].getvalue())
        content[-1] ^= 1
        FaultyFileSystem().pipe_file(path, bytes(content[:-1] if damage == "short" else content))

    spoil(2)
    (tmp_path / "a").mkdir()
    found = fetch(url, tmp_path / "a", 20.0, warnings.append)
    assert found.step == 1 and found.files["model.safetensors"] == b"model"
    assert len(warnings) == 1 and "step-000002 is damaged" in warnings[0]
    spoil(1)
    (tmp_path / "b").mkdir()
    with pytest.raises(StorageError, match="all 2 checkpoints are damaged"):
        fetch(url, tmp_path / "b", 20.0, warnings.append)


def test_fetch_rejects_checkpoint_larger_than_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload_checkpoints(tmp_path, (1, 200))
    (tmp_path / "a").mkdir()
    monkeypatch.setattr("distplat.platform.total_memory.memory_and_swap", lambda: 900)
    with pytest.raises(DoesNotFit, match="step-000200: it has"):
        fetch(url, tmp_path / "a", 240.0, pytest.fail)
    assert [path.name for path in (tmp_path / "a").rglob("*.*")] == [MANIFEST]


def test_storage_with_many_hanging_operations_is_not_called(tmp_path: Path) -> None:
    FaultyFileSystem.hold = threading.Event()
    storage = RemoteStorage("odd://bucket/run", 0.04)
    for _ in range(8):
        with pytest.raises(NoAnswer, match=r"missing: its storage; `failure\.storage_timeout_s`"):
            storage.names("a")
    with pytest.raises(NoAnswer, match=r"8 earlier operations still hang; `failure\.storage_t"):
        storage.names("a")


def test_fetch_does_not_fall_back_on_timeout(tmp_path: Path) -> None:
    url = upload_checkpoints(tmp_path, (1, 2))
    FaultyFileSystem.hold = threading.Event()
    with pytest.raises(NoAnswer, match=r"missing: its storage; `failure\.storage_timeout_s`"):
        fetch(url, tmp_path, 0.1, pytest.fail)


def test_large_file_is_transferred_in_parts(tmp_path: Path) -> None:
    path, size = tmp_path / "large", 2 * PART_BYTES + 17
    path.write_bytes(bytes(range(251)) * (size // 251 + 1))
    storage = RemoteStorage(f"file://{tmp_path}/there", 60.0)
    with path.open("rb") as file:
        storage.put("a/large", file, size)
    assert storage.size("a/large") == size
    assert (
        storage.read("a/large", PART_BYTES - 3, PART_BYTES + 3)
        == path.read_bytes()[PART_BYTES - 3 : PART_BYTES + 3]
    )
    assert storage.names("a") == ["large"]
    storage.remove("a")
    storage.remove("a")
    assert storage.names("a") == []


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3://bucket/a/b", ""),
        ("gs://bucket", ""),
        ("file:///home/me/runs", ""),
        ("s3://key:hush@bucket/a", "a URL must hold no user or password"),
        ("s3://bucket/a?key=hush", "a URL must hold no query, fragment or second URL"),
        ("s3://bucket/a::s3://b", "a URL must hold no query"),
        ("https://host/a", "https:// cannot be written to"),
        ("s3://", "a URL must name a bucket"),
        ("s3://bucket/../other", "a URL must name a bucket or directory, without `..`"),
        ("file://runs", "file:// needs an absolute path"),
        ("memory://runs", "memory:// is gone with the process"),
    ],
)
def test_url_problem(url: str, problem: str) -> None:
    assert is_url(url)
    text, hint = url_problem(url)
    assert text.startswith(problem) and bool(text) == bool(problem) == bool(hint)
    assert "hush" not in text + hint


def stop_local_disk_clock(patch: pytest.MonkeyPatch) -> None:
    """Disable deadlines of local disks: only the remote storage is late."""
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=time.sleep)
    patch.setattr("distplat.platform.disk.time", clock)


def test_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert missing_library("file:///a") == ("", "")
    for scheme in ("s3", "gs", "sftp"):  # another test may have registered it
        monkeypatch.delitem(_registry, scheme, raising=False)
    monkeypatch.setattr("distplat.platform.remote_storage.find_spec", lambda name: None)
    text, hint = missing_library("s3://bucket/a")
    assert "s3fs" in text and hint == "pip install 'distplat[s3]'"
    assert missing_library("gs://bucket/a")[1] == "pip install 'distplat[gcs]'"
    assert missing_library("nowhere://a")[0] == "fsspec knows no nowhere://"
    monkeypatch.setitem(sys.modules, "paramiko", None)
    text, hint = missing_library("sftp://host/a")
    assert text == "sftp:// needs a package that is not installed" and "paramiko" in hint


def test_import_error_of_storage_library_names_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Example: two installed packages have incompatible versions."""

    def raise_import_error(scheme: str) -> None:
        raise ImportError("cannot import name 'x' from 'y'")

    monkeypatch.setattr("fsspec.get_filesystem_class", raise_import_error)
    with pytest.raises(StorageError, match=r"^odd://bucket/run/checkpoints/: cannot import name"):
        fetch("odd://bucket/run", tmp_path, 0.1, pytest.fail)


def test_submit_and_validate_with_url(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(spec(f"file://{tmp_path}/there")))
    submit = ["submit", str(file), "--working-dir", str(TASKS)]
    assert command([*submit, "-o", "json"]) == 0
    url = json.loads(capfd.readouterr().out)["url"]
    resume = ["--set", "epochs=5", "--resume", url]
    assert command([*submit, *resume, "--dry-run"]) == 0
    assert f"would resume after step 20, from {url}" in capfd.readouterr().err
    assert command([*submit, *resume]) == 0
    assert "copy           file:///" in capfd.readouterr().out
    for bad_url in ("s3://key:hush@bucket", "nowhere://bucket"):
        assert command(["validate", str(file), "--set", f"storage_path={bad_url}"]) == 2
        assert command([*submit, "--resume", bad_url]) == 2
        stderr = capfd.readouterr().err
        assert "storage_path: " in stderr and "--resume: " in stderr and "hush" not in stderr
    stop_local_disk_clock(monkeypatch)
    FaultyFileSystem.hold = threading.Event()
    hangs = ["--set", "storage_path=odd://bucket/a", "--set", "failure.storage_timeout_s=0.4"]
    assert command([*submit, *hangs]) == 5
    assert "not uploaded to odd://bucket/a/" in capfd.readouterr().err
    for options in ([], ["--dry-run"]):
        assert command([*submit, *hangs, "--resume", "odd://bucket/a", *options]) == 5
        stderr = capfd.readouterr().err
        assert "odd://bucket/a/checkpoints" in stderr and "missing: its storage" in stderr
        assert "`failure.storage_timeout_s` changes this deadline" in stderr
    assert command(["submit", "--storage-path", "s3://bucket", "--", "true"]) == 2


def test_upload_command_completes_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stop_local_disk_clock(monkeypatch)
    FaultyFileSystem.hold = threading.Event()
    with pytest.raises(StorageError) as raised:
        fit(tmp_path, "odd://bucket/a", failure={"storage_timeout_s": 0.4})
    (run,) = (tmp_path / "runs").iterdir()
    assert f"`distplat upload {run}` uploads it" in str(raised.value)
    before = (run / "result.json").read_text()
    assert json.loads(before)["status"] == "FAILED"
    assert command(["upload", run.name]) == 5, "the storage still hangs"
    stderr = capsys.readouterr().err
    assert f"uploading {run} to odd://bucket/a/{run.name}\n" in stderr
    assert f"not uploaded to odd://bucket/a/{run.name}" in stderr
    assert (run / "result.json").read_text() == before
    FaultyFileSystem.hold = None
    job = yaml.safe_load((run / "job.yaml").read_text())
    job["failure"]["storage_timeout_s"] = 240  # enough on a busy machine
    (run / "job.yaml").write_text(yaml.safe_dump(job))
    assert command(["upload", run.name]) == 0
    assert capsys.readouterr().out == f"odd://bucket/a/{run.name}\n"
    facts = json.loads((run / "result.json").read_text())
    assert facts["status"] == "SUCCEEDED" and "loss" in facts["metrics"]
    assert not facts.keys() & {"error", "not_uploaded"}
    uploaded_result = FaultyFileSystem().cat_file(f"odd://bucket/a/{run.name}/result.json")
    assert json.loads(uploaded_result) == facts
    assert fit(tmp_path, "odd://bucket/b", f"odd://bucket/a/{run.name}", epochs=5).url
    assert command(["upload", str(tmp_path / "nowhere")]) == 2


def test_upload_command_rejects_run_without_url(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in ("runs", "s3://key:hush@bucket/a", 5):
        (tmp_path / "job.yaml").write_text(yaml.safe_dump({"storage_path": url}))
        (tmp_path / "result.json").write_text("{}")
        assert command(["upload", str(tmp_path)]) == 2
        stderr = capsys.readouterr().err
        assert "storage_path: " in stderr and "hush" not in stderr
