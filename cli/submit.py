"""`distplat submit`: read the job, choose the target, and train or submit to a cluster."""

import json
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import typer

import distplat
from distplat.actors.view import View, has_colors
from distplat.cli import remote, shipping
from distplat.cli.address import VERSION_KEY, Target, enable_token, target_of
from distplat.cli.drive import STORAGE, printing_result, train
from distplat.cli.package import (
    MAX_PACKAGE,
    Ignores,
    Package,
    measure_environment,
    refuse_home,
)
from distplat.cli.render import Facts, print_result
from distplat.cli.task_imports import check_imports
from distplat.cli.versions import check_cluster
from distplat.platform.errors import ClusterUnreachable, Problem, SpecError, naming_path, printable
from distplat.platform.job_file import render_job
from distplat.platform.progress import to_json
from distplat.platform.remote_storage import is_url, local_folder
from distplat.platform.resume import check_libraries, start_from, start_from_url
from distplat.platform.spec import Job
from distplat.strategies.catalog import load_job, load_strategy_file, make_strategy

if TYPE_CHECKING:
    from distplat.cli.cluster import Jobs


@dataclass(frozen=True)
class JobSource:
    """A job file and the options that override its fields."""

    job_file: Path
    settings: Sequence[str] | None = None
    """Values of `--set`, unparsed."""
    strategy: str | None = None
    num_workers: str | None = None
    name: str | None = None
    strategy_file: Path | None = None
    working_dir: Path | None = None

    @property
    def folder(self) -> Path:
        """Folder of the task's module."""
        return (self.working_dir or self.job_file.parent).resolve()

    def read(self) -> Job:
        """
        Read the job with all its layers of settings.

        Raises:
            SpecError: all problems of the job.
        """
        if self.strategy_file is not None:
            load_strategy_file(self.strategy_file)
        flags = [
            ("--strategy", "strategy", self.strategy),
            ("--num-workers", "scaling.num_workers", self.num_workers),
            ("--name", "name", self.name),
        ]
        flag_overrides = [f"{field}={value}" for _, field, value in flags if value is not None]
        overrides = [*(self.settings or ()), *flag_overrides]
        try:
            return load_job(self.job_file, overrides=overrides, environ=os.environ)
        except SpecError as error:  # name the flag in its problems, not the equivalent `--set`
            names = {f"--set {field}": flag for flag, field, value in flags if value is not None}
            problems = (replace(p, file=names.get(p.file, p.file)) for p in error.problems)
            raise SpecError(*problems) from None

    def read_with_task(self) -> Job:
        """
        Read a job that must have a task.

        Raises:
            SpecError: all problems of the job, or the job has no task.
        """
        job = self.read()
        if job.task is None:
            text = "is not set; only `Trainer(job, MyTask)` in Python works without it"
            hint = "give `module:Class`, `module:function` or a script, as docs/job_file.md says"
            raise SpecError(Problem(("task",), text, hint, file=str(self.job_file)))
        return job


@dataclass(frozen=True)
class RemoteOptions:
    """Options that only the job API of a cluster supports."""

    submission_id: str | None = None
    metadata_json: str | None = None
    wait: bool = True
    entrypoint_num_cpus: float | None = None
    entrypoint_num_gpus: float | None = None
    entrypoint_memory: int | None = None

    @property
    def resources(self) -> dict[str, float]:
        """Resources of the driver, by Ray's argument names."""
        fields = {name: value for name, value in vars(self).items() if name.startswith("entry")}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class SubmitRequest:
    """Options of the command line."""

    source: JobSource
    address: str | None = None
    resume: str | None = None
    runtime_env: Path | None = None
    runtime_env_json: str | None = None
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    as_json: bool = False
    quiet: bool = False

    def say(self, line: str) -> None:
        """Print to stderr, unless `--quiet` is set."""
        if not self.quiet:
            remote.say(line)

    def shipping(self, task: str | None, package: Package) -> None:
        """
        Print what is uploaded to the cluster.

        Raises:
            SpecError: the package is a home directory without an explicit `--working-dir`, or it
                lacks a file that the task imports.
        """
        if self.source.working_dir is None:
            refuse_home(package, "the job file lies there")
        if task is not None:
            check_imports(task, package)
        self.say(str(package))


