"""A run whose `storage_path` is a URL: what is there, what is not, and what goes on from it."""

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
from storages import Odd
from uploads import TASKS, checkpoint, copy_of, uploaded

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
def _well(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("distplat.platform.run_upload._WARN_AFTER_S", 60.0)  # however busy we are
    Odd.reset()
    yield
    Odd.reset()


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


def test_the_copy_is_the_run_directory_and_a_run_goes_on_from_it(tmp_path: Path) -> None:
    there = tmp_path / "there"
    whole = fit(tmp_path / "one", f"file://{there}")
    assert whole.path.parent == tmp_path / "one" / "runs"
    assert whole.url == f"file://{there}/{whole.path.name}"
    copy = contents(there / whole.path.name)
    assert copy == contents(whole.path)
    expected = {"job.yaml", "metrics.jsonl", "model.safetensors", "result.json"}
    expected |= {f"checkpoints/step-0000{step}/{MANIFEST}" for step in (15, 20)}
    assert copy.keys() >= expected
    assert not any("step-000010" in name for name in copy), "deleted here, so deleted there"

    other = tmp_path / "empty"
    (other / "runs").mkdir(parents=True)
    left = OwnedFolder(other / "runs", ".resumed-")
    left.release()  # of a driver that was killed
    step = f"{whole.url}/checkpoints/step-000015"
    resumed = fit(other, f"file://{there}", resume=step)
    assert resumed.checkpoint is not None and whole.checkpoint is not None
    assert resumed.checkpoint.read_bytes() == whole.checkpoint.read_bytes()
    assert [one.step for one in resumed.history] == list(range(16, 21))
    assert json.loads((resumed.path / "result.json").read_text())["resumed_from"] == step
    longer = fit(other, "runs", resume=whole.url, epochs=5)
    assert [one.step for one in longer.history] == list(range(21, 26))
    last = f"{whole.url}/checkpoints/step-000020"
    assert json.loads((longer.path / "result.json").read_text())["resumed_from"] == last
    assert longer.url is None
    wait_for(lambda: not left.path.exists())


def test_a_storage_that_hangs_costs_the_copy_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    local_disks_have_time(monkeypatch)
    Odd.hold = threading.Event()
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
    ("error", "what"),
    [
        (FileNotFoundError("The specified bucket does not exist"), "bucket does not exist"),
        (PermissionError("Access Denied"), "Access Denied"),
        (NoCredentialsError(), "Unable to locate credentials"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "Not a directory"),
    ],
)
def test_a_storage_that_takes_nothing_is_told_before_anything_is_trained(
    error: Exception,
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = []

    def refuse(*args: Any, **more: Any) -> None:
        tried.append(args)
        raise error

    monkeypatch.setattr(Odd, "_open", refuse)
    with pytest.raises(StorageError, match=f"{what}.*; nothing was trained: create the bucket"):
        fit(tmp_path, "odd://bucket/runs", failure={"storage_timeout_s": 4})
    (result,) = tmp_path.glob("runs/*/result.json")
    assert json.loads(result.read_text())["status"] == "FAILED" and len(tried) == 2
    assert (result.parent / "metrics.jsonl").read_text() == "" and not caplog.text


def test_a_storage_that_is_not_there_for_a_moment_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [ConnectionRefusedError("no server"), TimeoutError(), PermissionError("too early")]
    opened = Odd._open

    def fail(self: Odd, *args: Any, **more: Any) -> Any:
        if failures:
            raise failures.pop()
        return opened(self, *args, **more)

    monkeypatch.setattr(Odd, "_open", fail)
    result = fit(tmp_path, "odd://bucket/runs")
    assert not failures and any("result.json" in path for path in Odd.done)
    assert result.url == f"odd://bucket/runs/{result.path.name}"


def test_a_storage_that_is_waited_for_in_vain_holds_up_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Odd.hold = threading.Event()
    (tmp_path / "job.yaml").write_text("name: a")

    def interrupted() -> None:
        raise Interrupted(2)

    with pytest.raises(Interrupted):
        check_access(tmp_path, "odd://bucket/runs", 600.0, interrupted)
    monkeypatch.setattr(run_upload, "_FIRST_UPLOAD_S", 0.1)
    check_access(tmp_path, "odd://bucket/runs", 600.0, lambda: None)


def closed(upload: RunUpload, within_s: float = 30.0) -> str:
    """Give what `close` gives; it must come back."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(upload.close()), daemon=True)
    thread.start()
    thread.join(within_s)
    assert found, "the end waits for ever"
    return found[0]


@pytest.mark.parametrize(
    ("flag", "why"),
    [("refuses", "Unable to locate credentials"), ("shortens", "has 6 bytes, 7 were written")],
)
def test_a_storage_that_takes_nothing_is_given_up_at_the_end(
    flag: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library forgets what it was to write without asking the storage: that is no answer."""
    monkeypatch.setattr(Odd, flag, True)
    (tmp_path / "job.yaml").write_text("name: a")
    warnings: list[str] = []
    monkeypatch.setattr("distplat.platform.run_upload._WARN_AFTER_S", 0.2)
    missing = closed(copy_of(tmp_path, warnings, limit_s=0.8))
    assert missing.startswith("job.yaml not uploaded to odd://bucket/")
    assert missing.endswith(f"{why}; `distplat upload {tmp_path}` uploads it")
    assert len(warnings) == 2 and "the run continues" in warnings[0]
    assert "the end of the run waits for its copy at odd://bucket/" in warnings[1]


def test_who_breaks_an_upload_off_is_told_what_is_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Odd.refuses = True
    (tmp_path / "job.yaml").write_text("name: a")
    warnings: list[str] = []
    upload = copy_of(tmp_path, warnings)

    def interrupt(asked: Callable[[], bool]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(upload, "_wait_until_complete", interrupt)
    with pytest.raises(KeyboardInterrupt):
        upload.close()
    upload._thread.join(30)
    assert not upload._thread.is_alive()
    told = f"is incomplete: its upload was interrupted; all is in {tmp_path}, and `distplat upload"
    assert [told in one for one in warnings].count(True) == 1  # its thread may warn, too


def test_a_failure_is_told_once_and_tried_again(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: a")
    Odd.failures, warnings = 2, list[str]()
    upload = copy_of(tmp_path, warnings)
    assert Odd.written.wait(60)
    (tmp_path / "result.json").write_text("{}")
    assert upload.close() == ""
    assert len(warnings) == 2
    assert "the run continues" in warnings[0] and "user:secret" not in warnings[0]
    assert warnings[1] == f"odd://bucket/{tmp_path.name} answers again"
    assert [path.rpartition("/")[2] for path in Odd.done] == ["job.yaml", "result.json"]


def test_a_local_disk_that_cannot_be_read_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(Catalogue(tmp_path / "checkpoints"), 1)
    warnings, real = list[str](), Catalogue.steps

    def stale(self: Catalogue) -> list[int]:
        if warnings:
            return real(self)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Catalogue, "steps", stale)
    upload = copy_of(tmp_path, warnings)
    assert upload.close() == ""
    assert "Stale file handle; the run continues" in warnings[0]
    assert warnings[1].endswith(" answers again")


def test_manifest_last_and_removed_first(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    checkpoint(catalogue, 1)
    upload = copy_of(tmp_path)
    there = RemoteStorage(f"odd://bucket/{tmp_path.name}", 20.0)
    wait_for(lambda: MANIFEST in there.names("checkpoints/step-000001"))
    checkpoint(catalogue, 2)
    catalogue.prune(1, written=2)
    assert upload.close() == ""
    root = f"/bucket/{tmp_path.name}/checkpoints"
    one = [f"{root}/step-000001/{name}" for name in ("model.safetensors", STATE, MANIFEST)]
    two = [name.replace("000001", "000002") for name in one]
    gone = [f"rm {one[-1]}", f"rm {root}/step-000001"]
    assert Odd.done == [*one, *two, *gone], "an older one goes when the newer one is whole"
    assert there.names("checkpoints") == ["step-000002"]


def wait_for(true: Any) -> None:
    pause = threading.Event()
    for _ in range(6000):
        if true():
            return
        pause.wait(0.01)
    pytest.fail("it never came")


def test_later_steps_of_before_a_rollback_stay_until_they_are_made_again(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    there = RemoteStorage(f"odd://bucket/{tmp_path.name}", 20.0)
    for step in (1, 3):
        checkpoint(catalogue, step)
    upload = copy_of(tmp_path)
    wait_for(lambda: all(MANIFEST in there.names(f"checkpoints/step-00000{n}") for n in (1, 3)))
    catalogue.set_aside(1)
    checkpoint(catalogue, 2)
    wait_for(lambda: MANIFEST in there.names("checkpoints/step-000002"))
    assert "step-000003" in there.names("checkpoints")
    catalogue.write(3, {"model.safetensors": [b"again"]}, {})
    assert upload.close() == ""
    assert there.read("checkpoints/step-000003/model.safetensors", 0, 99) == b"again"


def test_a_checkpoint_that_is_deleted_while_it_is_brought_comes_whole(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    checkpoint(catalogue, 1)
    Odd.hold = threading.Event()
    upload = copy_of(tmp_path, limit_s=240.0)
    wait_for(lambda: upload._checkpoints._held is not None)
    checkpoint(catalogue, 2)
    catalogue.prune(1, written=2)
    Odd.hold.set()
    assert upload.close() == ""
    brought = [path.split("/")[-2] for path in Odd.done if path.endswith(MANIFEST)]
    assert brought[:2] == ["step-000001", "step-000002"]


def test_a_checkpoint_without_manifest_is_passed_over(tmp_path: Path) -> None:
    url, warnings = uploaded(tmp_path, (1, 2)), list[str]()
    RemoteStorage(url, 20.0).remove(f"checkpoints/step-000002/{MANIFEST}")
    (tmp_path / "a").mkdir()
    assert fetch(url, tmp_path / "a", 20.0, warnings.append).step == 1
    assert not warnings
    with pytest.raises(SpecError, match="no whole checkpoint at"):
        fetch(f"{url}/checkpoints/step-000002", tmp_path / "a", 20.0, warnings.append)
    with pytest.raises(SpecError, match="no whole checkpoint at"):
        fetch("odd://bucket/nothing", tmp_path / "a", 20.0, warnings.append)


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "manifest"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(damage: str, tmp_path: Path) -> None:
    url, warnings = uploaded(tmp_path, (1, 2)), list[str]()

    def spoil(step: int) -> None:
        path = f"/bucket/run/checkpoints/step-00000{step}/model.safetensors"
        if damage == "gone":
            del Odd.store[path]
            return
        if damage == "manifest":
            path = path.replace("model.safetensors", MANIFEST)
        content = bytearray(Odd.store[path].getvalue())
        content[-1] ^= 1
        Odd().pipe_file(path, bytes(content[:-1] if damage == "short" else content))

    spoil(2)
    (tmp_path / "a").mkdir()
    found = fetch(url, tmp_path / "a", 20.0, warnings.append)
    assert found.step == 1 and found.files["model.safetensors"] == b"model"
    assert len(warnings) == 1 and "step-000002 is damaged" in warnings[0]
    spoil(1)
    (tmp_path / "b").mkdir()
    with pytest.raises(StorageError, match="all 2 checkpoints are damaged"):
        fetch(url, tmp_path / "b", 20.0, warnings.append)


def test_a_checkpoint_that_does_not_fit_into_memory_is_not_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = uploaded(tmp_path, (1, 200))
    (tmp_path / "a").mkdir()
    monkeypatch.setattr("distplat.platform.total_memory.memory_and_swap", lambda: 900)
    with pytest.raises(DoesNotFit, match="step-000200: it has"):
        fetch(url, tmp_path / "a", 240.0, pytest.fail)
    assert [path.name for path in (tmp_path / "a").rglob("*.*")] == [MANIFEST]


def test_a_storage_where_much_hangs_is_asked_no_more(tmp_path: Path) -> None:
    Odd.hold = threading.Event()
    storage = RemoteStorage("odd://bucket/run", 0.04)
    for _ in range(8):
        with pytest.raises(NoAnswer, match=r"missing: its storage; `failure\.storage_timeout_s`"):
            storage.names("a")
    with pytest.raises(NoAnswer, match=r"8 earlier operations still hang; `failure\.storage_t"):
        storage.names("a")


def test_a_storage_that_does_not_answer_is_no_reason_for_an_older_one(tmp_path: Path) -> None:
    url = uploaded(tmp_path, (1, 2))
    Odd.hold = threading.Event()
    with pytest.raises(NoAnswer, match=r"missing: its storage; `failure\.storage_timeout_s`"):
        fetch(url, tmp_path, 0.1, pytest.fail)


def test_a_large_file_goes_and_comes_in_parts(tmp_path: Path) -> None:
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
def test_which_urls_are_taken(url: str, problem: str) -> None:
    assert is_url(url)
    text, hint = url_problem(url)
    assert text.startswith(problem) and bool(text) == bool(problem) == bool(hint)
    assert "hush" not in text + hint


def local_disks_have_time(patch: pytest.MonkeyPatch) -> None:
    """Have no deadline of theirs pass: only the storage behind the URL is to be late."""
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=time.sleep)
    patch.setattr("distplat.platform.disk.time", clock)


def test_a_library_that_is_missing_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert missing_library("file:///a") == ("", "")
    for scheme in ("s3", "gs", "sftp"):  # another test may have used it
        monkeypatch.delitem(_registry, scheme, raising=False)
    monkeypatch.setattr("distplat.platform.remote_storage.find_spec", lambda name: None)
    text, hint = missing_library("s3://bucket/a")
    assert "s3fs" in text and hint == "pip install 'distplat[s3]'"
    assert missing_library("gs://bucket/a")[1] == "pip install 'distplat[gcs]'"
    assert missing_library("nowhere://a")[0] == "fsspec knows no nowhere://"
    monkeypatch.setitem(sys.modules, "paramiko", None)
    text, hint = missing_library("sftp://host/a")
    assert text == "sftp:// needs a package that is not installed" and "paramiko" in hint


def test_a_library_that_cannot_be_imported_is_told_as_the_storages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not go with the version of another one, for example."""

    def broken(scheme: str) -> None:
        raise ImportError("cannot import name 'x' from 'y'")

    monkeypatch.setattr("fsspec.get_filesystem_class", broken)
    with pytest.raises(StorageError, match=r"^odd://bucket/run/checkpoints/: cannot import name"):
        fetch("odd://bucket/run", tmp_path, 0.1, pytest.fail)


def test_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(spec(f"file://{tmp_path}/there")))
    line = ["submit", str(file), "--working-dir", str(TASKS)]
    assert command([*line, "-o", "json"]) == 0
    url = json.loads(capfd.readouterr().out)["url"]
    more = ["--set", "epochs=5", "--resume", url]
    assert command([*line, *more, "--dry-run"]) == 0
    assert f"would resume after step 20, from {url}" in capfd.readouterr().err
    assert command([*line, *more]) == 0
    assert "copy           file:///" in capfd.readouterr().out
    for wrong in ("s3://key:hush@bucket", "nowhere://bucket"):
        assert command(["validate", str(file), "--set", f"storage_path={wrong}"]) == 2
        assert command([*line, "--resume", wrong]) == 2
        told = capfd.readouterr().err
        assert "storage_path: " in told and "--resume: " in told and "hush" not in told
    local_disks_have_time(monkeypatch)
    Odd.hold = threading.Event()
    hangs = ["--set", "storage_path=odd://bucket/a", "--set", "failure.storage_timeout_s=0.4"]
    assert command([*line, *hangs]) == 5
    assert "not uploaded to odd://bucket/a/" in capfd.readouterr().err
    for further in ([], ["--dry-run"]):
        assert command([*line, *hangs, "--resume", "odd://bucket/a", *further]) == 5
        told = capfd.readouterr().err
        assert "odd://bucket/a/checkpoints" in told and "missing: its storage" in told
        assert "`failure.storage_timeout_s` changes this deadline" in told
    assert command(["submit", "--storage-path", "s3://bucket", "--", "true"]) == 2


def test_a_copy_that_is_not_complete_is_completed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    local_disks_have_time(monkeypatch)
    Odd.hold = threading.Event()
    with pytest.raises(StorageError) as raised:
        fit(tmp_path, "odd://bucket/a", failure={"storage_timeout_s": 0.4})
    (run,) = (tmp_path / "runs").iterdir()
    assert f"`distplat upload {run}` uploads it" in str(raised.value)
    before = (run / "result.json").read_text()
    assert json.loads(before)["status"] == "FAILED"
    assert command(["upload", run.name]) == 5, "it hangs still"
    told = capsys.readouterr().err
    assert f"uploading {run} to odd://bucket/a/{run.name}\n" in told
    assert f"not uploaded to odd://bucket/a/{run.name}" in told
    assert (run / "result.json").read_text() == before
    Odd.hold = None
    job = yaml.safe_load((run / "job.yaml").read_text())
    job["failure"]["storage_timeout_s"] = 240  # it is well now, however busy the machine is
    (run / "job.yaml").write_text(yaml.safe_dump(job))
    assert command(["upload", run.name]) == 0
    assert capsys.readouterr().out == f"odd://bucket/a/{run.name}\n"
    facts = json.loads((run / "result.json").read_text())
    assert facts["status"] == "SUCCEEDED" and "loss" in facts["metrics"]
    assert not facts.keys() & {"error", "not_uploaded"}
    there = Odd().cat_file(f"odd://bucket/a/{run.name}/result.json")
    assert json.loads(there) == facts
    assert fit(tmp_path, "odd://bucket/b", f"odd://bucket/a/{run.name}", epochs=5).url
    assert command(["upload", str(tmp_path / "nowhere")]) == 2


def test_what_names_no_url_is_not_uploaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in ("runs", "s3://key:hush@bucket/a", 5):
        (tmp_path / "job.yaml").write_text(yaml.safe_dump({"storage_path": url}))
        (tmp_path / "result.json").write_text("{}")
        assert command(["upload", str(tmp_path)]) == 2
        told = capsys.readouterr().err
        assert "storage_path: " in told and "hush" not in told
