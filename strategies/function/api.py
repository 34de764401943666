"""
What `distplat` offers inside a train function; each asks the session of its thread.

`train` of docs/train_function.md shows all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.function.function_session import FunctionSession, TrainContext

_of_thread = threading.local()


def prepare(*things: Any) -> Any:
    """
    Make what a loop trains with ready for several workers.

    Args:
        things: models, optimizers, DataLoaders and schedulers, in any order.

    Returns:
        The same things, in the same order. A model is the same object: rank 0's parameters, on the
        worker's device, with gradients that are averaged in each backward. A DataLoader gives this
        rank's part of the data, on the device; its batch size is per worker. Optimizers and
        schedulers are given back as they are.

    Raises:
        SpecError: something that cannot be prepared; says what to do.
    """
    return _session().prepare(*things)


def report(metrics: Mapping[str, Any], checkpoint: Any = None) -> None:
    """
    Tell the run's figures: a step of its history. Rank 0's count; `loss` is the one that is shown.

    Args:
        metrics: numbers by name.
        checkpoint: dicts, lists and tuples of tensors, numbers and strings, such as `state_dict()`
            of model and optimizer; or a directory, as a `Checkpoint`, ours or Ray Train's. Rank 0's
            is kept; after a restart `get_checkpoint` gives the last one.

    Raises:
        SpecError: it holds something else; says where.
    """
    _session().report(metrics, checkpoint)


def get_checkpoint() -> Any:
    """Give the checkpoint that the run goes on from, on all ranks; None: it begins."""
    return _session().checkpoint()


def get_context() -> TrainContext:
    """Give rank, world size, local rank and device of this worker."""
    return _session().context


def barrier() -> None:
    """Return when every worker has come here."""
    _session().group.barrier()


def gather_for_metrics(values: Any) -> Any:
    """
    Give what all workers have computed of their batches, for metrics over all samples.

    Every worker calls this. Samples that a loader repeated, so that all ranks have as many, are
    left out of what is as long as the last batch of the pass under way.

    Args:
        values: tensors and numbers, in dicts, lists and tuples.

    Returns:
        The same form; the workers' tensors one behind the other, in the order of ranks.

    Raises:
        SpecError: something else is among them.
    """
    return _session().gather(values)


def should_stop() -> bool:
    """
    Say whether a callback or `early_stop` wants the run to end: the loop is to be left then.

    Under `ring` and `ps-sync` every worker asks as often, and all get the same answer. Under
    `ps-async` each one asks for itself.
    """
    return _session().should_stop()


def no_sync() -> AbstractContextManager[None]:
    """Accumulate gradients without averaging: for all backwards of a step but the last."""
    return _session().no_sync()


@contextmanager
def running(session: FunctionSession) -> Iterator[None]:
    """Have a session answer in this thread."""
    _of_thread.session = session
    try:
        with session.gathering():
            yield
    finally:
        _of_thread.session = None


def _session() -> FunctionSession:
    session: FunctionSession | None = getattr(_of_thread, "session", None)
    if session is None:
        text = "this is not the thread of a train function that distplat runs"
        hint = (
            "call it in the function that Trainer(job, train) or `task: module:train` names, or in "
            "the script of `task: train.py`, and have `distplat submit job.yaml` run that job"
        )
        raise SpecError(Problem(("task",), text, hint))
    return session
