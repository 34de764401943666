"""A server that speaks HTTP where a Ray's job API is looked for, and answers what it likes."""

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


@pytest.mark.sweep(3)
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
                assert f"the server at {url} is not a Ray dashboard" in said
            assert "\x1b" not in said


@pytest.mark.parametrize(("status", "error"), [(500, ClusterUnreachable), (400, SpecError)])
def test_whose_fault_it_is_that_a_job_is_not_taken(status: int, error: type[Exception]) -> None:
    """Ray answers 500 where it has no process to run a job's driver."""
    with serving(b"no agent", says_version=True, status=status) as url:
        jobs = cluster.Jobs(url)
        with pytest.raises(error, match="no agent"):
            jobs.submit(entrypoint="python", runtime_env={})


def test_a_job_api_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(b"out of order", says_version=True, status=500) as url:
        for args in (["list"], ["logs", "lin-1"]):
            assert run([*args, "--address", url]) == 3
            assert "the cluster failed" in capsys.readouterr().err


def drip(peer: socket.socket, first: bytes) -> None:
    peer.sendall(first)
    while True:
        peer.sendall(b" ")
        time.sleep(0.05)


def pour(peer: socket.socket, first: bytes, piece: bytes) -> None:
    peer.sendall(first)
    while True:
        peer.sendall(piece)


ENDLESS: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "slow head": (
        lambda peer: drip(peer, b"HTTP/1.1 200 OK\r\nX:"),
        "complete response within 1 s",
    ),
    "slow body": (
        lambda peer: drip(peer, b"HTTP/1.1 200 OK\r\n\r\n"),
        "complete response within 1 s",
    ),
    "much": (lambda peer: pour(peer, b"HTTP/1.1 200 OK\r\n\r\n", b" " * 2**16), "more than 1 MiB"),
    "packed": (
        lambda peer: pour(
            peer,
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n",
            gzip.compress(b" " * 2**22),
        ),
        "more than 1 MiB",
    ),
}


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Give the URL of a server that is a Ray as to its version, and answers the rest as told."""
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
    ("kind", "args"),
    [
        *((kind, ["list"]) for kind in ENDLESS),
        *(("slow body", [command, "a"]) for command in ("status", "logs", "stop")),
    ],
)
def test_an_answer_without_an_end_is_given_up(
    kind: str,
    args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "_ANSWER_S", 0.7 if kind.startswith("slow") else 60.0)
    monkeypatch.setattr(cluster, "_MOST_BYTES", 2**20)
    answer, why = ENDLESS[kind]
    with answering(answer) as url:
        assert run([*args, "--address", url]) == 3
    said = capsys.readouterr().err
    assert f"{url} " in said and why in said
    assert "`--address`" in said, "the setting that names it"


def test_a_log_may_be_larger_than_other_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    log = json.dumps({"logs": "x" * 3 * 2**20}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(log)
    monkeypatch.setattr(cluster, "_MOST_BYTES", 2**20)
    with answering(lambda peer: peer.sendall(head + log)) as url:
        assert len(cluster.Jobs(url).logs("a")) == 3 * 2**20


def test_a_large_upload_may_take_longer_than_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b"x" * 2**23  # more than the buffers of a connection hold

    def take(peer: socket.socket) -> None:
        time.sleep(0.5)
        left = len(body)
        while left > 2**16:  # the head was read by another
            left -= len(peer.recv(2**20))
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    monkeypatch.setattr(bounded_answers, "_CONNECT_S", 0.2)
    with answering(take) as url:

        def send(method: str, endpoint: str, **kwargs: object) -> requests.Response:
            return requests.request(method, url + endpoint, **kwargs)  # type: ignore[arg-type]

        answer = bounded_answers.request(send, url, "PUT", "/", AnswerLimits(5.0, 2**20), data=body)
    assert answer.json() == {}


def test_no_proxy_hears_the_token_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[bytes] = []

    def listen(peer: socket.socket) -> None:
        heard.append(b"")

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hush")
    with answering(listen) as proxy, serving(b"[]", says_version=True) as url:
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        assert run(["list", "--address", url]) == 0, capsys.readouterr().err
    assert not heard
