"""
The command `distplat`: its subcommands, their options, and the exit codes of errors.

Commands import Ray and torch when they run; this module does not, so that `--help` is fast.
"""

import errno
import logging
import os
import sys
import traceback
from io import TextIOWrapper
from typing import Annotated

import typer
from typing_extensions import override

import distplat
from distplat.actors.stopping import Stopping
from distplat.cli import jobs
from distplat.cli.common_options import (
    Address,
    DriverCpus,
    DriverGpus,
    DriverMemory,
    DryRun,
    JobFile,
    Metadata,
    Name,
    NumWorkers,
    Output,
    Quiet,
    Resume,
    RuntimeEnv,
    RuntimeEnvJson,
    Settings,
    StrategyFile,
    StrategyName,
    SubmissionId,
    Wait,
    WorkingDir,
    is_json,
)
from distplat.cli.drive import flush_or_discard
from distplat.cli.remote import Detached, say
from distplat.cli.report import report
from distplat.cli.running import scale
from distplat.cli.schedule import schedule
from distplat.cli.script import COMMAND, routed, submit_script
from distplat.cli.upload import upload
from distplat.cli.verify import replay, verify
from distplat.platform.errors import (
    DistplatError,
    InfrastructureError,
    Interrupted,
    SpecError,
    StorageError,
    UserCodeError,
    printable,
)

_STDERR = 2
_RAISING = ("strict", "surrogateescape")
"""Error handlers that raise for a character that the stream's encoding lacks."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_EPILOG = """
\b
Exit codes:
    0  succeeded
    1  the task's own code failed
    2  invalid command line, job file, option or task; nothing was trained
    3  the cluster cannot be reached, rejected the token, has an incompatible Ray or Python,
       or its Python lacks a package
    4  a part of the platform was lost, or the job was stopped
    5  the run directory or the output cannot be written, or all checkpoints are damaged;
       or the run has ended, and its copy at a URL is incomplete
   70  an error inside distplat
  130  Ctrl-C        143  SIGTERM        129  SIGHUP
  141  the reader of the output closed its pipe; a run continues and ends with its own code

Settings by precedence, highest first: flags, --set, DISTPLAT_* variables, job file, defaults.
"""

_NOT_MAPPED = "failed to map segment from shared object"
_NO_MEMORY = ("can't start new thread", _NOT_MAPPED, "Cannot allocate memory")
"""Ends of error messages of Python, the dynamic linker and the system at a resource limit."""

app = typer.Typer(
    name="distplat",
    help="Distributed training of PyTorch models on Ray.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_set: bool) -> None:
    if is_set:
        print(printable(f"distplat {distplat.__version__}"), flush=True)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Declare the options before the command; `run` itself handles `--debug`."""


@app.command()
def submit(
    job_file: JobFile,
    strategy: StrategyName = None,
    num_workers: NumWorkers = None,
    name: Name = None,
    settings: Settings = None,
    strategy_file: StrategyFile = None,
    resume: Resume = None,
    address: Address = None,
    working_dir: WorkingDir = None,
    dry_run: DryRun = False,
    wait: Wait = True,
    submission_id: SubmissionId = None,
    metadata_json: Metadata = None,
    runtime_env: RuntimeEnv = None,
    runtime_env_json: RuntimeEnvJson = None,
    entrypoint_num_cpus: DriverCpus = None,
    entrypoint_num_gpus: DriverGpus = None,
    entrypoint_memory: DriverMemory = None,
    output: Output = "text",
    quiet: Quiet = False,
) -> None:
    """
    Train the job of a job file, on this machine or on a Ray cluster.

    `distplat submit -- python train.py` runs a script: see `distplat submit --help -- python`. Run
    directories are created below `storage_path`, relative to the current directory, or to
    ~/distplat on a remote driver's machine. If it is a URL, they are created in `runs` and copied
    to the URL.
    """
    from distplat.cli import submit as command

    layers = settings, strategy, num_workers, name
    source = command.JobSource(job_file, *layers, strategy_file, working_dir)
    driver = entrypoint_num_cpus, entrypoint_num_gpus, entrypoint_memory
    remote = command.RemoteOptions(submission_id, metadata_json, wait, *driver)
    environment, output_options = (runtime_env, runtime_env_json), (is_json(output), quiet)
    request = command.SubmitRequest(source, address, resume, *environment, remote, *output_options)
    (command.dry_run if dry_run else command.submit)(request)


