"""What a process that was killed has left is removed by the next one; all else stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distplat.platform.owned_folder import OwnedFolder, remove_orphans

OWNER = """
import sys
from pathlib import Path
from distplat.platform.owned_folder import OwnedFolder
folder = OwnedFolder(Path(sys.argv[1]), "ray-")
(folder.path / "r/session_2026").mkdir(parents=True)
(folder.path / "r/session_2026/log").write_text("here")
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_of_a_process_that_was_killed_nothing_stays(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        remove_orphans(tmp_path, "ray-")
        assert (folder / "r/session_2026/log").exists(), "its owner lives"
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait(60)
        remove_orphans(tmp_path, ".resumed-")
        assert folder.exists(), "it has another name"
        remove_orphans(tmp_path, "ray-")
    assert list(tmp_path.iterdir()) == []


def left(base: Path) -> Path:
    """What a process leaves that was killed: a lock that nobody holds."""
    base.mkdir(exist_ok=True)
    made = OwnedFolder(base, "ray-")
    (made.path / "r").mkdir()
    (made.path / "file").write_text("")
    made.release()
    return made.path


def test_only_what_was_certainly_left_is_removed(tmp_path: Path) -> None:
    elsewhere, base = tmp_path / "elsewhere", tmp_path / "base"
    gone = left(base)
    kept = [left(base), left(base), left(base), left(base)]
    (kept[0] / ".distplat-owner").write_text("of another machine, which knows other locks")
    kept[1].chmod(0o755)
    (kept[2] / ".distplat-owner").unlink()
    (kept[3] / ".distplat-owner").unlink()
    os.mkfifo(kept[3] / ".distplat-owner")
    (base / "ray-link").symlink_to(left(elsewhere))
    (base / "ray-file").write_text("")
    (gone / "link").symlink_to(elsewhere)
    remove_orphans(base, "ray-")
    assert not gone.exists()
    assert all((one / "r").exists() for one in (*kept, *elsewhere.iterdir()))
    remove_orphans(tmp_path / "none", "ray-")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of another user")
def test_what_is_another_users_stays(tmp_path: Path) -> None:
    folder = left(tmp_path)
    os.chown(folder, 12345, 12345)
    remove_orphans(tmp_path, "ray-")
    assert (folder / "r").exists()
