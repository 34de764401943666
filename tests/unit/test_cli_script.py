"""`distplat submit ... -- COMMAND`: parsing, rejected options, upload and output."""

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
def test_routes_commands_after_two_dashes(args: str, expected: str) -> None:
    assert routed(args.split()) == expected.split()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("-- job.yaml", "leave the -- out: distplat submit job.yaml"),
        ("--name A_b -- python t.py", "--name: must be lower-case letters, digits and '-'"),
        ("--working-dir /no/such -- python t.py", "--working-dir: /no/such is no directory"),
        ("--address http://localhost:8265 -- python t.py", "ray job submit -- distplat submit"),
        ("--address local --runtime-env-json {} -- t.py", "--runtime-env: has effect on a cluster"),
    ],
)
def test_rejects_invalid_options_before_the_start(
    args: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["submit", *args.split()]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target_kind", ["driver", "here"])
@pytest.mark.parametrize(
    ("folder", "is_named", "is_rejected"),
    [(".", False, True), ("..", False, True), ("job", False, False), (".", True, False)],
)
def test_uploads_home_directory_only_if_named(
    target_kind: Any,
    folder: str,
    is_named: bool,
    is_rejected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also for a Ray that was found without `--address`."""
    home = tmp_path / "home"
    (home / "job").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / folder)
    packages: list[Package] = []

    def connection(target: Target, folder: Path, *args: Any) -> AbstractContextManager[None]:
        packages.append(Package(folder, 1, 1, "", frozenset({home.resolve() / "notes"})))
        args[-1](packages[0])
        raise Interrupted(2)  # stop here

    target = Target(target_kind, "HOST:6379", "--address")
    monkeypatch.setattr(submit, "choose_target", lambda *args, **more: target)
    monkeypatch.setattr(submit, "connection", connection)
    options = ["--working-dir", "."] if is_named else []
    code = run(["submit", *options, "--", "python", "x.py"])
    assert packages[0].folder == (home / folder).resolve()
    assert code == (2 if is_rejected else 130)


class ClosedPipe(io.StringIO):
    """A pipe without a reader."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_lines_have_a_rank_prefix_and_a_closed_pipe_is_ignored() -> None:
    out = io.StringIO()
    several = RankOutput(out, 2, quiet=False)
    several.line(1, "loss 0.5")
    several.notice("starting anew")
    RankOutput(out, 1, quiet=False).line(0, "one rank")
    RankOutput(out, 2, quiet=True).line(0, "hidden")
    assert out.getvalue() == "[1] loss 0.5\ndistplat: starting anew\none rank\n"
    closed = RankOutput(ClosedPipe(), 2, quiet=False)
    closed.line(0, "first")
    closed.line(0, "second")


@pytest.mark.parametrize(("args", "seconds"), [([], 120.0), (["--start-timeout", "600"], 600.0)])
def test_start_timeout_is_an_option(
    args: list[str], seconds: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs: list[script_run.ScriptJob] = []

    def train(job: script_run.ScriptJob, terminal: object) -> script_run.ScriptResult:
        jobs.append(job)
        return script_run.ScriptResult(tmp_path, 0, 1.0)

    monkeypatch.setattr(script, "_ray", lambda *args, **options: nullcontext())
    monkeypatch.setattr(script_run, "train_script", train)
    assert run(["submit", *args, "--", "python", "train.py"]) == 0
    assert [job.start_timeout_s for job in jobs] == [seconds]
