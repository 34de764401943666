"""Jobs on a real head, with and without tokens: `submit`, and looking after what was submitted."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from heads import (
    SLOW,
    TOKEN,
    Head,
    clean_environ,
    distplat,
    end,
    make_folder,
    read_until,
    running_head,
    start,
)
from marks import slow

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def open_head() -> Iterator[Head]:
    yield from running_head("disabled")


@pytest.fixture(scope="module")
def token_head() -> Iterator[Head]:
    yield from running_head("token")


@pytest.mark.parametrize(
    ("head_name", "strategy"), [slow("open_head", "ps-sync"), ("token_head", "ring")]
)
def test_a_remote_job_is_followed_to_its_result(
    head_name: str, strategy: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    head: Head = request.getfixturevalue(head_name)
    job_id = f"first-{strategy}"
    args = ["--strategy", strategy, "--submission-id", job_id, "-o", "json"]
    done = distplat(
        "submit", "job.yaml", "--address", head.url, *args, environ=head.environ, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["id"], facts["strategy"], facts["steps"]) == (job_id, strategy, 40)
    assert facts["metrics"]["loss"] < 1.0
    runs = head.home / "distplat" / "runs"  # relative: below the driver's home
    assert Path(facts["model"]).parent.parent == runs
    assert Path(facts["model"]).is_file()
    assert "step 40/40" in done.stderr
    assert "py_modules_files" in done.stderr  # the client's distplat, not one installed there
    assert "'line.py'" in done.stderr
    assert "'.env'" not in done.stderr
    assert not (folder / "runs").exists()

    def ask(*command: str) -> str:
        answer = distplat(*command, "--address", head.url, environ=head.environ, cwd=folder)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    listed = json.loads(ask("list", "-o", "json", "--status", "succeeded"))
    assert [job["id"] for job in listed["jobs"]] == [job_id]
    assert re.search(rf"{job_id} +line +SUCCEEDED +{strategy} +1 +\d+s\n", ask("list"))
    assert "status     SUCCEEDED\n" in ask("status", job_id)
    log = ask("logs", job_id)
    assert "step 40/40" in log
    assert "distplat-result" not in log
    assert f"strategy       {strategy}\n" in log
    assert ask("stop", job_id) == f"{job_id}: already SUCCEEDED\n"


def test_a_failing_task_shows_its_own_traceback(token_head: Head, folder: Path) -> None:
    done = distplat(
        *("submit", "job.yaml", "--address", token_head.url, "--set", "task_args.fail=true"),
        environ=token_head.environ,
        cwd=folder,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.search(r'line\.py", line \d+, in loss\n    raise ValueError', done.stderr)
    assert "error: your task failed on rank 0, in step 1: ValueError" in done.stderr
    assert done.stderr.count("  File ") == 1  # none of the platform's own


def test_ctrl_c_leaves_a_remote_job_running_until_it_is_stopped(
    token_head: Head, folder: Path
) -> None:
    head = token_head
    args = ["submit", "job.yaml", "--address", head.url, "--submission-id", "slow", *SLOW]
    process = start(args, head.environ, folder)
    read_until(process, "step 1/5000")
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "detached; the job slow continues" in printed
    follow = re.search(r"follow: distplat (.*)", printed)
    stop = re.search(r"stop:   distplat (.*)", printed)
    assert follow and stop

    def ask(command: str) -> "subprocess.CompletedProcess[str]":
        return distplat(*command.split(), environ=head.environ, cwd=folder)

    assert "status    RUNNING\n" in ask(f"status slow --address {head.url}").stdout
    plain = {name: value for name, value in head.environ.items() if name != "RAY_AUTH_MODE"}
    joined = distplat(
        *f"scale nobody --workers 1 --address {head.gcs}".split(), environ=plain, cwd=folder
    )
    assert (joined.returncode, "'nobody' is running" in joined.stderr) == (2, True), joined.stderr
    assert ask(stop[1]).stdout == "slow: STOPPED\n"
    again = ask(stop[1])
    assert (again.returncode, again.stdout) == (0, "slow: already STOPPED\n")
    followed = ask(follow[1])
    assert followed.returncode == 4
    assert "step 1/5000" in followed.stdout
    assert "the run is asked to stop" in followed.stdout, "its controller was called"
    unknown = ask(f"status slwo --address {head.url}")
    assert unknown.returncode == 2
    assert "did you mean 'slow'?" in unknown.stderr


@pytest.mark.parametrize(
    ("changes", "code", "shown"),
    [
        slow({}, 0, "ID"),  # as the tests above have it
        ({"RAY_AUTH_MODE": None}, 0, "ID"),
        ({"RAY_AUTH_MODE": "disabled"}, 3, "requires a token: set RAY_AUTH_TOKEN, or "),
        slow({"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": "/none"}, 3, "requires a token: "),
        ({"RAY_AUTH_TOKEN": f"not-{TOKEN}"}, 3, "does not accept our token; set RAY_AUTH_TOKEN"),
    ],
)
def test_a_token_is_found_and_never_echoed(
    token_head: Head, changes: dict[str, str | None], code: int, shown: str, folder: Path
) -> None:
    environ = {**token_head.environ, **changes}
    given = {name: value for name, value in environ.items() if value is not None}
    done = distplat("list", "--address", token_head.url, environ=given, cwd=folder)
    assert done.returncode == code
    assert shown in done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_a_driver_with_another_token_is_told_so_at_once(token_head: Head, folder: Path) -> None:
    environ = {**token_head.environ, "RAY_AUTH_TOKEN": f"not-{TOKEN}"}
    done = distplat("submit", "job.yaml", environ=environ, cwd=folder)
    assert done.returncode == 3
    assert f"cannot join Ray at {token_head.gcs}: it requires a token" in done.stderr
    assert "`submit --address local` needs none" in done.stderr
    assert TOKEN not in done.stderr


def test_no_file_of_the_cluster_holds_the_token(token_head: Head) -> None:
    """After all jobs above: neither logs nor run directories."""
    files = [path for path in token_head.home.rglob("*") if path.is_file()]
    assert any(path.name == "result.json" for path in files)
    assert [p for p in files if TOKEN.encode() in p.read_bytes()] == [token_head.home / "token"]


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
    "where", [slow("http://127.0.0.1:1"), slow("http://no.such.host.invalid:1"), "web"]
)
def test_a_wrong_address_is_told(where: str, not_ray: str, folder: Path, tmp_path: Path) -> None:
    address = not_ray if where == "web" else where
    environ = clean_environ(tmp_path, "disabled")
    done = distplat("submit", "job.yaml", "--address", address, environ=environ, cwd=folder)
    assert done.returncode == 3
    assert address in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("head_name", "given"),
    [slow("open_head", True, id="by address"), pytest.param("token_head", False, id="found here")],
)
def test_a_driver_joins_a_cluster(
    head_name: str, given: bool, folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    head: Head = request.getfixturevalue(head_name)
    address = ["--address", head.gcs] if given else []
    done = distplat(
        *("submit", str(folder / "job.yaml"), *address), environ=head.environ, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    here = f"running on the Ray cluster of this machine, {head.gcs}\n"
    named = f"running on the Ray cluster at {head.gcs} (from --address)\n"
    assert (named if given else here) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # where submit was called


@pytest.mark.slow
@pytest.mark.parametrize("way", ["job API", "driver"])
def test_a_users_environment_reaches_the_workers(
    way: str, open_head: Head, folder: Path, tmp_path: Path
) -> None:
    head = open_head
    environment = json.dumps({"env_vars": {"COLOUR": "red"}})
    done = distplat(
        *("submit", str(folder / "job.yaml"), "--runtime-env-json", environment),
        *("--address", head.url if way == "job API" else head.gcs),
        environ=head.environ,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "the colour is red" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["job API", "driver"])
def test_an_environment_that_cannot_be_set_up_is_told_with_its_installers_words(
    way: str, token_head: Head, folder: Path, tmp_path: Path
) -> None:
    environment = json.dumps({"conda": "no-such-environment"})
    done = distplat(
        *("submit", str(folder / "job.yaml"), "--runtime-env-json", environment),
        *("--address", token_head.url if way == "job API" else token_head.gcs),
        environ=token_head.environ,
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert "ValueError: " in done.stderr  # of what Ray asks conda, or of its not being there
    assert "no-such-environment" in done.stderr or "Could not find Conda" in done.stderr


@pytest.mark.slow
def test_roles_are_shown_and_workers_join(open_head: Head, folder: Path) -> None:
    """By the id of a job that was handed in to the job API, and by the name of the job."""
    head = open_head
    args = ["--submission-id", "roles", "--no-wait", "--strategy", "ps-async", *SLOW]
    more = ["--set", "scaling.resources_per_worker.CPU=0.1", "--name", "elastic"]

    def ask(*command: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        done = distplat(*command, environ=head.environ, cwd=folder)
        assert done.returncode == code, done.stderr
        return done

    ask("submit", "job.yaml", "--address", head.url, *args, *more)
    deadline = time.monotonic() + 60
    while "worker-0 " not in (shown := ask("status", "roles", "--address", head.url).stdout):
        assert time.monotonic() < deadline, shown
        time.sleep(0.5)
    assert "status    RUNNING\n" in shown
    assert re.search(r"\nserver manager +map version 1, (\d+) elements\n", shown)
    assert re.search(r"\n0 +0\.\.\d+ +server-0\n", shown)
    scaled = ask("scale", "elastic", "--workers", "2", "--address", head.gcs).stdout
    assert re.search(r"\nworker-1 ", scaled)
    facts = json.loads(ask("status", "elastic", "--address", head.gcs, "-o", "json").stdout)
    assert [w["stats"]["rank"] for w in facts["roles"]["scheduler"]["workers"]] == [0, 1]
    wrong = ask("scale", "elastic", "--workers", "99", "--address", head.gcs, code=2)
    assert "error: --workers: must be 1 to 17 (got 99)" in wrong.stderr
    unknown = ask("scale", "elastics", "--workers", "2", "--address", head.gcs, code=2)
    assert "no run or job 'elastics' is running" in unknown.stderr
    ask("stop", "roles", "--address", head.url)


@pytest.mark.slow
def test_a_run_that_shipped_nothing_stays_on_its_machine(
    token_head: Head, folder: Path, tmp_path: Path
) -> None:
    """A node with another address joins, and has room: what lies there at the folder's path?"""
    head, environ = token_head, token_head.environ
    whole = ["--set", "scaling.resources_per_worker.CPU=2", "--strategy", "ps-sync"]
    command = ["submit", str(folder / "job.yaml"), "--name", "stays", *whole, *SLOW]
    process = start(command, environ, tmp_path)
    join = f"ray start --address={head.gcs} --node-ip-address=127.0.0.2 --num-cpus=4 --block"
    scale = ["scale", "stays", "--workers", "2", "--address", head.gcs]
    nodes: list[subprocess.Popen[bytes]] = []
    reading = threading.Thread(target=process.communicate, daemon=True)
    try:
        read_until(process, "step 1/5000")
        reading.start()  # or it would wait for a reader
        with (tmp_path / "node.log").open("wb") as log:
            where: dict[str, Any] = {"env": environ, "cwd": tmp_path, "start_new_session": True}
            nodes.append(subprocess.Popen(join.split(), stdout=log, stderr=log, **where))
        deadline, told = time.monotonic() + 90, ""
        while "of which 0 are free on the driver's machine, where the run stays" not in told:
            assert time.monotonic() < deadline, told
            scaled = distplat(*scale, environ=environ, cwd=tmp_path)
            told = scaled.stderr
            assert scaled.returncode == 2, scaled.stdout  # no room, before the node comes and after
    finally:
        with suppress(ProcessLookupError):  # it has ended, which is the failure to be told
            os.killpg(process.pid, signal.SIGINT)
        process.wait(90)
        for node in nodes:
            end(node)