def validate(source: JobSource) -> None:
    """
    Check a job and its task, and print the job with all defaults.

    Raises:
        SpecError: all problems of the job, or the problem of the task.
        UserCodeError: the import of the task's module raised.
    """
    job = source.read()
    check_libraries(job)
    if job.task is None:
        remote.say("warning: task: is not set: `Trainer(job, MyTask)` takes this job, not `submit`")
    else:
        from distplat.actors.task_check import task_check

        with task_check(job, str(source.folder), shown=True) as check:
            for line in check.result(job.failure.start_timeout_s):
                remote.say(f"warning: {line}")
    print(printable(render_job(job)), end="")


def submit(request: SubmitRequest) -> None:
    """
    Run a job, and print its result.

    Raises:
        SpecError: the job or the options are invalid; nothing was started.
        DistplatError: the run failed.
        typer.Exit: a remote job failed; has the exit code.
    """
    job = request.source.read_with_task()
    target = _target(request, job)
    _check_options(request, target)
    if target.kind == "jobs":
        _submit_remote(request, job, target)
        return
    request.say(f"running {_place(target, job)}")
    view = View(quiet=request.quiet)
    user_env = request.runtime_env, request.runtime_env_json
    with connection(target, request.source.folder, *user_env, partial(request.shipping, job.task)):
        facts = train(
            job,
            view,
            working_dir=request.source.folder,
            storage_dir=Path.cwd(),
            strategy_file=request.source.strategy_file,
            resume=request.resume,
        )
    _print(facts, request)


def dry_run(request: SubmitRequest) -> None:
    """
    Print the job with all defaults, and the roles that it would start; start nothing.

    Raises:
        SpecError: see `submit`.
    """
    job = request.source.read_with_task()
    target = _target(request, job)
    _check_options(request, target)
    start = None
    if target.kind != "jobs":
        check_libraries(job)
        start = _start_step(request, job)
    roles = make_strategy(job).roles(job)
    started = {"num_workers": job.scaling.num_workers, "num_servers": roles.servers}
    if request.as_json:
        fields = job.model_dump(mode="json")
        print(to_json({"job": fields, "where": _describe(target, job), "would_start": started}))
        return
    print(printable(render_job(job)), end="")
    request.say(
        f"would start {job.scaling.num_workers} workers and {roles.servers} server nodes "
        f"({job.strategy.name}) {_place(target, job)}"
    )
    if start is not None:
        request.say(f"would resume after step {start}, from {request.resume}")


def _start_step(request: SubmitRequest, job: Job) -> int | None:
    """Return the step from which a run would resume; None: it would start from scratch."""
    if request.resume is None:
        return None
    if not is_url(request.resume):
        path = Path.cwd() / Path(request.resume).expanduser()
        return start_from(job, path, request.say).step
    with TemporaryDirectory() as folder:
        return start_from_url(job, request.resume, Path(folder), request.say).step


def _target(request: SubmitRequest, job: Job) -> Target:
    return choose_target(request.address, request.say, with_ray=job.scaling.num_workers > 0)


def choose_target(address: str | None, say: Callable[[str], None], *, with_ray: bool) -> Target:
    """
    Choose the target: by option, by environment, a cluster on this machine, or a local Ray.

    Args:
        address: `--address`.
        say: called with the reason if a Ray on this machine is not joined.
        with_ray: whether the run needs Ray.

    Raises:
        SpecError: the address has an unknown format.
        ClusterUnreachable: the address is `auto`, and this machine has no Ray of this user.
    """
    target = target_of(address, os.environ)
    enable_token(target)
    if target.address != "auto" and (target.origin or not with_ray):
        return target
    from distplat.cli.join import own_ray_address, running_here

    if target.address == "auto":
        return Target("here", own_ray_address(), target.origin)
    local_address = running_here(say)
    return Target("here", local_address, "") if local_address else target


