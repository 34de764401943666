"""`distplat submit ... -- COMMAND`: which command line is one, and what it refuses."""

import errno
import io
from contextlib import nullcontext
from pathlib import Path

import pytest

from distplat.actors import script_run
from distplat.cli import script
from distplat.cli.main import run
from distplat.cli.script import Lines, routed


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


class Closed(io.StringIO):
    """A pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_lines_say_whose_they_are_and_a_closed_pipe_is_left_alone() -> None:
    out = io.StringIO()
    several = Lines(out, 2, quiet=False)
    several.line(1, "loss 0.5")
    several.notice("starting anew")
    Lines(out, 1, quiet=False).line(0, "alone")
    Lines(out, 2, quiet=True).line(0, "unheard")
    assert out.getvalue() == "[1] loss 0.5\ndistplat: starting anew\nalone\n"
    closed = Lines(Closed(), 2, quiet=False)
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
