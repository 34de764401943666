"""Being the driver of a run: in the user's own process, or inside a cluster for a remote job."""

import os
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

from distplat.actors.view import View
from distplat.cli.remote import RESULT_MARK
from distplat.cli.render import Facts, facts_of
from distplat.cli.shipping import Received, received_job
from distplat.platform.progress import to_json
from distplat.platform.spec import Job

STORAGE = Path("~/distplat")
"""What a remote job's `storage_path` is relative to: the job's own folder ends with the job."""


def flush_or_discard(stream: TextIO) -> None:
    """Flush a stream; if that fails, redirect it to the null device."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


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
    Train to the end on the connected Ray, or on one of our own.

    Raises:
        DistplatError: see `Trainer.fit`.
    """
    from distplat.actors.trainer import Trainer  # Ray comes with it

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
    # Ray hands on what workers print; stdout is for the result alone.
    with redirect_stdout(sys.stderr):
        result = trainer.fit()
    return facts_of(job, result)


def drive() -> None:
    """
    Train the job that the environment holds, and write its result into the log.

    Raises:
        DistplatError: see `Trainer.fit`.
    """
    received = received_job(os.environ)
    if received.job.scaling.num_workers == 0:
        facts = _train_here(received)
    else:
        from distplat.cli.join import connected

        with connected(os.environ.get("RAY_ADDRESS", "auto"), {}):
            facts = _train_here(received)
    with suppress(OSError):  # the job's log is on a disk that may be full
        print(RESULT_MARK + to_json(facts, indent=None), flush=True)
    flush_or_discard(sys.stdout)


def _train_here(received: Received) -> Facts:
    return train(
        received.job,
        View(sys.stderr),
        working_dir=Path.cwd(),
        storage_dir=STORAGE.expanduser(),
        strategy_file=received.strategy_file,
        resume=received.resume,
    )
