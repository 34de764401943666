"""Printed lines of a run's actors appear once for each role, in the terminal and in files."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ray._private import ray_logging

from distplat.actors import role_output
from distplat.actors.role_output import RoleFiles, role_of

Emit = Callable[..., None]


def batch(name: str, *lines: str, pid: object = 17, err: bool = False) -> dict[str, Any]:
    """Return a message as from Ray's log monitor."""
    return {
        "actor_name": name,
        "pid": pid,
        "lines": list(lines),
        "is_err": err,
        "ip": "10.0.0.1",
        "localhost": "10.0.0.1",
        "task_name": None,
        "job": "01000000",
    }


@pytest.fixture
def ray_printer() -> Iterator[list[dict[str, Any]]]:
    """Return the messages that reach Ray's own printer."""
    dispatcher = ray_logging.global_worker_stdstream_dispatcher
    printed: list[dict[str, Any]] = []
    before = dispatcher.handlers
    dispatcher.handlers = [("ray_print_logs", printed.append)]
    yield printed
    assert [name for name, _ in dispatcher.handlers] == ["ray_print_logs"], (
        "the handlers are restored"
    )
    dispatcher.handlers = before


def run(folder: Path, *batches: dict[str, Any], shown: bool = True) -> list[str]:
    """Emit these messages during a run; return the warnings."""
    warnings: list[str] = []
    with role_output.role_output("digits", folder, warnings.append, shown=shown):
        for message in batches:
            ray_logging.global_worker_stdstream_dispatcher.emit(message)
    return warnings


@pytest.mark.parametrize(
    ("name", "pid", "line", "role"),
    [
        ("digits/worker-0", 17, "loss 1.0", "worker-0"),
        ("digits/worker-1/attempt-2", 17, "loss 1.0", "worker-1"),
        ("digits/server-manager", 17, "", "server-manager"),
        ("digits2/worker-0", 17, "of another run", None),
        ("Actor", 17, "of the user's own", None),
        ("", 17, "of a task", None),
        ("", "raylet", "A worker died or was killed while executing a task", "raylet"),
        ("", "raylet", "the disk is nearly full", None),
        ("", "autoscaler", "A worker died or was killed", None),
    ],
)
def test_role_of_a_message(name: str, pid: object, line: str, role: str | None) -> None:
    assert role_of("digits", batch(name, line, pid=pid)) == role


def test_equal_lines_appear_for_each_role(
    tmp_path: Path,
    ray_printer: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_COLOR_PREFIX", "0")
    equal_lines = [batch(f"digits/worker-{rank}", "epoch 1", pid=17 + rank) for rank in range(2)]
    warning = batch("digits/worker-1/attempt-1", "a warning", pid=19, err=True)
    assert run(tmp_path, *equal_lines, warning) == []
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "(digits/worker-0 pid=17) epoch 1",
        "(digits/worker-1 pid=18) epoch 1",
    ]
    assert shown.err == "(digits/worker-1/attempt-1 pid=19) a warning\n"
    files = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert files == {"worker-0.log": "epoch 1\n", "worker-1.log": "epoch 1\na warning\n"}
    assert ray_printer == []


@pytest.mark.parametrize("dedup", ["0", "1"])
def test_broken_pipe_does_not_affect_the_files(
    dedup: str,
    tmp_path: Path,
    ray_printer: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exception would end Ray's thread of log messages."""

    class BrokenPipe:
        def write(self, text: str) -> int:
            raise BrokenPipeError

    def print_batch(batch: dict[str, Any]) -> None:
        raise BrokenPipeError

    monkeypatch.setenv("RAY_DEDUP_LOGS", dedup)
    ray_logging.global_worker_stdstream_dispatcher.handlers = [("ray_print_logs", print_batch)]
    monkeypatch.setattr("sys.stdout", BrokenPipe())
    run(tmp_path, batch("digits/worker-0", "first"), batch("digits/worker-0", "second"))
    assert (tmp_path / "logs/worker-0.log").read_text() == "first\nsecond\n"


def test_colors_depend_on_the_environment(
    tmp_path: Path,
    ray_printer: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_COLOR_PREFIX", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    run(tmp_path, batch("digits/worker-0", "x"))
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(tmp_path, batch("digits/worker-0", "x"))
    assert "\x1b" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    run(tmp_path, batch("digits/worker-0", "x"))
    assert "\x1b" not in capsys.readouterr().out
    assert "RAY_COLOR_PREFIX" not in os.environ, "the user's actors are not affected"


def test_lines_of_other_actors_are_printed_by_ray(
    tmp_path: Path, ray_printer: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    other = batch("Actor", "mine")
    run(tmp_path, other)
    assert ray_printer == [other]
    assert not (tmp_path / "logs").exists()
    assert capsys.readouterr() == ("", "")


def test_hidden_lines_are_in_files(
    tmp_path: Path, ray_printer: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, batch("digits/worker-0", "x"), shown=False)
    assert (tmp_path / "logs" / "worker-0.log").read_text() == "x\n"
    assert (capsys.readouterr(), ray_printer) == (("", ""), [])


def test_ray_dedup_logs_keeps_rays_printer(
    tmp_path: Path, ray_printer: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_DEDUP_LOGS", "1")
    message = batch("digits/worker-0", "x")
    run(tmp_path, message)
    assert ray_printer == [message]
    assert (tmp_path / "logs" / "worker-0.log").read_text() == "x\n"


def test_write_failure_gives_a_warning_and_a_count(
    tmp_path: Path, ray_printer: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file")
    warnings = run(tmp_path, *(batch("digits/worker-0", f"line {n}") for n in range(3)))
    assert len(warnings) == 2
    assert warnings[0].startswith("printed lines are lost, and the run continues without them: ")
    assert "Not a directory" in warnings[0]
    assert warnings[1] == "3 records of printed lines were not written"
    assert len(capsys.readouterr().out.splitlines()) == 3, "the lines are printed"


def test_log_files_are_rotated(tmp_path: Path) -> None:
    files = RoleFiles(tmp_path, pytest.fail, max_bytes=100)
    for number in range(100):
        files.write("worker-0", [f"line {number}"])
    files.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"worker-0.log", "worker-0.log.1"}
    assert all(size <= 100 for size in sizes.values())
    assert (tmp_path / "worker-0.log").read_text().endswith("line 99\n")


@pytest.mark.parametrize("fails", [False, True])
def test_last_lines_may_arrive_after_the_end(
    fails: bool,
    tmp_path: Path,
    ray_printer: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lines of a failed run matter most."""
    ended = threading.Event()

    def emit_late() -> None:
        assert ended.wait(60)
        last = batch("digits/worker-0", "Traceback")
        ray_logging.global_worker_stdstream_dispatcher.emit(last)

    monkeypatch.setattr(role_output, "_QUIET_S", 2.0)
    monkeypatch.setattr(role_output, "_MAX_WAIT_S", 2.0)
    thread = threading.Thread(target=emit_late)
    thread.start()
    with (
        suppress(ValueError),
        role_output.role_output("digits", tmp_path, pytest.fail, shown=False),
    ):
        ended.set()
        if fails:
            raise ValueError
    thread.join(60)
    assert (tmp_path / "logs" / "worker-0.log").read_text() == "Traceback\n"