@app.command()
def validate(
    job_file: JobFile,
    strategy: StrategyName = None,
    num_workers: NumWorkers = None,
    name: Name = None,
    settings: Settings = None,
    strategy_file: StrategyFile = None,
) -> None:
    """
    Check a job file and its task, and print the job with all defaults.

    The task's module is imported in a separate process, from the job file's folder.
    """
    from distplat.cli import submit as command

    layers = settings, strategy, num_workers, name
    command.validate(command.JobSource(job_file, *layers, strategy_file))


@app.command()
def strategies(output: Output = "text") -> None:
    """List the strategies and their options."""
    from distplat.cli.render import print_strategies

    print_strategies(as_json=is_json(output))


app.command("list")(jobs.list_jobs)
app.command()(jobs.status)
app.command()(jobs.logs)
app.command()(jobs.stop)
app.command()(verify)
app.command()(schedule)
app.command()(replay)
app.command()(report)
app.command()(scale)
app.command()(upload)
app.command(COMMAND, hidden=True, options_metavar="[OPTIONS] --")(submit_script)


@app.command(hidden=True)
def drive() -> None:
    """Run the driver of a submitted job inside a cluster."""
    from distplat.cli.drive import drive as command

    command()


def main() -> None:
    """Run the command line and end the process with its exit code."""
    _open_streams()
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        flush_or_discard(stream)  # with a closed pipe Python would fail at exit
    sys.exit(code)


def _open_streams() -> None:
    """
    Open closed standard streams, and make all of them accept any text.

    A stream closed by the caller (`>&-`) is reopened, since the next opened file would get its
    descriptor. Characters missing in the encoding (`LC_ALL=C`, `PYTHONIOENCODING=latin-1`) are
    printed as `\\u2588`.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in _RAISING:
            stream.reconfigure(errors="backslashreplace")


class _Printable(logging.Formatter):
    """Format warnings without control characters, since they may quote any file."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def run(args: list[str]) -> int:
    """Run one command line and return its exit code."""
    command = typer.main.get_command(app)
    if logging.lastResort is not None:  # prints warnings to stderr if no handler is configured
        logging.lastResort.setFormatter(_Printable())
    try:
        # SIGTERM and SIGHUP interrupt a command like Ctrl-C, so that it leaves no process or file.
        with Stopping() as stopping, stopping.immediate():
            # Not `app()`, which would exit with 1 for a closed pipe.
            with command.make_context("distplat", routed(args)) as context:
                command.invoke(context)
        sys.stdout.flush()
        return 0
    except Interrupted as error:
        return error.exit_code if isinstance(error.__context__, Detached) else _report(error)
    except typer.Exit as leaving:
        return leaving.exit_code
    except KeyboardInterrupt:
        return 130
    except SystemExit as leaving:  # from a strategy file or a plug-in; distplat raises typer.Exit
        say(f"error: code that was loaded called sys.exit({leaving.code})")
        return 1
    except Exception as error:
        if "--debug" in args:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    """Print an error and return its exit code."""
    if isinstance(error, SpecError):
        for problem in error.problems:
            say(f"error: {problem}")
        return error.exit_code
    if isinstance(error, UserCodeError):
        frames = f"{error.frames}\n\n" if error.frames else ""
        say(f"{frames}error: {error.text}")
        return error.exit_code
    if isinstance(error, DistplatError):
        before, _, last = str(error).rpartition("\n")
        say(f"{before}\nerror: {last}".lstrip())
        return error.exit_code
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return 141  # closed pipe, for example `distplat list | head -1`: end without a message
    if isinstance(error, OSError) and error.errno in _DISK_FULL and error.filename is None:
        say(f"error: the output cannot be written: {error.strerror}")
        return StorageError.exit_code
    if isinstance(error, MemoryError) or str(error).endswith(_NO_MEMORY):
        limits = "this process gets no more memory or threads (see `ulimit -v` and `-u`)"
        say(f"error: {limits}: {error}".removesuffix(": "))
        if str(error).endswith(_NOT_MAPPED):
            say("  hint: or the library is on a file system that is mounted `noexec`")
        return InfrastructureError.exit_code
    show = getattr(error, "show", None)
    if show is not None:  # a click exception; typer versions bundle click under different names
        show()
        return int(getattr(error, "exit_code", 2))
    say(f"error inside distplat: {type(error).__name__}: {error}")
    say("  hint: distplat --debug ... shows where; please report it")
    return 70


if __name__ == "__main__":
    main()
