"""HTTP servers at the address of a Ray job API that are not Ray, or send invalid responses."""

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import ray
import requests

from distplat.cli import bounded_answers, cluster
from distplat.cli.bounded_answers import AnswerLimits
from distplat.cli.main import run
from distplat.platform.errors import ClusterUnreachable, SpecError

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
def uniform_server(body: bytes, *, has_version: bool, status: int = 200) -> Iterator[str]:
    """Yield the URL of a server with one response to all requests except that for the version."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_version_request = has_version and self.path.endswith("/version")
            self.send_response(200 if is_version_request else status)
            self.end_headers()
            self.wfile.write(VERSION.encode() if is_version_request else body)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.sweep(3)
@pytest.mark.parametrize("has_version", [True, False])
@pytest.mark.parametrize("body", BODIES)
def test_reports_servers_that_are_not_ray(
    body: str, has_version: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with uniform_server(BODIES[body], has_version=has_version) as url:
        for command in ("list", "logs"):
            args = [command] if command == "list" else [command, "lin-1"]
            code = run([*args, "--address", url])
            error_text = capsys.readouterr().err
            if (command, body, has_version) == ("list", "list", True):
                assert code == 0, "an empty list of jobs is valid"
            else:
                assert code == 3, error_text
                assert f"the server at {url} is not a Ray dashboard" in error_text
            assert "\x1b" not in error_text


@pytest.mark.parametrize(("status", "error"), [(500, ClusterUnreachable), (400, SpecError)])
def test_error_class_of_a_rejected_job(status: int, error: type[Exception]) -> None:
    """Ray responds with 500 if it has no process to run the driver of a job."""
    with uniform_server(b"no agent", has_version=True, status=status) as url:
        jobs = cluster.Jobs(url)
        with pytest.raises(error, match="no agent"):
            jobs.submit(entrypoint="python", runtime_env={})


def test_reports_a_failing_job_api(capsys: pytest.CaptureFixture[str]) -> None:
    with uniform_server(b"out of order", has_version=True, status=500) as url:
        for args in (["list"], ["logs", "lin-1"]):
            assert run([*args, "--address", url]) == 3
            assert "the cluster failed" in capsys.readouterr().err


def send_slowly(peer: socket.socket, start: bytes) -> None:
    peer.sendall(start)
    while True:
        peer.sendall(b" ")
        time.sleep(0.05)


def send_endlessly(peer: socket.socket, start: bytes, piece: bytes) -> None:
    peer.sendall(start)
    while True:
        peer.sendall(piece)


UNBOUNDED: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "slow head": (
        lambda peer: send_slowly(peer, b"HTTP/1.1 200 OK\r\nX:"),
        "complete response within 1 s",
    ),
    "slow body": (
        lambda peer: send_slowly(peer, b"HTTP/1.1 200 OK\r\n\r\n"),
        "complete response within 1 s",
    ),
    "large": (
        lambda peer: send_endlessly(peer, b"HTTP/1.1 200 OK\r\n\r\n", b" " * 2**16),
        "more than 1 MiB",
    ),
    "large compressed": (
        lambda peer: send_endlessly(
            peer,
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n",
            gzip.compress(b" " * 2**22),
        ),
        "more than 1 MiB",
    ),
}


@contextmanager
def custom_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Yield the URL of a server with Ray's version and a given response to all other requests."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(peer: socket.socket) -> None:
            head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            with peer, suppress(OSError):
                if b"/api/version" in peer.recv(2**16):
                    peer.sendall(head % len(VERSION) + VERSION.encode())
                else:
                    answer(peer)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    peer = listener.accept()[0]
                    threading.Thread(target=serve, args=(peer,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("response", "args"),
    [
        *((response, ["list"]) for response in UNBOUNDED),
        *(("slow body", [command, "a"]) for command in ("status", "logs", "stop")),
    ],
)
def test_unbounded_responses_are_aborted(
    response: str,
    args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "_ANSWER_S", 0.7 if response.startswith("slow") else 60.0)
    monkeypatch.setattr(cluster, "_MOST_BYTES", 2**20)
    answer, reason = UNBOUNDED[response]
    with custom_server(answer) as url:
        assert run([*args, "--address", url]) == 3
    error_text = capsys.readouterr().err
    assert f"{url} " in error_text and reason in error_text
    assert "`--address`" in error_text, "the hint names the setting"


def test_log_may_be_larger_than_other_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    log = json.dumps({"logs": "x" * 3 * 2**20}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(log)
    monkeypatch.setattr(cluster, "_MOST_BYTES", 2**20)
    with custom_server(lambda peer: peer.sendall(head + log)) as url:
        assert len(cluster.Jobs(url).logs("a")) == 3 * 2**20


def test_upload_may_take_longer_than_the_connection_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = b"x" * 2**23  # more than the socket buffers hold

    def receive(peer: socket.socket) -> None:
        time.sleep(0.5)
        remaining = len(body)
        while remaining > 2**16:  # `serve` has read the head
            remaining -= len(peer.recv(2**20))
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    monkeypatch.setattr(bounded_answers, "_CONNECT_S", 0.2)
    with custom_server(receive) as url:

        def send(method: str, endpoint: str, **kwargs: object) -> requests.Response:
            return requests.request(method, url + endpoint, **kwargs)  # type: ignore[arg-type]

        answer = bounded_answers.request(send, url, "PUT", "/", AnswerLimits(5.0, 2**20), data=body)
    assert answer.json() == {}


def test_token_for_localhost_is_not_sent_to_a_proxy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requests_seen: list[bytes] = []

    def record(peer: socket.socket) -> None:
        requests_seen.append(b"")

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hush")
    with custom_server(record) as proxy, uniform_server(b"[]", has_version=True) as url:
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        assert run(["list", "--address", url]) == 0, capsys.readouterr().err
    assert not requests_seen
