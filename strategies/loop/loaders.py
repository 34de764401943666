"""Loader processes: start, transfer of data, and detection of unseeded random generators."""

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
from typing_extensions import override

from distplat.platform.errors import DeadlineExceeded
from distplat.platform.spec import Job
from distplat.strategies.loop.containers import items_in

_MAX_COPIED_BYTES = 1 << 16
"""Size up to which tensors are copied to a loader; each shared tensor needs a file descriptor."""
_MAX_SHARED_TENSORS = 100
"""Shared tensors of a data set; the fork server accepts 250 file descriptors per process."""

_SemLockT = TypeVar("_SemLockT", bound=synchronize.SemLock)


def start_loader_server(job: Job) -> Callable[[], None]:
    """
    Start the server from which loader processes are forked, if the job has loader processes.

    The server imports torch once. Without the server each loader would import torch in each
    attempt and evaluation, and start in 1.6 s instead of 0.05 s.

    Returns:
        A function that waits until the server can fork processes.
    """
    if not job.data.num_workers:
        return lambda: None
    context = LoaderContext()
    with _fixed_hash_seed():
        forkserver.ensure_running()

    def wait() -> None:
        process = context.Process(target=_do_nothing)
        process.start()
        limit_s = job.failure.start_timeout_s
        process.join(limit_s)
        if process.is_alive():
            what, setting = "start of the loader server", "failure.start_timeout_s"
            raise DeadlineExceeded(what, ("its first loader process",), limit_s, setting)

    return wait


def _do_nothing() -> None:
    """Target of the first process that the server forks."""


@contextmanager
def _fixed_hash_seed() -> Iterator[None]:
    """Fix the hash seed of processes started in this context, as for workers on Ray."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = before or "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]


class LoaderContext(ForkServerContext):
    """Multiprocessing context of one loader: starts its processes and owns their semaphores."""

    def __init__(self) -> None:
        self._semaphores: set[str] = set()
        self._starting: list[Connection] = []
        self.set_forkserver_preload(["torch.utils.data", __name__])

    @override
    def Process(self, *args: Any, **kwargs: Any) -> "_LoaderProcess":  # type: ignore[override]
        """Create a process; `unlink_semaphores` waits for its start."""
        reader, writer = self.Pipe(duplex=False)
        self._starting.append(reader)
        return _LoaderProcess(writer, *args, **kwargs)

    @override
    def Lock(self) -> synchronize.Lock:
        """Create a lock."""
        return self._track(super().Lock())

    @override
    def Semaphore(self, value: int = 1) -> synchronize.Semaphore:
        """Create a semaphore."""
        return self._track(super().Semaphore(value))

    @override
    def BoundedSemaphore(self, value: int = 1) -> synchronize.BoundedSemaphore:
        """Create a bounded semaphore."""
        return self._track(super().BoundedSemaphore(value))

    def unlink_semaphores(self, timeout_s: float) -> None:
        """
        Wait until all processes have opened the semaphores, then unlink the semaphores' names.

        Args:
            timeout_s: after this time the names remain until the semaphores are deleted. The
                loader reports processes that died.
        """
        if not self._semaphores:
            return
        deadline = time.monotonic() + timeout_s
        for reader in self._starting:
            if not reader.poll(max(0.0, deadline - time.monotonic())):
                return
            reader.close()
        self._starting.clear()
        # the finalizers that unlink names; a finalizer that has run does not run again
        for finalizer in list(util._finalizer_registry.values()):  # type: ignore[attr-defined]
            ours = finalizer._callback is synchronize.SemLock._cleanup  # type: ignore[attr-defined]
            if ours and finalizer._args[0] in self._semaphores:
                finalizer()
        self._semaphores.clear()

    def _track(self, semaphore: _SemLockT) -> _SemLockT:
        self._semaphores.add(semaphore._semlock.name)  # type: ignore[attr-defined]
        return semaphore


class _LoaderProcess(ForkServerProcess):
    """
    A loader process that does not rerun the main script and signals its start.

    Args:
        ready: the process closes this end of a pipe when it has received its arguments.
    """

    def __init__(self, ready: Connection, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ready: Connection | None = ready

    @override
    def start(self) -> None:
        """Start the process; see `multiprocessing.Process`."""
        assert self._ready is not None, "a process is started once"
        with _without_main_script():
            super().start()
        self._ready.close()  # from here on only the process holds this end
        self._ready = None

    @override
    def run(self) -> None:
        """Run the target; see `multiprocessing.Process`."""
        if self._ready is not None:
            self._ready.close()
            self._ready = None
        threading.Thread(target=_exit_with_parent, daemon=True).start()
        super().run()


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a loader is a child process"
    parent.join()
    os._exit(1)


@contextmanager
def _without_main_script() -> Iterator[None]:
    """
    Keep processes started in this context from running the main script again.

    multiprocessing does not rerun the `__main__` of a package, which has this spec.
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
    Wrapper that is pickled with cloudpickle and unpickles to the wrapped value.

    Importable classes and functions are pickled by name. Those of a script and local ones are
    pickled by value.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        _ByValuePickler(buffer).dump(self._value)
        return pickle.loads, (buffer.getvalue(),)


