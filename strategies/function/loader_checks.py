"""Check which DataLoaders `prepare` accepts, and find their batch samplers."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from distplat.platform.errors import Problem, SpecError


def check_loader_class(loader: DataLoader[Any]) -> None:
    """
    Check that a loader does not override DataLoader's iteration, which a prepared loader would not
    use.

    Loaders of torchdata are accepted, unless a position was loaded into them.

    Raises:
        SpecError: The loader overrides the iteration, or starts at a position; the message suggests
            a remedy.
    """
    cls = type(loader)
    for name in ("__iter__", "_get_iterator", "_index_sampler"):
        owner = next(base for base in cls.__mro__ if name in vars(base))
        if owner is not DataLoader and not owner.__module__.startswith("torchdata."):
            hint = (
                "move its changes of a batch to collate_fn, or wrap the prepared loader; or do not "
                "prepare it, if each rank reads its own samples"
            )
            if owner.__module__.startswith("accelerate."):
                hint = "pass prepare() the loader that was passed to Accelerate"
            raise loader_error(
                f"is a {cls.__name__}, whose {name} a prepared loader would not call", hint
            )
    if getattr(loader, "next_iter_state", None) is not None:
        text = f"is a {cls.__name__} at a position, which a prepared loader would not resume from"
        raise loader_error(text, "save and load the state of the loader that prepare() returns")


def has_custom_batches(loader: DataLoader[Any]) -> bool:
    """Return whether a loader has a `batch_sampler` other than torch's own class."""
    sampler = find_batch_sampler(loader)
    return sampler is not None and type(sampler) is not BatchSampler


def batch_sampler_of(loader: DataLoader[Any]) -> BatchSampler:
    """
    Return a loader's batch sampler of torch's class, created by the loader or by the user.

    Raises:
        SpecError: The loader has no batch sampler, or a custom one.
    """
    sampler = find_batch_sampler(loader)
    if sampler is None:
        hint = (
            "set batch_size; if the data set yields whole batches, set batch_size=1 and a "
            "collate_fn that returns its only item"
        )
        raise loader_error("has batch_size=None", hint)
    if type(sampler) is not BatchSampler:
        raise loader_error("has a batch_sampler, over a stream", "set batch_size")
    return sampler


def find_batch_sampler(loader: DataLoader[Any]) -> Any:
    """Return a loader's batch sampler; None: the loader has none."""
    if loader.batch_sampler is not None:
        return loader.batch_sampler
    return loader.sampler if isinstance(loader.sampler, BatchSampler) else None


def loader_error(what: str, hint: str) -> SpecError:
    """Return the error for a DataLoader that cannot be prepared."""
    return SpecError(Problem(("task",), f"prepare() got a DataLoader that {what}", hint))
