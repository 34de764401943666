"""`distplat submit ... -- COMMAND`: which command line is one, and what it refuses."""

import errno
import io
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from distplat.actors import script_run
from distplat.cli import script, submit
from distplat.cli.address import Target
from distplat.cli.main import run
from distplat.cli.package import Package
from distplat.cli.script import RankOutput, routed
from distplat.platform.errors import Interrupted


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            "submit --num-workers 2 -- python t.py --lr 1",
            "submit-script --num-workers 2 -- python t.py --lr 1",
        ),
        ("--debug submit -- t.py", "--debug submit-script -- t.py"),
        ("submit job.yaml", "submit job.yaml"),
        ("list -- x", "list -- x"),
        ("", ""),
    ],
)
def test_what_stands_behind_two_dashes_is_a_command(args: str, expected: str) -> None:
    assert routed(args.split()) == expected.split()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("-- job.yaml", "leave the -- out: distplat submit job.yaml"),
        ("--name A_b -- python t.py", "--name: must be lower-case letters, digits and '-'"),
        ("--working-dir /no/such -- python t.py", "--working-dir: /no/such is no directory"),
        ("--address http://localhost:8265 -- python t.py", "ray job submit -- distplat submit"),
        ("--address local --runtime-env-json {} -- t.py", "--runtime-env: has effect on a cluster"),
    ],
)
def test_refused_before_anything_starts(
    args: str,
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["submit", *args.split()]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["driver", "here"])
@pytest.mark.parametrize(
    ("folder", "named", "refused"),
    [(".", False, True), ("..", False, True), ("job", False, False), (".", True, False)],
)
def test_a_home_directory_is_shipped_only_if_it_was_named(
    kind: Any,
    folder: str,
    named: bool,
    refused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To several nodes, also of a Ray that nobody named."""
    home = tmp_path / "home"
    (home / "job").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / folder)
    shipped: list[Package] = []

    def connection(target: Target, folder: Path, *args: Any) -> AbstractContextManager[None]:
        shipped.append(Package(folder, 1, 1, "", frozenset({home.resolve() / "notes"})))
        args[-1](shipped[0])
        raise Interrupted(2)  # far enough

    target = Target(kind, "HOST:6379", "--address")
    monkeypatch.setattr(submit, "choose_target", lambda *args, **more: target)
    monkeypatch.setattr(submit, "connection", connection)
    options = ["--working-dir", "."] if named else []
    code = run(["submit", *options, "--", "python", "x.py"])
    assert shipped[0].folder == (home / folder).resolve()
    assert code == (2 if refused else 130)


class Closed(io.StringIO):
    """A pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_lines_say_whose_they_are_and_a_closed_pipe_is_left_alone() -> None:
    out = io.StringIO()
    several = RankOutput(out, 2, quiet=False)
    several.line(1, "loss 0.5")
    several.notice("starting anew")
    RankOutput(out, 1, quiet=False).line(0, "alone")
    RankOutput(out, 2, quiet=True).line(0, "unheard")
    assert out.getvalue() == "[1] loss 0.5\ndistplat: starting anew\nalone\n"
    closed = RankOutput(Closed(), 2, quiet=False)
    closed.line(0, "once")
    closed.line(0, "and again")


@pytest.mark.parametrize(("args", "seconds"), [([], 120.0), (["--start-timeout", "600"], 600.0)])
def test_the_time_that_a_start_may_take_is_an_option(
    args: list[str], seconds: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs: list[script_run.ScriptJob] = []

    def train(job: script_run.ScriptJob, terminal: object) -> script_run.ScriptResult:
        jobs.append(job)
        return script_run.ScriptResult(tmp_path, 0, 1.0)

    monkeypatch.setattr(script, "_ray", lambda *given, **options: nullcontext())
    monkeypatch.setattr(script_run, "train_script", train)
    assert run(["submit", *args, "--", "python", "train.py"]) == 0
    assert [job.start_timeout_s for job in jobs] == [seconds]
