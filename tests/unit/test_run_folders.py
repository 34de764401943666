"""`list`, `logs`, `status` and `stop` for run directories below `runs/`."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
from made_runs import step_line, write_run

from distplat.actors.overview import NoSuchRun
from distplat.cli import run_folders
from distplat.cli.main import run
from distplat.cli.run_folders import local_runs, print_logs
from distplat.platform.errors import (
    ActorLost,
    ClusterUnreachable,
    DeadlineExceeded,
    DistplatError,
    SpecError,
)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unset all addresses, and let no job API answer."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "DISTPLAT_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("distplat.cli.jobs.DASHBOARD", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)


def add_run(folder: Path, name: str, age_s: float, status: str | None) -> Path:
    """Create a run; without a status it has not ended."""
    path = write_run(folder / "runs", [step_line(1), step_line(2)], name=name)
    (path / "result.json").unlink(missing_ok=True)
    if status is not None:
        (path / "result.json").write_text(json.dumps({"status": status}))
    written_at = (path / "job.yaml").stat().st_mtime - age_s
    os.utime(path / "job.yaml", (written_at, written_at))
    return path


def test_list_sorts_newest_first_and_filters_by_status(tmp_path: Path) -> None:
    add_run(tmp_path, "old-1", 7200, "FAILED")
    add_run(tmp_path, "new-2", 60, "SUCCEEDED")
    (tmp_path / "runs" / "no-run").mkdir()
    assert [(entry["id"], entry["status"]) for entry in local_runs(9)] == [
        ("new-2", "SUCCEEDED"),
        ("old-1", "FAILED"),
    ]
    assert [entry["id"] for entry in local_runs(1)] == ["new-2"]
    assert [entry["id"] for entry in local_runs(9, "FAILED")] == ["old-1"]


def test_list_status_and_logs_do_not_read_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distplat.platform.run_record._read_lines", lambda *args: 1 / 0)
    path = add_run(tmp_path, "long-1", 60, "SUCCEEDED")
    (path / "logs").mkdir()
    for args in (["list"], ["status", "long-1"], ["logs", "-f", "long-1"]):
        assert run(args) == 0, capsys.readouterr().err


def test_list_shows_local_runs_without_job_api(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["list"]) == 3, "neither local runs nor a job API"
    add_run(tmp_path, "old-1", 7200, "FAILED")
    capsys.readouterr()
    assert run(["list"]) == 0
    printed = capsys.readouterr().out
    assert "old-1" in printed and "FAILED" in printed and "2h" in printed
    assert run(["list", "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["jobs"]
    assert [(entry["id"], entry["status"], entry["exit_code"]) for entry in found] == [
        ("old-1", "FAILED", None)
    ]
    assert run(["list", "--address", "http://127.0.0.1:9"]) == 3, (
        "an explicit address excludes local runs"
    )


def test_logs_prints_each_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = add_run(tmp_path, "old-1", 7200, "FAILED")
    assert run(["logs", "old-2"]) == 3
    (path / "logs").mkdir(exist_ok=True)
    (path / "logs" / "worker-1.log").write_text("one\ntwo\n")
    (path / "logs" / "worker-0.log").write_text("zero\n\x1b[31mred\n")
    capsys.readouterr()
    assert run(["logs", "old-1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "red" not in line] == [
        "(worker-0) zero",
        "(worker-1) one",
        "(worker-1) two",
    ]
    assert not any("\x1b" in line for line in lines)
    assert run(["logs", str(path), "--follow"]) == 4, "the run failed"
    (path / "job.yaml").unlink()
    assert run(["logs", str(path)]) == 0, "logs are readable without job.yaml"


def test_logs_of_job_prints_newest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, age_s in (("old-1", 7200), ("new-2", 60)):
        path = add_run(tmp_path, name, age_s, "SUCCEEDED")
        (path / "logs").mkdir(exist_ok=True)
        (path / "logs" / "worker-0.log").write_text(f"of {name}\n")
    (job,) = {entry["name"] for entry in local_runs(9)}
    Path(job).mkdir()  # the job's own folder is not a run
    Path(job, "job.yaml").touch()
    assert run(["logs", job]) == 0
    assert capsys.readouterr().out == "(worker-0) of new-2\n"
    assert run(["logs", "another"]) == 3
    stderr = capsys.readouterr().err
    assert "no run or job 'another' is below runs/, nor at a job API: cannot reach" in stderr
    assert run(["logs", job, "--address", "http://127.0.0.1:9"]) == 3, (
        "an explicit address excludes local runs"
    )
    assert "below runs/" not in capsys.readouterr().err


def test_follow_prints_until_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = add_run(tmp_path, "going-1", 5, None)
    (path / "logs").mkdir(exist_ok=True)
    log = path / "logs" / "worker-0.log"
    log.write_text("first\nhal")
    monkeypatch.setattr(run_folders, "_POLL_S", 0.01)
    lines: list[str] = []
    code: list[int] = []
    has_output = threading.Event()

    def write(line: str) -> None:
        lines.append(line)
        has_output.set()

    reader = threading.Thread(
        target=lambda: code.append(print_logs(path, write, follow=True)), daemon=True
    )
    reader.start()
    assert has_output.wait(30.0)
    with log.open("a") as file:
        file.write("f\n")
    (path / "result.json").write_text(json.dumps({"status": "SUCCEEDED"}))
    reader.join(30.0)
    assert code == [0] and lines == ["(worker-0) first", "(worker-0) half"]


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_follow_prints_no_error(
    signal_number: int,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = add_run(tmp_path, "going-1", 5, None)
    monkeypatch.setattr(
        run_folders, "print_logs", lambda *a, **k: signal.raise_signal(signal_number)
    )
    assert run(["logs", str(path), "--follow"]) == code
    expected = "\nstopped reading; the run continues\n  stop it: distplat stop going-1\n"
    assert capsys.readouterr().err == expected


def test_status_and_stop_of_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_connection(*args: object) -> None:
        raise ClusterUnreachable("no Ray is running here")

    monkeypatch.setattr("distplat.cli.jobs.roles_of", refuse_connection)
    monkeypatch.setattr("distplat.cli.jobs.stop_run", refuse_connection)
    path = add_run(tmp_path, "old-1", 7200, "SUCCEEDED")
    add_run(tmp_path, "cut-2", 60, None)
    for name in ("old-1", str(path)):
        assert run(["status", name]) == 0
        assert "SUCCEEDED" in capsys.readouterr().out
        assert run(["stop", name]) == 0
        assert capsys.readouterr().out == f"{name}: already SUCCEEDED\n"
    assert run(["status", "old-1", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["id"], found["status"], found["roles"]) == ("old-1", "SUCCEEDED", None)
    for command in ("status", "stop"):
        assert run([command, "cut-2"]) == 3, "unknown whether the run has ended"
        assert run([command, "old-1", "--address", "http://127.0.0.1:9"]) == 3
    assert "no Ray is running here" in capsys.readouterr().err


def test_job_name_selects_last_run_if_none_is_active(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error: list[DistplatError] = [NoSuchRun("no run or job 'digits' is running")]

    def raise_error(*args: object) -> None:
        raise error[0]

    for function in ("roles_of", "stop_run"):
        monkeypatch.setattr(f"distplat.cli.jobs.{function}", raise_error)
    addresses: list[str] = []
    monkeypatch.setattr("distplat.cli.join.rays_here", lambda: addresses)
    add_run(tmp_path, "old-1", 7200, "FAILED")
    add_run(tmp_path, "new-2", 60, "SUCCEEDED")
    (job,) = {entry["name"] for entry in local_runs(9)}
    assert run(["stop", job]) == 0
    assert capsys.readouterr().out == f"{job}: already SUCCEEDED\n"
    assert run(["status", job, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "new-2"
    assert run(["stop", "another"]) == 2
    error[0] = ClusterUnreachable("no Ray is running here")
    assert run(["stop", job]) == 0
    addresses.append("127.0.0.1:6379")
    assert [run([command, job]) for command in ("stop", "status")] == [3, 3], (
        "that Ray may have an active run"
    )
    error[0] = DeadlineExceeded("an answer", ("controller",), 10.0, "")
    assert run(["stop", job]) == 4, "a run is active"
    error[0] = SpecError("several runs of job 'digits' are active")
    assert [run([command, job]) for command in ("stop", "status")] == [2, 2]
    error[0] = NoSuchRun("no run or job 'digits' is running")
    add_run(tmp_path, "newest-3", 1, None)
    assert run(["stop", job]) != 0, "unknown whether the last run has ended"


def test_stop_of_run_that_ends_during_the_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add_run(tmp_path, "quick-1", 60, None)

    def raise_actor_lost(address: object, name: str, *args: object) -> None:
        if name == "quick-1":
            (path / "result.json").write_text('{"status": "STOPPED"}')
        raise ActorLost("controller", None, f"run {name} is over")

    monkeypatch.setattr("distplat.cli.jobs.stop_run", raise_actor_lost)
    monkeypatch.setattr("distplat.cli.jobs._RESULT_S", 0.3)
    for name, status in (("quick-1", "STOPPED"), ("elsewhere", "over")):
        assert run(["stop", name]) == 0
        assert capsys.readouterr().out == f"{name}: {status}\n"
