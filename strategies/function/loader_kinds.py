"""Which DataLoaders `prepare` takes, and what makes their batches."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from distplat.platform.errors import Problem, SpecError


def check_kind(loader: DataLoader[Any]) -> None:
    """
    See that a loader goes through its batches as torch's does: no other code of it is called.

    One of torchdata's does, too, but from a position that it was given.

    Raises:
        SpecError: it does something else; says what to do.
    """
    kind = type(loader)
    for name in ("__iter__", "_get_iterator", "_index_sampler"):
        owner = next(one for one in kind.__mro__ if name in vars(one))
        if owner is not DataLoader and not owner.__module__.startswith("torchdata."):
            hint = (
                "do in collate_fn what it does to a batch, or around the prepared loader; or leave "
                "it out of prepare(), if each rank reads samples of its own"
            )
            if owner.__module__.startswith("accelerate."):
                hint = "give prepare() the loader that Accelerate got"
            raise refused(f"is a {kind.__name__}, whose {name} a prepared one would not use", hint)
    if getattr(loader, "next_iter_state", None) is not None:
        text = f"is a {kind.__name__} at a position, from which a prepared one would not go on"
        raise refused(text, "save and load the state of the loader that prepare() gives")


def is_batched_otherwise(loader: DataLoader[Any]) -> bool:
    """Say whether a `batch_sampler` that is not torch's own says what is in a batch."""
    batches = batches_in(loader)
    return batches is not None and type(batches) is not BatchSampler


def batches_of(loader: DataLoader[Any]) -> BatchSampler:
    """
    Give what makes a loader's batches: torch's own, made by the loader or by the user.

    Raises:
        SpecError: there are none, or they are made by another `batch_sampler`.
    """
    batches = batches_in(loader)
    if batches is None:
        hint = (
            "give batch_size; where the data gives whole batches, batch_size=1 and a collate_fn "
            "that returns the one that it gets"
        )
        raise refused("has batch_size=None", hint)
    if type(batches) is not BatchSampler:
        raise refused("has a batch_sampler, over a stream", "give batch_size")
    return batches


def batches_in(loader: DataLoader[Any]) -> Any:
    """Give what makes a loader's batches; None: nothing does."""
    if loader.batch_sampler is not None:
        return loader.batch_sampler
    return loader.sampler if isinstance(loader.sampler, BatchSampler) else None


def refused(what: str, hint: str) -> SpecError:
    """Say that a loader cannot be prepared, and what to do."""
    return SpecError(Problem(("task",), f"prepare() got a DataLoader that {what}", hint))
