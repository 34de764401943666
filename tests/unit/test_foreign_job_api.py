"""A server that speaks HTTP where a Ray's job API is looked for, and answers what it likes."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray

from distplat.cli.main import run

VERSION = json.dumps({"version": "4", "ray_version": ray.__version__})
BODIES = {
    "page": b"<html>\x1b[31mhello",
    "text": b'"version"',
    "list": b"[]",
    "number": b"17",
    "mapping": b'{"submission_id": 5, "metadata": []}',
    "jobs": b'[{"submission_id": 5, "metadata": {"num_workers": 1}, "start_time": "x"}]',
    "deep": b"[" * 100_000,
}


@contextmanager
def serving(body: bytes, *, says_version: bool, status: int = 200) -> Iterator[str]:
    """Give the URL of a server that answers every question alike, but that for Ray's version."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked_version = says_version and self.path.endswith("/version")
            self.send_response(200 if asked_version else status)
            self.end_headers()
            self.wfile.write(VERSION.encode() if asked_version else body)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("says_version", [True, False])
@pytest.mark.parametrize("body", BODIES)
def test_what_is_no_ray_is_told_so(
    body: str, says_version: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(BODIES[body], says_version=says_version) as url:
        for command in ("list", "logs"):
            args = [command] if command == "list" else [command, "lin-1"]
            code = run([*args, "--address", url])
            said = capsys.readouterr().err
            if (command, body, says_version) == ("list", "list", True):
                assert code == 0, "it has no jobs"
            else:
                assert code == 3, said
                assert f"what answers at {url} is not a Ray dashboard" in said
            assert "\x1b" not in said


def test_a_job_api_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(b"out of order", says_version=True, status=500) as url:
        for args in (["list"], ["logs", "lin-1"]):
            assert run([*args, "--address", url]) == 3
            assert "the cluster failed" in capsys.readouterr().err
