"""
Functions of `distplat` for use in a train function; each calls the session of the current thread.

docs/train_function.md shows an example with all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.function.function_session import FunctionSession, TrainContext

_local = threading.local()


def prepare(*objects: Any) -> Any:
    """
    Prepare models, optimizers, DataLoaders and schedulers for distributed training.

    Args:
        objects: models, optimizers, DataLoaders and schedulers, in any order.

    Returns:
        The prepared objects, in the same order. A model is the same object, moved to the worker's
        device, with rank 0's parameters and with gradients that are averaged in each backward. A
        DataLoader is replaced by one that yields this rank's part of the data, on the device; its
        batch size is per worker. Optimizers and schedulers are the same objects.

    Raises:
        SpecError: An object cannot be prepared; the message suggests a remedy.
    """
    return _session().prepare(*objects)


def report(metrics: Mapping[str, Any], checkpoint: Any = None) -> None:
    """
    Report metrics, and optionally a checkpoint, as the next step of the run's history.

    Only rank 0's values are used. `loss` is shown in the progress output.

    Args:
        metrics: numbers by name.
        checkpoint: dicts, lists and tuples of tensors, numbers and strings, such as the
            `state_dict()` of model and optimizer; or a directory as a `Checkpoint` of distplat or
            Ray Train. Rank 0's checkpoint is saved. After a restart `get_checkpoint` returns the
            last one.

    Raises:
        SpecError: The checkpoint contains another type; the message says where.
    """
    _session().report(metrics, checkpoint)


def get_checkpoint() -> Any:
    """Return the checkpoint from which the run resumes, on all ranks; None: a new run."""
    return _session().checkpoint()


def get_context() -> TrainContext:
    """Return the rank, world size, local rank and device of this worker."""
    return _session().context


def barrier() -> None:
    """Wait until every worker has called this."""
    _session().group.barrier()


def gather_for_metrics(values: Any) -> Any:
    """
    Gather values of each worker's batch, for metrics over all samples.

    Every worker calls this. A loader may repeat samples so that all ranks have the same number of
    batches. A tensor as long as the current pass's last batch is gathered without the repeated
    samples.

    Args:
        values: tensors and numbers, in dicts, lists and tuples.

    Returns:
        The same structure, with the workers' tensors concatenated in rank order.

    Raises:
        SpecError: The values contain another type.
    """
    return _session().gather(values)


def should_stop() -> bool:
    """
    Return whether a callback or `early_stop` has requested the end of the run; if so, leave the
    loop.

    Under `ring` and `ps-sync` every worker must call this equally often, and all get the same
    result. Under `ps-async` each worker gets its own result.
    """
    return _session().should_stop()


def no_sync() -> AbstractContextManager[None]:
    """
    Context manager: accumulate gradients without averaging, for all but the last backward of a
    step.
    """
    return _session().no_sync()


@contextmanager
def running(session: FunctionSession) -> Iterator[None]:
    """Context manager: use a session for the calls of this thread."""
    _local.session = session
    try:
        with session.gathering():
            yield
    finally:
        _local.session = None


def _session() -> FunctionSession:
    session: FunctionSession | None = getattr(_local, "session", None)
    if session is None:
        text = "this is not the thread of a train function that distplat runs"
        hint = (
            "call it in the function that Trainer(job, train) or `task: module:train` names, or in "
            "the script of `task: train.py`, and have `distplat submit job.yaml` run that job"
        )
        raise SpecError(Problem(("task",), text, hint))
    return session
