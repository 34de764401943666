"""Remote jobs against a fake cluster: the uploaded package, following the log, stopping."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from jobs import job_of
from made_runs import FACTS
from ray.job_submission import JobErrorType

from distplat.cli import cluster, remote, shipping, submit
from distplat.cli.address import NoSuchJob
from distplat.cli.remote import LogReader, clean_lines, exit_code, follow
from distplat.cli.shipping import ReceivedJob
from distplat.cli.submit import JobSource, RemoteOptions, SubmitRequest, _metadata
from distplat.platform.errors import ClusterUnreachable, SpecError

JOB = job_of(
    {"name": "ps-sync", "num_servers": 2},
    name="lin",
    task="lin:Lin",
    task_args={"text": "'; touch X; $(touch X)\n\"`touch X`"},
    steps=10,
    global_batch_size=16,
)


@pytest.fixture(autouse=True)
def _no_polling_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_POLL_S", 0.0)


class FakeJobs:
    """A job API that returns (status, log) pairs of a script, one per call of `info`."""

    address = "http://h:8265"

    def __init__(self, *script: tuple[str, str], code: int | None = None) -> None:
        self.script = list(script)
        self.code = code
        self.text = ""
        self.submitted: dict[str, Any] = {}

    def info(self, job_id: str) -> dict[str, Any]:
        if job_id != "lin-1":
            raise NoSuchJob
        status, self.text = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return {"status": status, "driver_exit_code": self.code}

    def logs(self, job_id: str) -> str:
        return self.text

    def list(self) -> Any:
        return [{"submission_id": "lin-1"}, {"submission_id": "other"}]

    def stop(self, job_id: str) -> None:
        self.script = [("RUNNING", ""), ("STOPPED", "")]

    def submit(self, **options: Any) -> str:
        self.submitted = options
        return str(options["submission_id"])


def ignores(folder: Path) -> Any:
    return [lambda path: path.name == "ignored"]


def as_jobs(fake: FakeJobs) -> Any:
    return cast(Any, fake)


def test_follows_the_log_to_its_end() -> None:
    jobs = FakeJobs(
        ("PENDING", ""),
        ("RUNNING", "one\ntw"),
        ("RUNNING", "one\ntwo\nthr"),
        ("RUNNING", "one\ntwo\nthr"),
        ("FAILED", "one\ntwo\nthree"),
        code=1,
    )
    lines: list[str] = []
    info = follow(as_jobs(jobs), "lin-1", lines.append)
    assert lines == ["one", "two", "three"]
    assert exit_code(info) == 1


def test_follow_survives_network_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Flaky(FakeJobs):
        calls = 0

        def info(self, job_id: str) -> dict[str, Any]:
            self.calls += 1
            if self.calls % 2:
                raise ClusterUnreachable("no answer")
            return super().info(job_id)

    jobs = Flaky(("RUNNING", "one\n"), ("SUCCEEDED", "one\ntwo\n"), code=0)
    lines: list[str] = []
    assert follow(as_jobs(jobs), "lin-1", lines.append)["status"] == "SUCCEEDED"
    assert lines == ["one", "two"]
    monkeypatch.setattr(remote, "_RETRY_S", -1.0)
    with pytest.raises(ClusterUnreachable):
        follow(as_jobs(Flaky(("RUNNING", ""))), "lin-1", lines.append)


@pytest.mark.parametrize("code", [None, 1])
def test_prints_the_cluster_message_if_the_driver_did_not_start(code: int | None) -> None:
    """No log contains this message. A driver that started logs its own error."""
    message = "".join(f"line {n}\n" for n in range(100)) + "\x1b[31mno conda here"
    more = {"message": message, "error_type": JobErrorType.RUNTIME_ENV_SETUP_FAILURE.value}

    class Broken(FakeJobs):
        def info(self, job_id: str) -> dict[str, Any]:
            return {**super().info(job_id), **(more if self.code is None else {"message": message})}

    lines: list[str] = []
    info = follow(as_jobs(Broken(("FAILED", ""), code=code)), "lin-1", lines.append)
    assert lines[-1:] == ([] if code else ["no conda here"])
    assert len(lines) < 50
    assert exit_code(info) == (code or 2)


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 143, 143),
        ("FAILED", None, 4),
        ("FAILED", -9, 4),
        ("STOPPED", None, 4),
        ("STOPPED", 143, 4),
    ],
)
def test_exit_code_is_that_of_the_driver(status: str, driver: int | None, code: int) -> None:
    assert exit_code({"status": status, "driver_exit_code": driver}) == code


def test_removes_control_sequences_from_the_log() -> None:
    text = "\x1b[31mred\x1b[0m\r\n\x1b]0;title\x07 a\tb\x9b2J\n\n"
    assert clean_lines(text) == ["red", "]0;title a\tb2J", ""]


def test_reads_the_result_from_the_log_without_printing_it() -> None:
    lines: list[str] = []
    reader = LogReader(lines.append)
    result = f"distplat-result: {json.dumps(FACTS)}"
    for line in ("Running entrypoint for job x: y", "step 1", result):
        reader(line)
    reader("distplat-result: not json")
    assert reader.facts == FACTS
    assert lines == ["step 1", "distplat-result: not json"]


@pytest.mark.parametrize("wait", [True, False])
def test_stop_waits_for_the_end_by_default(wait: bool) -> None:
    jobs = FakeJobs(("RUNNING", ""))
    assert remote.stop(as_jobs(jobs), "lin-1", wait=wait) == ("STOPPED" if wait else "RUNNING")


def test_stop_has_no_effect_on_ended_jobs() -> None:
    jobs = FakeJobs(("SUCCEEDED", ""))
    assert remote.stop(as_jobs(jobs), "lin-1", wait=True) == "SUCCEEDED"
    assert jobs.script == [("SUCCEEDED", "")]


@pytest.mark.parametrize(
    ("status", "is_reachable", "stops_by_ray"),
    [("RUNNING", True, False), ("RUNNING", False, True), ("PENDING", True, True)],
)
def test_ray_stops_the_driver_only_if_no_controller_is_reachable(
    status: str, is_reachable: bool, stops_by_ray: bool
) -> None:
    jobs = FakeJobs((status, ""), (status, ""), ("SUCCEEDED", ""))
    result = remote.stop(
        as_jobs(jobs), "lin-1", wait=True, call_controller=lambda info: is_reachable
    )
    assert result == ("STOPPED" if stops_by_ray else "SUCCEEDED")


@pytest.mark.parametrize(
    ("metadata", "status", "code", "expected"),
    [
        ({"distplat_version": "1"}, "FAILED", 143, "STOPPED"),
        ({"distplat_version": "1"}, "FAILED", 4, "FAILED"),
        ({"distplat_version": "1"}, "SUCCEEDED", 0, "SUCCEEDED"),
        ({}, "FAILED", 143, "FAILED"),
        (None, "FAILED", 143, "FAILED"),
    ],
)
def test_job_that_exited_after_sigterm_has_status_stopped(
    metadata: dict[str, str] | None, status: str, code: int, expected: str
) -> None:
    details = {"metadata": metadata, "status": status, "driver_exit_code": code}
    assert cluster._plain(SimpleNamespace(model_dump=lambda: details))["status"] == expected


def test_unknown_job_has_a_hint() -> None:
    with pytest.raises(SpecError) as raised:
        remote.find(as_jobs(FakeJobs()), "lin-2")
    assert str(raised.value) == (
        "no job 'lin-2' at http://h:8265\n  hint: did you mean 'lin-1'? latest: lin-1, other"
    )


@pytest.mark.parametrize("job_id", ["", "a/b", "../x", "a b", "a?b", "x" * 129, "a\n"])
def test_rejects_job_ids_with_url_characters(job_id: str) -> None:
    with pytest.raises(SpecError, match="is no job id"):
        remote.find(as_jobs(FakeJobs()), job_id)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "lin.py").write_text("x = 1\n")
    (tmp_path / "strategy.py").write_text("")
    yield tmp_path


def send(jobs: Any, folder: Path, **changes: Any) -> str:
    runtime_env = {"env_vars": {"A": "1"}, "excludes": ["data"], "py_modules": ["m"]}
    source = JobSource(folder / "job.yaml", working_dir=folder)
    remote = RemoteOptions(entrypoint_num_cpus=1.0)
    request = SubmitRequest(source, remote=remote, **changes)
    return submit.send(jobs, JOB, request, runtime_env, _metadata('{"team": "t"}', JOB), ignores)


def test_entrypoint_contains_no_values_of_the_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = FakeJobs()
    job_id = send(as_jobs(jobs), folder)
    sent = jobs.submitted
    assert job_id.startswith("lin-")
    assert sent["entrypoint"] == "python -m distplat.cli.on_cluster"
    assert sent["entrypoint_num_cpus"] == 1.0
    assert sent["metadata"]["strategy"] == "ps-sync"
    assert sent["metadata"]["team"] == "t"
    environment = sent["runtime_env"]
    assert environment["working_dir"] == str(folder)
    assert [Path(module).name for module in environment["py_modules"]] == ["distplat", "m"]
    assert {".git", ".[eE][nN][vV]*", "*.[pP][eE][mM]", "data"} <= set(environment["excludes"])
    assert environment["env_vars"]["A"] == "1"
    monkeypatch.chdir(folder)
    assert shipping.read_received_job(environment["env_vars"]) == ReceivedJob(JOB, None, None)


def test_uploads_strategy_file_in_the_working_dir(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = shipping.runtime_env(JOB, folder, folder / "strategy.py", {})
    monkeypatch.chdir(folder)
    received = shipping.read_received_job(environment["env_vars"])
    assert received.strategy_file == folder / "strategy.py"
    with pytest.raises(SpecError, match="the folder that is uploaded"):
        shipping.runtime_env(JOB, folder, folder.parent / "strategy.py", {})


def test_resume_path_is_sent_unchanged(folder: Path) -> None:
    jobs = FakeJobs()
    send(as_jobs(jobs), folder, resume="runs/lin-1")
    received = shipping.read_received_job(jobs.submitted["runtime_env"]["env_vars"])
    assert received.resume == "runs/lin-1"


def test_rejects_job_too_large_for_a_variable(folder: Path) -> None:
    job = JOB.model_copy(update={"task_args": {"text": "x" * 50_000}})
    with pytest.raises(SpecError, match="a job sent to a cluster may have 48"):
        shipping.runtime_env(job, folder, None, {})


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": 1}', "[]"])
def test_rejects_invalid_metadata(text: str) -> None:
    with pytest.raises(SpecError, match=r"--metadata-json: (is not JSON|must be a mapping)"):
        _metadata(text, JOB)


def test_rejects_reserved_metadata() -> None:
    with pytest.raises(SpecError, match=r"--metadata-json\.strategy: is set by distplat itself"):
        _metadata('{"strategy": "x"}', JOB)


def test_rejects_large_folder_and_lists_its_largest_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "MAX_PACKAGE", 3 * 2**20)
    for name in ("runs/a", "x.pem", "ignored", "pkg/ignored", ".git/b"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(4 * 2**20))
    send(as_jobs(FakeJobs()), folder)
    for number in range(6):
        (folder / f"data{number}").write_bytes(bytes((number + 1) * 2**20))
    with pytest.raises(SpecError) as raised:
        send(as_jobs(FakeJobs()), folder)
    assert "has 21 MiB; the limit of an upload is 3 MiB" in str(raised.value)
    assert "the largest: data5 6 MiB, data4 5 MiB, data3 4 MiB, data2 3 MiB, data1 2 MiB" in str(
        raised.value
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--runtime-env-json: cannot be read"),
        ("[]", "--runtime-env-json: must be a mapping"),
        (json.dumps({"working_dir": "."}), "working_dir: is set by --working-dir"),
    ],
)
def test_rejects_invalid_runtime_env(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        shipping.read_runtime_env(None, text)


def test_reads_runtime_env_from_file(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("env_vars: {A: '1'}\npip: [numpy]\n")
    assert shipping.read_runtime_env(file, None) == {"env_vars": {"A": "1"}, "pip": ["numpy"]}
    file.write_text("pip: [numpy]\npip: []\n")
    with pytest.raises(SpecError, match=r"env\.yaml:2:1: pip: set twice: in line 1 and in line 2"):
        shipping.read_runtime_env(file, None)
