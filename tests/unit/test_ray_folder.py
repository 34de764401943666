"""The files of a Ray whose driver was killed are removed by the next run; all others stay."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distplat.actors.ray_folder import RayFolder, remove_left

DRIVER = """
import sys
from pathlib import Path
from distplat.actors.ray_folder import RayFolder
folder = RayFolder(Path(sys.argv[1]))
(folder.path / "session_2026/logs").mkdir(parents=True)
(folder.path / "session_2026/logs/raylet.out").write_text("here")
print(folder.path.parent, flush=True)
sys.stdin.read()
"""


def test_of_a_driver_that_was_killed_nothing_stays(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        folder = Path(driver.stdout.readline().strip())
        remove_left(tmp_path)
        assert (folder / "r/session_2026/logs/raylet.out").exists(), "its driver lives"
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(60)
        remove_left(tmp_path)
    assert list(tmp_path.iterdir()) == []


def left(base: Path) -> Path:
    """What a driver leaves that was killed: a lock that nobody holds."""
    made = RayFolder(base)
    made.path.mkdir()
    made.close()
    return made.path.parent


def test_only_what_is_certainly_left_of_a_driver_is_removed(tmp_path: Path) -> None:
    elsewhere, base = tmp_path / "elsewhere", tmp_path / "base"
    gone = left(base)
    kept = [left(base), left(base), left(base)]
    (kept[0] / ".distplat-driver").write_text("of another machine, which knows other locks")
    kept[1].chmod(0o755)
    (kept[2] / ".distplat-driver").unlink()
    (base / "ray-link").symlink_to(left(elsewhere))
    (base / "ray-file").write_text("")
    pipe = left(base)
    (pipe / ".distplat-driver").unlink()
    os.mkfifo(pipe / ".distplat-driver")
    remove_left(base)
    assert not gone.exists()
    assert all((one / "r").exists() for one in (*kept, pipe, *elsewhere.iterdir()))
    remove_left(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of another user")
def test_what_is_another_users_stays(tmp_path: Path) -> None:
    folder = left(tmp_path)
    os.chown(folder, 12345, 12345)
    remove_left(tmp_path)
    assert (folder / "r").exists()
