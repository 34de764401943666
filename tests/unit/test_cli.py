"""The command line: help, messages, precedence of settings, exit codes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lin_task import TASK
from marks import slow

import distplat
from distplat.cli import render
from distplat.cli.main import run
from distplat.platform.errors import (
    ActorLost,
    ClusterUnreachable,
    Interrupted,
    StorageError,
    UserCodeError,
)
from distplat.platform.yaml_source import parse_yaml

JOB = """\
name: lin
task: lin:Lin
strategy: {name: ps-sync, num_servers: 2}
scaling: {num_workers: 2}
optimizer: {name: SGD, lr: 0.1}
steps: 10
global_batch_size: 16
"""
COMMAND = [sys.executable, "-m", "distplat.cli.main"]


@pytest.fixture(autouse=True)
def _folder_with_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    Path("lin.py").write_text(TASK)
    for name in [*os.environ]:
        if name.startswith("DISTPLAT_") or name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            monkeypatch.delenv(name)


def test_help_documents_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    output = capsys.readouterr().out
    for code in ("0  succeeded", "1  the task", "2  invalid", "3  the cluster", "70  an error"):
        assert code in output
    assert {"129", "130", "141", "143"} <= set(output.split())
    assert "drive" not in output  # internal command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"distplat {distplat.__version__}\n"


def test_light_commands_import_neither_ray_nor_torch() -> None:
    """Run the commands in one process, which exits with the first that imports ray or torch."""
    lines = [
        ["--help"],
        ["submit", "--help"],
        ["strategies"],
        ["validate", "job.yaml"],
        ["submit", "job.yaml", "--dry-run", "--address", "local"],
    ]
    code = (
        "import sys\nfrom distplat.cli.main import run\n"
        f"for line in {lines!r}:\n"
        "    code = run(line)\n"
        "    loaded = ', '.join({'ray', 'torch'} & set(sys.modules))\n"
        "    if code or loaded: sys.exit(f'{line}: {code} {loaded}')\n"
        "    print('end of', *line)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 0, process.stderr
    for line in lines:  # each command prints something
        printed, _, rest = process.stdout.partition(f"end of {' '.join(line)}\n")
        assert printed.strip()
        process.stdout = rest


NO_JOB = "error: none.yaml: there is no such file\n"
NO_RAY_CLIENT = (
    "error: --address: Ray Client (ray://) is not supported\n"
    "  hint: use the job API, http://HOST:8265, or HOST:6379 on a machine of the cluster\n"
)
NO_TASK = ["--set", "task=null"]
NO_JOB_API = (
    "error: --address: local is not a job API, which is needed to find a job\n"
    "  hint: give http://HOST:8265\n"
)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["submti"], "Error: No such command 'submti'. Did you mean 'submit'?"),
        (["submit"], "Missing argument 'JOB.yaml'"),
        (["submit", "job.yaml", "--strateg", "ring"], "No such option: --strateg"),
        (["submit", "none.yaml"], NO_JOB),
        (["validate", "none.yaml"], NO_JOB),
        (["validate", "."], "error: .: is a directory, not a file\n"),
        (
            ["submit", "job.yaml", "--strategy", "rnig"],
            "error: --strategy: strategy: unknown strategy 'rnig'\n  hint: did you mean 'ring'? ",
        ),
        (
            ["submit", "job.yaml", "--num-workers", "two"],
            "error: --num-workers: scaling.num_workers: must be a whole number (got 'two')\n",
        ),
        (
            ["submit", "job.yaml", "--num_workers", "-1"],
            "error: --num-workers: scaling.num_workers: must be >= 0",
        ),
        (
            ["validate", "job.yaml", "--set", "optimizer.momentun=0.9"],
            "error: --set optimizer.momentun: optimizer.momentun: unknown field",
        ),
        (
            ["submit", "job.yaml", "--set", "name=yes"],
            "error: --set name: name: must be text (got true)\n",
        ),
        (["validate", "job.yaml", "--set", "seed"], "error: --set: must be field=value"),
        (["submit", "job.yaml", "--address", "ray://h:1"], NO_RAY_CLIENT),
        (["submit", "job.yaml", "--address", "h"], "error: --address: 'h' is no address\n"),
        (["status", "x", "--address", "local"], NO_JOB_API),
        (["strategies", "-o", "yaml"], "error: --output is 'yaml', allowed: text, json\n"),
        (
            ["submit", "job.yaml", "--address", "local", "--submission-id", "x", "--no-wait"],
            "error: --submission-id: has effect on a cluster only\n"
            "  hint: give --address http://HOST:8265\n"
            "error: --no-wait: has effect on a cluster only\n",
        ),
        (
            ["submit", "job.yaml", "--address", "local", "--runtime-env-json", "{}"],
            "error: --runtime-env: has effect on a cluster only\n",
        ),
        (
            ["submit", "job.yaml", "--address", "local", "--working-dir", "nowhere"],
            "error: --working-dir: ",
        ),
        (
            ["submit", "job.yaml", *NO_TASK, "--address", "local"],
            "error: job.yaml: task: is not set",
        ),
        (["submit", "job.yaml", *NO_TASK, "--address", "http://127.0.0.1:9"], "task: is not set"),
        (["submit", "job.yaml", *NO_TASK, "--dry-run"], "task: is not set"),
        (["verify", "job.yaml", *NO_TASK], "task: is not set"),
        (["submit", "job.yaml", "--strategy-file", "s.py"], "error: --strategy-file: s.py is not"),
        (["drive"], "error: `drive` runs inside a cluster only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_rejects_invalid_command_lines_before_the_start(
    args: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert not Path("runs").exists()


def test_reports_every_problem_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.yaml").write_text(JOB.replace("lr: 0.1", "lr: -1, momentun: 0.9"))
    assert run(["validate", "job.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: job.yaml:5:24: optimizer.lr: must be > 0 (got -1)"
    assert lines[1] == "error: job.yaml:5:32: optimizer.momentun: unknown field (value 0.9)"
    assert lines[2].startswith("  hint: did you mean 'momentum'?")


@pytest.mark.parametrize(
    ("strategy", "problem"),
    [
        ("rnig", "job.yaml:3:1: strategy: unknown strategy 'rnig'"),
        (
            "{name: ring, staleness: 4}",
            "job.yaml:3:24: strategy.staleness: unknown field (value 4)",
        ),
    ],
)
def test_reports_strategy_errors_with_those_of_other_fields(
    strategy: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = JOB.replace("{name: ps-sync, num_servers: 2}", strategy).replace("steps: 10", "steps: x")
    Path("job.yaml").write_text(text)
    assert run(["validate", "job.yaml"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert errors == [
        f"error: {problem}",
        "error: job.yaml:6:1: steps: must be a whole number (got 'x')",
    ]


def test_job_without_task_is_valid_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "job.yaml", *NO_TASK]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(
        "warning: task: is not set: `Trainer(job, MyTask)` takes this job"
    )
    assert "task: null" in printed.out


def resolved_job(args: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert run(args) == 0
    fields, _ = parse_yaml(capsys.readouterr().out, "stdout")
    return fields


@pytest.mark.parametrize(
    ("variable", "args", "workers"),
    [
        (None, [], 2),
        ("3", [], 3),
        ("3", ["--set", "scaling.num_workers=4"], 4),
        ("3", ["--num-workers", "5", "--set", "scaling.num_workers=4"], 5),
    ],
)
def test_precedence_is_flags_set_environment_file(
    variable: str | None,
    args: list[str],
    workers: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable is not None:
        monkeypatch.setenv("DISTPLAT_SCALING__NUM_WORKERS", variable)
    fields = resolved_job(["validate", "job.yaml", *args], capsys)
    assert fields["scaling"]["num_workers"] == workers


def test_other_strategy_drops_options_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    fields = resolved_job(["validate", "job.yaml", "--strategy", "ring", "-n", "other"], capsys)
    assert fields["strategy"] == {"name": "ring"}
    assert fields["name"] == "other"


def test_dry_run_prints_the_job_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["submit", "job.yaml", "--dry-run", "--address", "local"]
    assert run(args) == 0
    printed = capsys.readouterr()
    assert "seed: 0" in printed.out  # a default
    assert printed.err == (
        "would start 2 workers and 2 server nodes (ps-sync) on a local Ray, for this run only\n"
    )
    assert run([*args, "-o", "json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["would_start"] == {"num_workers": 2, "num_servers": 2}
    assert not Path("runs").exists()


def test_strategies_lists_options_with_type_default_and_description(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["strategies", "-o", "json"]) == 0
    by_name = {strategy["name"]: strategy for strategy in json.loads(capsys.readouterr().out)}
    servers, resources, *_ = by_name["ps-sync"]["options"]
    assert (servers["name"], servers["type"]) == ("num_servers", "integer 1 to 256")
    assert servers["default"] == 1
    assert servers["description"].startswith("Server nodes")
    assert resources["type"] == "mapping of text to number"
    staleness = next(o for o in by_name["ps-async"]["options"] if o["name"] == "staleness")
    assert (staleness["type"], staleness["default"]) == ("'unbounded' or integer", "unbounded")
    assert run(["strategies"]) == 0
    output = capsys.readouterr().out
    assert f"ring  {by_name['ring']['summary']}" in output
    assert "num_servers: integer 1 to 256, default 1" in output


LOST = ActorLost("worker-1", 7, "its process died")
USER = UserCodeError(1, 3, "ValueError: no", 'Traceback:\n  File "m.py"\nValueError: no\n')


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (USER, 1, 'Traceback:\n  File "m.py"\nValueError: no\n\nerror: your task failed on rank 1'),
        (ClusterUnreachable("no answer"), 3, "error: no answer\n"),
        (LOST, 4, "error: worker-1 was lost after step 7: its process died\n"),
        (StorageError("disk full"), 5, "error: disk full\n"),
        (Interrupted(2), 130, "error: interrupted by SIGINT\n"),
        (Interrupted(15), 143, "error: interrupted by SIGTERM\n"),
        (Interrupted(1), 129, "error: interrupted by SIGHUP\n"),
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 4, "error: this process gets no more memory or threads"),
        (RuntimeError("can't start new thread"), 4, "error: this process gets no more memory or"),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            4,
            "error: this process gets no more memory or threads (see `ulimit -v` and `-u`): "
            "libtorch_cpu.so: failed to map segment from shared object\n"
            "  hint: or the library is on a file system that is mounted `noexec`\n",
        ),
        (OSError(12, "Cannot allocate memory"), 4, "error: this process gets no more memory or"),
        (ZeroDivisionError("ours"), 70, "error inside distplat: ZeroDivisionError: ours\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_have_exit_codes_and_no_internal_traceback(
    error: BaseException,
    code: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**options: bool) -> None:
        raise error

    monkeypatch.setattr(render, "print_strategies", fail)
    assert run(["strategies"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith(expected)
    assert __file__ not in printed


def test_debug_prints_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: bool) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(render, "print_strategies", fail)
    assert run(["--debug", "strategies"]) == 70
    assert __file__ in capsys.readouterr().err


def test_closed_output_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [*COMMAND, "strategies"], stdout=writer, stderr=subprocess.PIPE, timeout=100
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full exists only on Linux")
@pytest.mark.parametrize("args", [["strategies"], slow(["strategies", "-o", "json"]), ["--help"]])
def test_reports_full_disk_of_the_output(args: list[str]) -> None:
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [*COMMAND, *args], stdout=full, stderr=subprocess.PIPE, timeout=100
        )
    assert process.returncode == 5
    assert process.stderr == b"error: the output cannot be written: No space left on device\n"


def test_closed_streams_are_no_error() -> None:
    closed = 'exec "$@" <&- >&- 2>&-'
    process = subprocess.run(["sh", "-c", closed, "sh", *COMMAND, "strategies"], timeout=100)
    assert process.returncode == 0


@pytest.mark.sweep(3)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full exists only on Linux")
@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("printed", ["job", "script"])
def test_successful_run_exits_with_0_if_output_fails(
    printed: str, as_json: bool, tmp_path: Path
) -> None:
    """The result table is the last output of a command."""
    script = PRINTS.replace("PRINTED", printed).replace("AS_JSON", str(as_json))
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=100,
        )
    warning = b"warning: the run succeeded, but its result was not printed: No space left on device"
    assert (process.returncode, process.stderr) == (0, warning + b"\n")


PRINTS = """
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock
from distplat.actors import script_run
from distplat.cli import main, script, submit

