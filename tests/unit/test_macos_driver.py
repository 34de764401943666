"""Submitting jobs from macOS to a cluster uses nothing of Linux."""

import json
import subprocess
import sys
from pathlib import Path

import without_linux
from fake_job_api import JOB, fake_job_api


def test_commands_for_a_remote_cluster_do_not_need_linux(tmp_path: Path) -> None:
    folder = tmp_path / "job"  # outside of the home folder, which is not uploaded
    folder.mkdir()
    (folder / "job.yaml").write_text(JOB)
    (folder / "lin.py").write_text("class Lin: ...\n")
    with fake_job_api() as api:
        address = ["--address", api.url]
        commands = [
            ["--help"],
            ["strategies"],
            ["schedule", "1f1b", "--stages", "2", "--micro-batches", "4"],
            ["submit", "job.yaml", "--dry-run", *address],
            ["submit", "job.yaml", *address, "--submission-id", "lin-1"],
            ["list", *address],
            ["status", "lin-1", *address],
            ["logs", "-f", "lin-1", *address],
            ["stop", "lin-1", *address],
        ]
        home = str(tmp_path / "home")
        result = subprocess.run(
            [sys.executable, without_linux.__file__, json.dumps(commands)],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": home, "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        codes = json.loads(result.stdout.splitlines()[-1])
        assert codes == [0] * len(commands) + [-1], result.stderr
        assert len(api.packages) == 2
        assert [job["submission_id"] for job in api.jobs] == ["lin-1"]
