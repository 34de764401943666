"""Jobs on a real head, with and without tokens: `submit`, and the other commands."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from heads import (
    SLOW_JOB,
    TOKEN,
    Head,
    clean_environ,
    kill_tree,
    make_folder,
    read_until,
    run_distplat,
    run_head,
    start_distplat,
)
from marks import slow

pytestmark = pytest.mark.cluster

RunCommand = Callable[[str], "subprocess.CompletedProcess[str]"]


def run_concurrently(
    run_command: RunCommand, *commands: str
) -> "list[subprocess.CompletedProcess[str]]":
    """Run commands at the same time, since each takes a second to start; return their results."""
    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(run_command, commands))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def open_head() -> Iterator[Head]:
    yield from run_head("disabled")


@pytest.fixture(scope="module")
def token_head() -> Iterator[Head]:
    """Verify after all jobs that no file of the cluster contains the token."""
    with contextmanager(run_head)("token") as head:
        yield head
        files = [path for path in head.home.rglob("*") if path.is_file()]
        holders = [path for path in files if TOKEN.encode() in path.read_bytes()]
        assert holders == [head.home / "token"]


@pytest.mark.parametrize(
    ("head_name", "strategy"), [slow("open_head", "ps-sync"), ("token_head", "ring")]
)
def test_remote_job_is_followed_to_its_result(
    head_name: str, strategy: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    head: Head = request.getfixturevalue(head_name)
    job_id = f"first-{strategy}"
    args = ["--strategy", strategy, "--submission-id", job_id, "-o", "json"]
    completed = run_distplat(
        "submit", "job.yaml", "--address", head.url, *args, environ=head.environ, cwd=folder
    )
    assert completed.returncode == 0, completed.stderr
    facts = json.loads(completed.stdout)
    assert (facts["id"], facts["strategy"], facts["steps"]) == (job_id, strategy, 40)
    assert facts["metrics"]["loss"] < 1.0
    runs = head.home / "distplat" / "runs"  # a relative path starts at the driver's home
    assert Path(facts["model"]).parent.parent == runs
    assert Path(facts["model"]).is_file()
    assert "step 40/40" in completed.stderr
    assert "py_modules_files" in completed.stderr  # the client's distplat, not an installed one
    assert "'line.py'" in completed.stderr
    assert "'.env'" not in completed.stderr
    assert not (folder / "runs").exists()

    def run_command(command: str) -> "subprocess.CompletedProcess[str]":
        args = *command.split(), "--address", head.url
        return run_distplat(*args, environ=head.environ, cwd=folder)

    of_one_job = (f"{command} {job_id}" for command in ("status", "logs", "stop"))
    commands = "list -o json --status succeeded", "list", *of_one_job
    answers = run_concurrently(run_command, *commands)
    assert [answer.returncode for answer in answers] == [0] * len(commands), answers
    listed, table, status, log, stopped = (answer.stdout for answer in answers)
    jobs = {job["id"]: job["status"] for job in json.loads(listed)["jobs"]}
    assert jobs[job_id] == "SUCCEEDED"
    assert set(jobs.values()) == {"SUCCEEDED"}
    assert re.search(rf"{job_id} +line +SUCCEEDED +{strategy} +1 +\d+s\n", table)
    assert "status     SUCCEEDED\n" in status
    assert "step 40/40" in log
    assert "distplat-result" not in log
    assert f"strategy       {strategy}\n" in log
    assert stopped == f"{job_id}: already SUCCEEDED\n"


def test_failing_task_prints_traceback_of_user_code(token_head: Head, folder: Path) -> None:
    completed = run_distplat(
        *("submit", "job.yaml", "--address", token_head.url, "--set", "task_args.fail=true"),
        environ=token_head.environ,
        cwd=folder,
    )
    assert completed.returncode == 1
    assert completed.stdout == ""
    assert re.search(r'line\.py", line \d+, in loss\n    raise ValueError', completed.stderr)
    assert "error: your task failed on rank 0, in step 1: ValueError" in completed.stderr
    assert completed.stderr.count("  File ") == 1  # no frame of distplat


def test_ctrl_c_detaches_from_remote_job(token_head: Head, folder: Path) -> None:
    head = token_head
    args = ["submit", "job.yaml", "--address", head.url, "--submission-id", "slow", *SLOW_JOB]
    process = start_distplat(args, head.environ, folder)
    read_until(process, "step 1/5000")
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "detached; the job slow continues" in printed
    follow = re.search(r"follow: distplat (.*)", printed)
    stop = re.search(r"stop:   distplat (.*)", printed)
    assert follow and stop

    def run_command(command: str) -> "subprocess.CompletedProcess[str]":
        return run_distplat(*command.split(), environ=head.environ, cwd=folder)

    commands = (f"status {name} --address {head.url}" for name in ("slow", "slwo"))
    running, unknown = run_concurrently(run_command, *commands)
    assert "status    RUNNING\n" in running.stdout
    assert unknown.returncode == 2
    assert "did you mean 'slow'?" in unknown.stderr
    plain = {name: value for name, value in head.environ.items() if name != "RAY_AUTH_MODE"}
    joined = run_distplat(
        *f"scale nobody --workers 1 --address {head.gcs}".split(), environ=plain, cwd=folder
    )
    assert (joined.returncode, "'nobody' is running" in joined.stderr) == (2, True), joined.stderr
    assert run_command(stop[1]).stdout == "slow: STOPPED\n"
    again, followed = run_concurrently(run_command, stop[1], follow[1])
    assert (again.returncode, again.stdout) == (0, "slow: already STOPPED\n")
    assert followed.returncode == 4
    assert "step 1/5000" in followed.stdout
    assert "the run is asked to stop" in followed.stdout, "`stop` calls the controller"


@pytest.mark.parametrize(
    ("changes", "code", "shown"),
    [
        slow({}, 0, "ID"),  # as in the tests above
        ({"RAY_AUTH_MODE": None}, 0, "ID"),
        ({"RAY_AUTH_MODE": "disabled"}, 3, "requires a token: set RAY_AUTH_TOKEN, or "),
        slow({"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": "/none"}, 3, "requires a token: "),
        ({"RAY_AUTH_TOKEN": f"not-{TOKEN}"}, 3, "does not accept our token; set RAY_AUTH_TOKEN"),
    ],
)
def test_token_is_found_and_never_printed(
    token_head: Head, changes: dict[str, str | None], code: int, shown: str, folder: Path
) -> None:
    changed = {**token_head.environ, **changes}
    environ = {name: value for name, value in changed.items() if value is not None}
    completed = run_distplat("list", "--address", token_head.url, environ=environ, cwd=folder)
    assert completed.returncode == code
    assert shown in completed.stdout + completed.stderr
    assert TOKEN not in completed.stdout + completed.stderr


def test_driver_with_wrong_token_fails_at_once(token_head: Head, folder: Path) -> None:
    environ = {**token_head.environ, "RAY_AUTH_TOKEN": f"not-{TOKEN}"}
    completed = run_distplat("submit", "job.yaml", environ=environ, cwd=folder)
    assert completed.returncode == 3
    assert f"cannot join Ray at {token_head.gcs}: it requires a token" in completed.stderr
    assert "`submit --address local` needs none" in completed.stderr
    assert TOKEN not in completed.stderr


class _NotRay(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def not_ray() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _NotRay)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "address", [slow("http://127.0.0.1:1"), slow("http://no.such.host.invalid:1"), "web"]
)
def test_wrong_address_is_reported(
    address: str, not_ray: str, folder: Path, tmp_path: Path
) -> None:
    address = not_ray if address == "web" else address
    environ = clean_environ(tmp_path, "disabled")
    completed = run_distplat(
        "submit", "job.yaml", "--address", address, environ=environ, cwd=folder
    )
    assert completed.returncode == 3
    assert address in completed.stderr
    assert "Traceback" not in completed.stderr


@pytest.mark.parametrize(
    ("head_name", "given"),
    [
        slow("open_head", True, id="by address"),
        pytest.param("token_head", False, id="on this machine"),
    ],
)
def test_driver_joins_a_cluster(
    head_name: str, given: bool, folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    head: Head = request.getfixturevalue(head_name)
    address = ["--address", head.gcs] if given else []
    completed = run_distplat(
        *("submit", str(folder / "job.yaml"), *address), environ=head.environ, cwd=tmp_path
    )
    assert completed.returncode == 0, completed.stderr
    here = f"running on the Ray cluster of this machine, {head.gcs}\n"
    named = f"running on the Ray cluster at {head.gcs} (from --address)\n"
    assert (named if given else here) in completed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # in the directory of the command


@pytest.mark.slow
@pytest.mark.parametrize("route", ["job API", "driver"])
def test_runtime_environment_reaches_the_workers(
    route: str, open_head: Head, folder: Path, tmp_path: Path
) -> None:
    head = open_head
    environment = json.dumps({"env_vars": {"COLOUR": "red"}})
    completed = run_distplat(
        *("submit", str(folder / "job.yaml"), "--runtime-env-json", environment),
        *("--address", head.url if route == "job API" else head.gcs),
        environ=head.environ,
        cwd=tmp_path,
    )
    assert completed.returncode == 0, completed.stderr
    assert "the colour is red" in completed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("route", ["job API", "driver"])
def test_failed_runtime_environment_shows_the_installers_error(
    route: str, token_head: Head, folder: Path, tmp_path: Path
) -> None:
    environment = json.dumps({"conda": "no-such-environment"})
    completed = run_distplat(
        *("submit", str(folder / "job.yaml"), "--runtime-env-json", environment),
        *("--address", token_head.url if route == "job API" else token_head.gcs),
        environ=token_head.environ,
        cwd=tmp_path,
    )
    assert completed.returncode == 2, completed.stderr
    assert "ValueError: " in completed.stderr  # from conda, or because conda is missing
    assert "no-such-environment" in completed.stderr or "Could not find Conda" in completed.stderr


@pytest.mark.slow
def test_status_shows_roles_and_scale_adds_workers(open_head: Head, folder: Path) -> None:
    """Commands find the run by the submission id and by the job's name."""
    head = open_head
    args = ["--submission-id", "roles", "--no-wait", "--strategy", "ps-async", *SLOW_JOB]
    more = ["--set", "scaling.resources_per_worker.CPU=0.1", "--name", "elastic"]

    def run_command(*command: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        completed = run_distplat(*command, environ=head.environ, cwd=folder)
        assert completed.returncode == code, completed.stderr
        return completed

    run_command("submit", "job.yaml", "--address", head.url, *args, *more)
    deadline = time.monotonic() + 60
    while "worker-0 " not in (
        shown := run_command("status", "roles", "--address", head.url).stdout
    ):
        assert time.monotonic() < deadline, shown
        time.sleep(0.5)
    assert "status    RUNNING\n" in shown
    assert re.search(r"\nserver manager +map version 1, (\d+) elements\n", shown)
    assert re.search(r"\n0 +0\.\.\d+ +server-0\n", shown)
    scaled = run_command("scale", "elastic", "--workers", "2", "--address", head.gcs).stdout
    assert re.search(r"\nworker-1 ", scaled)
    facts = json.loads(run_command("status", "elastic", "--address", head.gcs, "-o", "json").stdout)
    assert [w["stats"]["rank"] for w in facts["roles"]["scheduler"]["workers"]] == [0, 1]
    wrong = run_command("scale", "elastic", "--workers", "99", "--address", head.gcs, code=2)
    assert "error: --workers: must be 1 to 17 (got 99)" in wrong.stderr
    unknown = run_command("scale", "elastics", "--workers", "2", "--address", head.gcs, code=2)
    assert "no run or job 'elastics' is running" in unknown.stderr
    run_command("stop", "roles", "--address", head.url)


@pytest.mark.slow
def test_run_without_uploaded_files_stays_on_its_machine(
    token_head: Head, folder: Path, tmp_path: Path
) -> None:
    """Another node has free CPUs, but not the files of the working directory."""
    head, environ = token_head, token_head.environ
    options = ["--set", "scaling.resources_per_worker.CPU=2", "--strategy", "ps-sync"]
    command = ["submit", str(folder / "job.yaml"), "--name", "stays", *options, *SLOW_JOB]
    process = start_distplat(command, environ, tmp_path)
    join = f"ray start --address={head.gcs} --node-ip-address=127.0.0.2 --num-cpus=4 --block"
    scale = ["scale", "stays", "--workers", "2", "--address", head.gcs]
    nodes: list[subprocess.Popen[bytes]] = []
    reading = threading.Thread(target=process.communicate, daemon=True)
    try:
        read_until(process, "step 1/5000")
        reading.start()  # drain the pipes, or the process would block
        with (tmp_path / "node.log").open("wb") as log:
            popen_options: dict[str, Any] = {
                "env": environ,
                "cwd": tmp_path,
                "start_new_session": True,
            }
            nodes.append(subprocess.Popen(join.split(), stdout=log, stderr=log, **popen_options))
        deadline, message = time.monotonic() + 90, ""
        while "of which 0 are free on the driver's machine, where the run stays" not in message:
            assert time.monotonic() < deadline, message
            scaled = run_distplat(*scale, environ=environ, cwd=tmp_path)
            message = scaled.stderr
            assert scaled.returncode == 2, (
                scaled.stdout
            )  # no free CPU, before and after the node joins
    finally:
        with suppress(ProcessLookupError):  # the process has ended: an assertion above has failed
            os.killpg(process.pid, signal.SIGINT)
        process.wait(90)
        for node in nodes:
            kill_tree(node)
