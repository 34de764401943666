"""Loader processes: how they start, what they are given, and which random numbers they draw."""

import functools
import io
import os
import pickle
import random
import sys
import threading
import time
import types
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from multiprocessing import forkserver, parent_process, synchronize, util
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import cloudpickle
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distplat.platform.errors import DeadlineExceeded
from distplat.platform.spec import Job
from distplat.strategies.loop.containers import items_in

_SMALL = 1 << 16
"""Bytes of a tensor that is copied to a loader; sharing a larger one takes a descriptor."""
_MOST_SHARED = 100
"""Tensors of one data set that are shared; the fork server takes 250 descriptors at a time."""

_Made = TypeVar("_Made", bound=synchronize.SemLock)


def start_loader_server(job: Job) -> Callable[[], None]:
    """
    Start the server that loader processes are forked from, where there are to be some.

    It imports torch once. Else each loader does, in every attempt and every evaluation: 1.6 s
    instead of 0.05 s.

    Returns:
        Waits until it can be forked from.
    """
    if not job.data.num_workers:
        return lambda: None
    context = LoaderContext()
    with _fixed_hash_seed():
        forkserver.ensure_running()

    def wait() -> None:
        first = context.Process(target=_nothing)
        first.start()
        limit_s = job.failure.start_timeout_s
        first.join(limit_s)
        if first.is_alive():
            what, setting = "the server of loader processes", "failure.start_timeout_s"
            raise DeadlineExceeded(what, ("its first process",), limit_s, setting)

    return wait


def _nothing() -> None:
    """The body of the first process that the fork server forks."""


@contextmanager
def _fixed_hash_seed() -> Iterator[None]:
    """Have processes that start now hash strings alike; workers on Ray were started so."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = before or "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]


class LoaderContext(ForkServerContext):
    """Starts the processes of one loader and owns what they share."""

    def __init__(self) -> None:
        self._semaphores: set[str] = set()
        self._starting: list[Connection] = []
        self.set_forkserver_preload(["torch.utils.data", __name__])

    def Process(self, *args: Any, **kwargs: Any) -> "_LoaderProcess":  # type: ignore[override]
        """Make a process; `unlink_semaphores` waits for it."""
        reader, writer = self.Pipe(duplex=False)
        self._starting.append(reader)
        return _LoaderProcess(writer, *args, **kwargs)

    def Lock(self) -> synchronize.Lock:
        """Make a lock."""
        return self._noted(super().Lock())

    def Semaphore(self, value: int = 1) -> synchronize.Semaphore:
        """Make a semaphore."""
        return self._noted(super().Semaphore(value))

    def BoundedSemaphore(self, value: int = 1) -> synchronize.BoundedSemaphore:
        """Make a bounded semaphore."""
        return self._noted(super().BoundedSemaphore(value))

    def unlink_semaphores(self, timeout_s: float) -> None:
        """
        Wait until all processes have opened the semaphores, and take their names away.

        Args:
            timeout_s: how long at most; afterwards the names stay until the semaphores go. A
                process that died meanwhile is the loader's to tell.
        """
        if not self._semaphores:
            return
        deadline = time.monotonic() + timeout_s
        for reader in self._starting:
            if not reader.poll(max(0.0, deadline - time.monotonic())):
                return
            reader.close()
        self._starting.clear()
        # What would take a name away in the end does so now, and then has nothing left to do.
        for finalizer in list(util._finalizer_registry.values()):  # type: ignore[attr-defined]
            ours = finalizer._callback is synchronize.SemLock._cleanup  # type: ignore[attr-defined]
            if ours and finalizer._args[0] in self._semaphores:
                finalizer()
        self._semaphores.clear()

    def _noted(self, made: _Made) -> _Made:
        self._semaphores.add(made._semlock.name)  # type: ignore[attr-defined]
        return made


class _LoaderProcess(ForkServerProcess):
    """
    A process that runs no script again and says when it has begun.

    Args:
        begun: closed when all that the process was given has arrived.
    """

    def __init__(self, begun: Connection, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._begun: Connection | None = begun

    def start(self) -> None:
        """Start it; see `multiprocessing.Process`."""
        assert self._begun is not None, "a process is started once"
        with _script_stays_out():
            super().start()
        self._begun.close()  # now the process alone holds the end
        self._begun = None

    def run(self) -> None:
        """Do what it was made for."""
        if self._begun is not None:
            self._begun.close()
            self._begun = None
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "this is a child"
    parent.join()
    os._exit(1)


@contextmanager
def _script_stays_out() -> Iterator[None]:
    """
    Start processes that do not run `__main__` again.

    A package's `__main__` never is, and its spec says so.
    """
    main = sys.modules["__main__"]
    before = getattr(main, "__spec__", None)
    main.__spec__ = ModuleSpec("__main__", None)
    try:
        yield
    finally:
        main.__spec__ = before


class ByValue:
    """
    Something on its way to another process, which gets the thing itself.

    What the other process can import goes by name. Classes and functions that it cannot, those of
    a script and local ones, go as they are.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        _ByValuePickler(buffer).dump(self._value)
        return pickle.loads, (buffer.getvalue(),)