class _ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickler that moves large tensors to shared memory, as torch.multiprocessing does."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        shared = ForkingPickler(io.BytesIO(), pickle.HIGHEST_PROTOCOL).dispatch_table
        self.dispatch_table = ChainMap(shared, cloudpickle.Pickler.dispatch_table)
        self._shared = 0

    def reducer_override(self, value: Any) -> Any:
        """Pickle small tensors by value; see `pickle.Pickler`."""
        if type(value) is Tensor and value.device.type == "cpu" and not value.requires_grad:
            can_share = self._shared < _MAX_SHARED_TENSORS
            if (can_share and value.nbytes > _MAX_COPIED_BYTES) or value.layout != torch.strided:
                self._shared += 1
            elif value.dtype in _NUMPY_DTYPES:
                return torch.from_numpy, (value.numpy(),)
        return super().reducer_override(value)


_NUMPY_DTYPES = frozenset(
    (torch.float64, torch.float32, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)
)


def assign_class_ids(*values: Any) -> None:
    """
    Assign cloudpickle's ids to the classes of some values, before processes are forked.

    cloudpickle identifies a class that is pickled by value with an id. A forked process inherits
    the id, so that its instances are unpickled here as instances of the original class.
    """
    with suppress(Exception):  # values that cannot be pickled are inherited by forked processes
        pickle.dumps(ByValue(values))


def importable(cls: type) -> bool:
    """Return whether another process can import a class by name."""
    return cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__


def all_importable(batch: Any) -> bool:
    """Return whether all classes of a collated batch can be imported by name."""
    return importable(type(batch)) and all(map(all_importable, items_in(batch) or ()))


_GENERATOR_TYPES = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_MAX_DEPTH = 8
"""References from the data set: a wrapper, its data, a list of transforms, a transform, ..."""
_MAX_ENTRIES = 64
"""Entries searched per container, which may hold the samples."""
_MAX_OBJECTS = 10_000
_READ_METHODS = ("__getitem__", "__getitems__", "__call__", "forward")
"""Methods that may run while a sample is read."""
_LEAVES = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray, types.ModuleType)
"""Types whose members are not searched."""


def held_generators(data: Dataset[Any]) -> list[str]:
    """
    Return the paths of random generators that a data set holds, as expressions on `self`.

    The search covers attributes, slots, containers, closures, and module variables used to read a
    sample. It does not cover local variables.

    Args:
        data: the data set.

    Returns:
        Paths such as `self.data.transform.transforms[0].rng`.
    """
    seen: set[int] = {id(generator) for generator in _global_generators()}
    paths = []
    queue: list[tuple[str, Any, int]] = [("self", data, 0)]
    while queue and len(seen) < _MAX_OBJECTS:
        path, value, depth = queue.pop(0)
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen.add(id(value))
        if isinstance(value, _GENERATOR_TYPES):
            paths.append(path)
        elif depth < _MAX_DEPTH:
            queue += [(f"{path}{name}", member, depth + 1) for name, member in _members(value)]
    return paths


def warning_of(data: Dataset[Any], method: str) -> str | None:
    """
    Return a warning about the random generators of a data set; None: the data set holds none.

    Args:
        data: the data set.
        method: the task's method that returned the data set.
    """
    paths = held_generators(data)
    if not paths:
        return None
    return (
        f"{method}(): {type(data).__name__} holds its own random generator, {', '.join(paths)}. "
        "If samples draw from it when they are read, their values depend on the number of workers "
        "and loaders: draw from torch, numpy or random instead, or from distplat.sample_rng() "
        "(docs/random_numbers.md)"
    )


def _global_generators() -> tuple[Any, ...]:
    """Return the generators that are seeded for each sample."""
    return random._inst, np.random.mtrand._rand, torch.default_generator


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the members of an object with their access expressions, such as `.rng` or `[0]`."""
    if isinstance(value, type):
        return
    yield from _entries(value)
    if isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
        value = value.__func__
    if isinstance(value, types.FunctionType):
        yield from _function_members(value)
    if isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    for name, member in list(getattr(value, "__dict__", {}).items()):
        yield f".{name}", member
    yield from _class_members(value)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the first entries of a dict, list or tuple; other mappings may load entries lazily."""
    if isinstance(value, dict):
        for key in list(value)[:_MAX_ENTRIES]:
            yield f"[{key!r}]", value[key]
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value[:_MAX_ENTRIES]):
            yield f"[{index}]", entry


def _class_members(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield slots, generators in class attributes, and the members of the reading methods."""
    for cls in type(value).__mro__:
        if cls.__module__.partition(".")[0] in ("builtins", "torch", "numpy"):
            continue
        for name, member in vars(cls).items():
            if isinstance(member, types.MemberDescriptorType):
                if hasattr(value, name):
                    yield f".{name}", getattr(value, name)
            elif isinstance(member, _GENERATOR_TYPES):
                yield f".{name}", member
            elif name in _READ_METHODS and isinstance(member, types.FunctionType):
                yield from _function_members(member)


def _function_members(value: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield a function's closure variables, and generators among the module variables it names."""
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        try:
            yield f".<{name}>", cell.cell_contents
        except ValueError:  # the cell is empty
            continue
    for name in value.__code__.co_names:
        variable = value.__globals__.get(name)
        if isinstance(variable, _GENERATOR_TYPES):
            yield f".<{value.__module__}.{name}>", variable
