"""The driver of a run: in the user's process, or on the cluster for a remote job."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TextIO

from distplat.actors.view import View
from distplat.cli.remote import RESULT_MARK, say
from distplat.cli.render import Facts, facts_of
from distplat.cli.shipping import ReceivedJob, read_received_job
from distplat.platform.progress import to_json
from distplat.platform.spec import Job

STORAGE = Path("~/distplat")
"""Base folder of a remote job's `storage_path`: Ray deletes the job's working directory."""


def flush_or_discard(stream: TextIO) -> None:
    """Flush a stream; if that fails, redirect it to the null device."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextmanager
def printing_result() -> Iterator[None]:
    """
    Warn if stdout does not take the printed result; the run itself has succeeded.

    A closed pipe needs no warning: its reader has seen enough.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:
            say(f"warning: the run succeeded, but its result was not printed: {error.strerror}")
    flush_or_discard(sys.stdout)


def train(
    job: Job,
    view: View,
    *,
    working_dir: Path,
    storage_dir: Path,
    strategy_file: Path | None,
    resume: str | None,
) -> Facts:
    """
    Train on the connected Ray, or on a private one, and return the results.

    Raises:
        DistplatError: see `Trainer.fit`.
    """
    from distplat.actors.trainer import Trainer  # imports Ray

    trainer = Trainer(
        job,
        working_dir=working_dir,
        storage_dir=storage_dir,
        strategy_file=strategy_file,
        callbacks=(view,),
        progress=False,
        resume=resume,
        log_to_driver=not view.quiet,
    )
    # Ray prints the output of workers to stdout, which is reserved for the result.
    with redirect_stdout(sys.stderr):
        result = trainer.fit()
    return facts_of(job, result)


def drive() -> None:
    """
    Train the job from the environment variable, and write its result to the log.

    Raises:
        DistplatError: see `Trainer.fit`.
    """
    received = read_received_job(os.environ)
    if received.job.scaling.num_workers == 0:
        facts = _train_here(received)
    else:
        from distplat.cli.join import connected

        with connected(os.environ.get("RAY_ADDRESS", "auto"), {}):
            facts = _train_here(received)
    with printing_result():
        print(RESULT_MARK + to_json(facts, indent=None))


def _train_here(received: ReceivedJob) -> Facts:
    return train(
        received.job,
        View(sys.stderr),
        working_dir=Path.cwd(),
        storage_dir=STORAGE.expanduser(),
        strategy_file=received.strategy_file,
        resume=received.resume,
    )
