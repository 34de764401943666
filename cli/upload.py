"""`distplat upload`: complete the copy of a finished run at its URL."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from distplat.actors.stopping import Stopping
from distplat.cli.remote import say
from distplat.cli.report import write_new
from distplat.platform.errors import Problem, SpecError, StorageError, printable
from distplat.platform.remote_storage import check_url, is_url
from distplat.platform.run_record import RunRecord, find_run, read_run
from distplat.platform.run_upload import RESULT, completed, upload_of
from distplat.platform.spec import Failure

Run = Annotated[Path, typer.Argument(help="The run directory, or its name below `runs/`.")]


def upload(run: Run) -> None:
    """
    Complete the copy of a run whose `storage_path` is a URL.

    Use this command if the driver was killed or the storage failed before the copy was complete.
    All files are uploaded again.
    """
    path = find_run(run)
    record = read_run(path, steps=False)
    url, limit_s = _where(record)
    say(f"uploading {path} to {url.rstrip('/')}/{path.name}")
    before, complete = record.result, False
    if before is not None:
        _write_result(path, completed(before))
    try:
        with Stopping() as stopping:
            copy = upload_of(path, url, limit_s, lambda text: say(f"warning: {text}"))
            missing = copy.close(lambda: stopping.is_requested)
            complete = not missing
    finally:
        if before is not None and not complete:
            _write_result(path, before)
    if missing and stopping.is_requested:
        say(f"error: {missing}")
        stopping.check()
    if missing:
        raise StorageError(missing)
    print(printable(copy.url))


def _where(record: RunRecord) -> tuple[str, float]:
    """
    Return the URL of the copy's parent folder, and the deadline of its storage.

    Raises:
        SpecError: the job has no URL, or the URL is not writable.
    """
    url = record.job.get("storage_path")
    if not isinstance(url, str) or not is_url(url):
        text = f"{record.path / 'job.yaml'} has no URL as `storage_path`"
        raise SpecError(Problem(("storage_path",), text, "copy the directory as it is"))
    check_url(url, "storage_path")
    try:
        fields = {"storage_timeout_s": record.job["failure"]["storage_timeout_s"]}
        return url, Failure.model_validate(fields).storage_timeout_s
    except (LookupError, TypeError, ValueError):
        return url, Failure().storage_timeout_s


def _write_result(path: Path, facts: Mapping[str, Any]) -> None:
    write_new(path / RESULT, json.dumps(facts, indent=2) + "\n")
