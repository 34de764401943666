"""Folders of killed processes are removed by the next process; other files stay."""

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


def test_folder_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        remove_orphans(tmp_path, "ray-")
        assert (folder / "r/session_2026/log").exists(), "its owner is alive"
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait(60)
        remove_orphans(tmp_path, ".resumed-")
        assert folder.exists(), "the prefix differs"
        remove_orphans(tmp_path, "ray-")
    assert list(tmp_path.iterdir()) == []


def orphan(base: Path) -> Path:
    """Create a folder as a killed process leaves it, with a released lock."""
    base.mkdir(exist_ok=True)
    folder = OwnedFolder(base, "ray-")
    (folder.path / "r").mkdir()
    (folder.path / "file").write_text("")
    folder.release()
    return folder.path


def test_only_certain_orphans_are_removed(tmp_path: Path) -> None:
    elsewhere, base = tmp_path / "elsewhere", tmp_path / "base"
    removed = orphan(base)
    others = [orphan(base), orphan(base), orphan(base), orphan(base)]
    (others[0] / ".distplat-owner").write_text("of another machine, with locks of its own")
    others[1].chmod(0o755)
    (others[2] / ".distplat-owner").unlink()
    (others[3] / ".distplat-owner").unlink()
    os.mkfifo(others[3] / ".distplat-owner")
    (base / "ray-link").symlink_to(orphan(elsewhere))
    (base / "ray-file").write_text("")
    (removed / "link").symlink_to(elsewhere)
    remove_orphans(base, "ray-")
    assert not removed.exists()
    assert all((folder / "r").exists() for folder in (*others, *elsewhere.iterdir()))
    remove_orphans(tmp_path / "none", "ray-")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files of another user")
def test_folder_of_another_user_stays(tmp_path: Path) -> None:
    folder = orphan(tmp_path)
    os.chown(folder, 12345, 12345)
    remove_orphans(tmp_path, "ray-")
    assert (folder / "r").exists()