if "PRINTED" == "job":
    facts = {"job": "too long for a buffer" * 1000}
    with mock.patch.object(submit, "print_result", lambda facts: print(facts)):
        submit._print(facts, mock.Mock(as_json=AS_JSON))
else:
    result = mock.Mock(restarts=0, seconds=1.0, path=Path(sys.argv[1]))
    with (
        mock.patch.object(script, "_ray", lambda *args, **options: nullcontext()),
        mock.patch.object(script_run, "train_script", lambda job, lines: result),
    ):
        args = ["submit", "-o", "json"] if AS_JSON else ["submit"]
        assert main.run([*args, "--", "python", "train.py"]) == 0
"""


LONG = "x" * 300
"""A file name longer than any file system allows."""


@pytest.mark.parametrize(
    "args",
    [
        ["report", LONG],
        ["report", f"{LONG}/run"],
        ["submit", LONG],
        ["submit", "job.yaml", "--working-dir", LONG],
        ["submit", "job.yaml", "--strategy-file", f"{LONG}.py"],
        ["submit", "--working-dir", LONG, "--", "python", "train.py"],
        ["verify", LONG],
        ["replay", LONG],
    ],
)
def test_reports_the_system_error_of_a_path(
    args: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    assert run(args) == 2
    assert "File name too long" in capsys.readouterr().err


def test_reports_unreadable_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distplat.cli.jobs.DASHBOARD", "http://127.0.0.1:9")
    (tmp_path / "runs" / "r").mkdir(parents=True)
    monkeypatch.setattr(Path, "iterdir", deny)
    for args in (["list"], ["report", "x"], ["report", "r"]):
        assert run(args) == 2
        assert "Permission denied" in capsys.readouterr().err


def test_reports_deleted_current_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for args in (["submit", str(path)], ["submit", "--", "python", "train.py"]):
        assert run(args) == 2
        assert "the current directory: No such file or directory" in capsys.readouterr().err
