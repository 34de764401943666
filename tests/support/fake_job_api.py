"""A job API without a cluster: accepts packages and jobs over HTTP, as Ray's dashboard does."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray

DETAILS = {
    "type": "SUBMISSION",
    "status": "SUCCEEDED",
    "entrypoint": "python",
    "driver_exit_code": 0,
    "metadata": {"distplat_version": "0"},
}

JOB = """\
name: lin
task: lin:Lin
strategy: ring
optimizer: {name: SGD, lr: 0.1}
steps: 10
global_batch_size: 16
"""


@dataclass
class FakeJobApi:
    """Answers of the API, and the requests received."""

    url: str = ""
    ray_version: str = ray.__version__
    python_version: str | None = "3.11.0"
    """None: not available, as behind a proxy that forwards only the paths of jobs."""
    log: str = "step 1/1\n"
    packages: list[str] = field(default_factory=list)
    """Paths of the uploads."""
    jobs: list[dict[str, Any]] = field(default_factory=list)

    def get(self, path: str) -> object:
        """Return the response to a GET request; None: 404."""
        if path == "/api/version":
            return {"version": "4", "ray_version": self.ray_version}
        if path == "/api/v0/cluster_metadata" and self.python_version is not None:
            data = {"rayVersion": self.ray_version, "pythonVersion": self.python_version}
            return {"result": True, "data": data}
        if path.endswith("/logs"):
            return {"logs": self.log}
        if path == "/api/jobs/":
            return [{**DETAILS, "submission_id": job["submission_id"]} for job in self.jobs]
        if path.startswith("/api/jobs/") and self.jobs:
            return {**DETAILS, "submission_id": path.rpartition("/")[2]}
        return None


@contextmanager
def fake_job_api() -> Iterator[FakeJobApi]:
    """Serve the API on a loopback port during the block."""
    api = FakeJobApi()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(api.get(self.path))

        def do_PUT(self) -> None:
            self._content()
            api.packages.append(self.path)
            self._answer({})

        def do_POST(self) -> None:
            api.jobs.append(json.loads(self._content()))
            job_id = api.jobs[-1]["submission_id"]
            self._answer({"job_id": job_id, "submission_id": job_id})

        def _content(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"]))

        def _answer(self, found: object) -> None:
            content = json.dumps(found).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    api.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)