def _describe(target: Target, job: Job) -> str:
    return describe_target(target) if job.scaling.num_workers else "this process, without Ray"


def _place(target: Target, job: Job) -> str:
    return f"{'on' if job.scaling.num_workers else 'in'} {_describe(target, job)}"


def describe_target(target: Target) -> str:
    """Return a description of a target for messages."""
    if target.kind == "local":
        return "a local Ray, for this run only"
    if target.kind == "here":
        return f"the Ray cluster of this machine, {target.address}"
    return f"the Ray cluster at {target.address} (from {target.origin})"


def connection(
    target: Target,
    folder: Path,
    runtime_env: Path | None,
    runtime_env_json: str | None,
    on_package: Callable[[Package], None],
) -> AbstractContextManager[None]:
    """
    Connect to a cluster; a local Ray is started later, by the run itself.

    Args:
        target: target of the run.
        folder: folder to upload.
        runtime_env: `--runtime-env`.
        runtime_env_json: `--runtime-env-json`.
        on_package: called with the package before it is uploaded.

    Raises:
        SpecError: the runtime environment is invalid.
    """
    if not has_colors(sys.stdout, sys.stderr):
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # plain prefixes of the workers' output
    if target.kind == "local":
        return nullcontext()
    from distplat.actors.ray_compat import use_token_at_hand
    from distplat.cli.join import check_environment, connected

    user_env = shipping.read_runtime_env(runtime_env, runtime_env_json)
    check_environment(user_env)
    if target.kind == "here":
        use_token_at_hand()
    return connected(target.address, shipping.with_folders(folder, user_env), on_package)


def _check_options(request: SubmitRequest, target: Target) -> None:
    """
    Refuse options that would have no effect.

    Raises:
        SpecError: an option has no effect, or the working directory does not exist.
    """
    remote_only = {
        "--submission-id": request.remote.submission_id,
        "--metadata-json": request.remote.metadata_json,
        "--no-wait": not request.remote.wait,
        "--entrypoint-*": request.remote.resources,
    }
    unused = [option for option, value in remote_only.items() if value and target.kind != "jobs"]
    if target.kind == "local" and (request.runtime_env or request.runtime_env_json):
        unused.append("--runtime-env")
    if unused:
        hint = "give --address http://HOST:8265"
        raise SpecError(
            *(Problem((option,), "has effect on a cluster only", hint) for option in unused)
        )
    with naming_path("the current directory"):
        Path.cwd()
    with naming_path(request.source.folder, "--working-dir"):
        exists = request.source.folder.is_dir()
    if not exists:
        raise SpecError(Problem(("--working-dir",), f"{request.source.folder} is no directory"))


def _send(request: SubmitRequest, job: Job, target: Target) -> tuple["Jobs", str]:
    """
    Connect to a job API, check versions and submit a job; return the client and the job's id.

    Raises:
        SpecError: the options or the package are invalid.
        ClusterUnreachable: the job API does not answer, or the cluster is too old.
    """
    user_env = shipping.read_runtime_env(request.runtime_env, request.runtime_env_json)
    metadata = _metadata(request.remote.metadata_json, job)
    from distplat.cli.cluster import OURS, Jobs
    from distplat.cli.join import check_environment, ignores

    check_environment(user_env)
    jobs = Jobs(target.address)
    if note := check_cluster(target.address, jobs.versions(), OURS, user_env):
        request.say(note)
    return jobs, send(jobs, job, request, user_env, metadata, ignores)