class _ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Shares large tensors as torch does between processes."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        shared = ForkingPickler(io.BytesIO(), pickle.HIGHEST_PROTOCOL).dispatch_table
        self.dispatch_table = ChainMap(shared, cloudpickle.Pickler.dispatch_table)
        self._shared = 0

    def reducer_override(self, value: Any) -> Any:
        """Copy small tensors; see `pickle.Pickler`."""
        if type(value) is Tensor and value.device.type == "cpu" and not value.requires_grad:
            few = self._shared < _MOST_SHARED
            if (few and value.nbytes > _SMALL) or value.layout != torch.strided:
                self._shared += 1
            elif value.dtype in _OF_NUMPY:
                return torch.from_numpy, (value.numpy(),)
        return super().reducer_override(value)


_OF_NUMPY = frozenset(
    (torch.float64, torch.float32, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)
)


def assign_class_ids(*things: Any) -> None:
    """
    Have the classes that things use, and no module has, be the same ones on their way back.

    For processes that are forked from this one: a class that goes by value bears a number, which
    both sides have to have from before.
    """
    with suppress(Exception):  # what does not go by value need not: it is there after a fork
        pickle.dumps(ByValue(things))


def importable(kind: type) -> bool:
    """Say whether another process finds a class by its name."""
    return kind.__module__ != "__main__" and "<locals>" not in kind.__qualname__


def all_importable(batch: Any) -> bool:
    """Say whether all classes of a collated batch are."""
    return importable(type(batch)) and all(map(all_importable, items_in(batch) or ()))


_KINDS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_DEPTH = 8
"""Steps from the data set: a wrapper, its data, a list of transforms, a transform, ..."""
_WIDTH = 64
"""Entries of a container that are looked at: the samples themselves are many."""
_OBJECTS = 10_000
_READS = ("__getitem__", "__getitems__", "__call__", "forward")
"""Methods that may run while a sample is read."""
_PLAIN = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray, types.ModuleType)


def held_generators(data: Dataset[Any]) -> list[str]:
    """
    Name the attributes of generators that a data set holds, as seen from it.

    Looked through are attributes, slots, containers, closures, and the module's variables that
    reading a sample uses; not local variables.

    Args:
        data: the data set.

    Returns:
        Names such as `self.data.transform.transforms[0].rng`.
    """
    seen: set[int] = {id(one) for one in _global()}
    paths = []
    left: list[tuple[str, Any, int]] = [("self", data, 0)]
    while left and len(seen) < _OBJECTS:
        name, value, depth = left.pop(0)
        if id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, _KINDS):
            paths.append(name)
        elif depth < _DEPTH:
            left += [(f"{name}{path}", one, depth + 1) for path, one in _inside(value)]
    return paths


def warning_of(data: Dataset[Any], what: str) -> str | None:
    """
    Say which generators a data set holds and what to do; None: it holds none.

    Args:
        data: the data set.
        what: the method of the task that gave it.
    """
    names = held_generators(data)
    if not names:
        return None
    holds = f"{what}(): {type(data).__name__} holds a random generator of its own, "
    return (
        holds + ", ".join(names) + ". If it is drawn from while samples are read, what they "
        "get depends on the number of workers and loaders: draw from torch, numpy or random there, "
        "or from distplat.sample_rng() (docs/random_numbers.md)"
    )


def _global() -> tuple[Any, ...]:
    """Give the generators that are seeded for each sample."""
    return random._inst, np.random.mtrand._rand, torch.default_generator


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Give what an object holds, and how it is reached."""
    if isinstance(value, type):
        return
    yield from _of_container(value)
    if isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        value = value.__func__
    if isinstance(value, types.FunctionType):
        yield from _of_function(value)
    if isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    for name, one in list(getattr(value, "__dict__", {}).items()):
        yield f".{name}", one
    yield from _of_class(value)


def _of_container(value: Any) -> Iterator[tuple[str, Any]]:
    """Give the first entries; other mappings may make theirs when they are asked for them."""
    if isinstance(value, dict):
        for key in list(value)[:_WIDTH]:
            yield f"[{key!r}]", value[key]
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value[:_WIDTH]):
            yield f"[{number}]", one


def _of_class(value: Any) -> Iterator[tuple[str, Any]]:
    """Give slots, generators that a class has for all, and what its reading methods use."""
    for kind in type(value).__mro__:
        if kind.__module__.partition(".")[0] in ("builtins", "torch", "numpy"):
            continue
        for name, one in vars(kind).items():
            if isinstance(one, types.MemberDescriptorType):
                if hasattr(value, name):
                    yield f".{name}", getattr(value, name)
            elif isinstance(one, _KINDS):
                yield f".{name}", one
            elif name in _READS and isinstance(one, types.FunctionType):
                yield from _of_function(one)


def _of_function(value: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Give what a function closes over, and generators among the module's variables it names."""
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        try:
            yield f".<{name}>", cell.cell_contents
        except ValueError:  # not filled yet
            continue
    for name in value.__code__.co_names:
        one = value.__globals__.get(name)
        if isinstance(one, _KINDS):
            yield f".<{value.__module__}.{name}>", one
