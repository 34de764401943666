"""A signal during a run's final upload, in a child process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from marks import slow

SUPPORT = Path(__file__).parents[1] / "support"
TASKS = Path(__file__).parents[1] / "cluster"
SCRIPT = """
import json, logging, os, signal, sys, threading, time
from pathlib import Path
from storages import FaultyFileSystem
from jobs import fields_of
from distplat.actors.trainer import Trainer
from distplat.platform import run_upload
from distplat.platform.errors import DistplatError

first, second, when = sys.argv[1:]
logging.basicConfig(level=logging.WARNING, format="%(message)s")
FaultyFileSystem.hold = threading.Event()
run_upload._FIRST_UPLOAD_S = 0.1
folder = Path.cwd()

def send_signals():
    deadline = time.monotonic() + 60
    files = {"upload": "result.json", "training": "metrics.jsonl"}
    def written():
        return [path for path in folder.glob(f"runs/*/{files[when]}") if path.stat().st_size]
    while not written() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(os.getpid(), getattr(signal, first))
    if second:
        while not list(folder.glob("runs/*/result.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), getattr(signal, second))

threading.Thread(target=send_signals, daemon=True).start()
fields = fields_of(
    workers=0, task="tasks_for_tests:Blobs", optimizer={"name": "AdamW", "lr": 0.1},
    global_batch_size=8, epochs=100000 if when == "training" else 2, checkpoint={"every_epochs": 1},
    storage_path="odd://bucket/runs", failure={"storage_timeout_s": 600},
)
fields.pop("steps", None)
try:
    Trainer(fields, working_dir=os.environ["TASKS"], storage_dir=folder).fit()
except DistplatError as error:
    print(error.exit_code)
except KeyboardInterrupt:
    print("interrupted twice")
"""


def run_with_signals(folder: Path, *args: str) -> tuple[str, str, dict[str, object]]:
    """Return stdout, stderr and the result of a run that gets the signals."""
    paths = [str(SUPPORT), *sys.path]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *args],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ":".join(paths), "TASKS": str(TASKS)},
    )
    results = list(folder.glob("runs/*/result.json"))
    assert results, process.stderr
    return process.stdout.strip(), process.stderr, json.loads(results[0].read_text())


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", "143"), slow("SIGINT", "130")])
def test_signal_during_the_final_upload_reports_missing_files(
    name: str, code: str, tmp_path: Path
) -> None:
    stdout, stderr, result = run_with_signals(tmp_path, name, "", "upload")
    assert stdout == code, stderr
    (run,) = (tmp_path / "runs").iterdir()
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("the run has ended, but model.safetensors, ")
    assert f"not uploaded to odd://bucket/runs/{run.name}: its upload was interrupted" in last
    assert f"`distplat upload {run}` uploads it" in last
    assert last.endswith(f"the trained model is in {run / 'model.safetensors'}")
    assert result["status"] == "STOPPED" and "loss" in result["metrics"]  # type: ignore[operator]
    assert "model.safetensors" in str(result["not_uploaded"])


@pytest.mark.slow
def test_stopped_run_uploads_until_the_next_signal(tmp_path: Path) -> None:
    stdout, stderr, result = run_with_signals(tmp_path, "SIGTERM", "SIGTERM", "training")
    assert stdout == "143", stderr
    assert "its upload was interrupted; `distplat upload" in stderr.splitlines()[-1]
    assert result == {"status": "STOPPED", "error": "interrupted by SIGTERM"}