def send(
    jobs: "Jobs",
    job: Job,
    request: SubmitRequest,
    user_env: Mapping[str, Any],
    metadata: Mapping[str, str],
    ignores: Ignores,
) -> str:
    """
    Submit a job to a job API and return its id.

    Args:
        jobs: client of the job API.
        job: job to submit.
        request: options of the command line.
        user_env: the user's runtime environment.
        metadata: metadata of the job at the job API.
        ignores: see `Ignores`.

    Raises:
        SpecError: the folder cannot be uploaded, or the cluster rejects the job.
    """
    job_id = remote.check_id(request.remote.submission_id or f"{job.name}-{secrets.token_hex(3)}")
    strategy_file, resume = request.source.strategy_file, request.resume
    environment = shipping.runtime_env(job, request.source.folder, strategy_file, user_env, resume)
    package = measure_environment(environment, ignores, MAX_PACKAGE)
    request.shipping(job.task, package)
    return jobs.submit(
        entrypoint=shlex.join(["python", "-m", "distplat.cli.on_cluster"]),
        submission_id=job_id,
        runtime_env=environment,
        metadata=metadata,
        **request.remote.resources,
    )


def _submit_remote(request: SubmitRequest, job: Job, target: Target) -> None:
    jobs, job_id = _send(request, job, target)
    request.say(f"job {job_id} is on {_describe(target, job)}")
    folder = local_folder(job.storage_path)
    if not Path(folder).is_absolute():
        request.say(f"run directory: below {STORAGE / folder} of the driver's machine")
    if not request.remote.wait:
        _print_job_id(job_id, target, request)
        return
    reader = remote.LogReader(request.say)
    try:
        info = remote.follow(jobs, job_id, reader)
    except KeyboardInterrupt:
        _say_detached(f"\ndetached; the job {job_id} continues", job_id, target)
        raise remote.Detached from None
    except ClusterUnreachable:
        text = f"lost the connection to the job {job_id}, which may continue"
        _say_detached(text, job_id, target)
        raise
    if reader.facts is not None:
        _print(reader.facts, request, job_id)
    code = remote.exit_code(info)
    if code:
        remote.say(f"error: job {job_id} {info['status']}, exit code {code}")
        raise typer.Exit(code)


def _print_job_id(job_id: str, target: Target, request: SubmitRequest) -> None:
    for line in _next_commands(job_id, target):
        request.say(line)
    if request.as_json:
        print(to_json({"id": job_id, "address": target.address}))
    else:
        print(printable(job_id))


def _say_detached(reason: str, job_id: str, target: Target) -> None:
    for line in (reason, *_next_commands(job_id, target)):
        remote.say(line)


def _next_commands(job_id: str, target: Target) -> list[str]:
    where = shlex.join([job_id, "--address", target.address])
    return [
        f"  follow: distplat logs -f {where}",
        f"  status: distplat status {where}",
        f"  stop:   distplat stop {where}",
    ]


def _metadata(text: str | None, job: Job) -> dict[str, str]:
    """
    Parse `--metadata-json` and add distplat's metadata.

    Raises:
        SpecError: the value is not a mapping of text to text, or has keys set by distplat.
    """
    option = ("--metadata-json",)
    try:
        fields = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise SpecError(Problem(option, f"is not JSON: {error}")) from None
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise SpecError(Problem(option, "must be a mapping of text to text"))
    metadata = {
        "job_name": job.name,  # a key of Ray, shown in the dashboard
        "strategy": job.strategy.name,
        "num_workers": str(job.scaling.num_workers),
        VERSION_KEY: distplat.__version__,
    }
    for key in sorted(metadata.keys() & fields):
        raise SpecError(Problem((*option, key), "is set by distplat itself"))
    return {**fields, **metadata}


def _print(facts: Facts, request: SubmitRequest, job_id: str | None = None) -> None:
    """Print the result of a run that succeeded."""
    with printing_result():
        if request.as_json:
            print(to_json(facts if job_id is None else {**facts, "id": job_id}))
        else:
            print_result(facts)
