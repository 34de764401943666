"""A Mac hands jobs to a cluster: nothing on that way needs Linux."""

import json
import subprocess
import sys
from pathlib import Path

import without_linux
from fake_job_api import JOB, fake_job_api


def test_commands_for_a_remote_cluster_need_no_linux(tmp_path: Path) -> None:
    folder = tmp_path / "job"  # beside the home, of which nothing is shipped
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    (folder / "lin.py").write_text("class Lin: ...\n")
    with fake_job_api() as api:
        there = ["--address", api.url]
        commands = [
            ["--help"],
            ["strategies"],
            ["schedule", "1f1b", "--stages", "2", "--micro-batches", "4"],
            ["submit", "job.yaml", "--dry-run", *there],
            ["submit", "job.yaml", *there, "--submission-id", "lin-1"],
            ["list", *there],
            ["status", "lin-1", *there],
            ["logs", "-f", "lin-1", *there],
            ["stop", "lin-1", *there],
        ]
        home = str(tmp_path / "home")
        done = subprocess.run(
            [sys.executable, without_linux.__file__, json.dumps(commands)],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": home, "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        codes = json.loads(done.stdout.splitlines()[-1])
        assert codes == [0] * len(commands) + [-1], done.stderr
        assert len(api.packages) == 2
        assert [job["submission_id"] for job in api.jobs] == ["lin-1"]
