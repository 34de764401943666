"""
Formatting of errors in user code: the user's stack frames, the place in the run, and a remedy.

Frames of distplat, and frames of torch that only forward a call, are removed, also from causes. An
error of a loader process arrives as text inside another error; only the original error is shown.
"""

import gc
import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

import distplat
from distplat.platform.errors import InfrastructureError, PeerLost, UserCodeError
from distplat.platform.torchrun import ALONE

_DISTPLAT_DIRS = [
    (Path(distplat.__file__).parent / part).resolve()
    for part in ("platform", "strategies", "actors", "cli")
]
"""Directories of distplat's code: link targets in a clone, package directories once installed."""
_FORWARDING = (
    *("nn/modules/module.py", "utils/data/", "utils/_contextlib.py", "_utils.py"),
    *("storage.py", "multiprocessing/"),
)
"""Files of torch, relative to its package, that only forward calls to the user's code."""
_LOADER = "Original Traceback (most recent call last):\n"
"""Line before the error of a loader process in the message of the error that wraps it."""

_SAMPLE_NOTE = "of the data set: "
"""Prefix of the note about sample ids, from `strategies/loop/batches.py`, which needs torch."""

_CALLER = "call_train_function"
"""Function that calls the user's train function; in `task_loading.py`, which imports torch."""

_DATACLASS = "<string>", "__init__"
"""File and function name of a frame in a constructor that `dataclass` generated."""

_SHARED_MEMORY = (
    *("unable to allocate shared memory", "unable to write to file </torch_"),
    "unable to open shared memory object",
)
"""Messages of torch when /dev/shm is too small for a batch of a loader process."""

_COLLATE = (
    "samples of a batch are put together by torch's default_collate: they must have one shape and "
    "hold tensors, arrays or numbers. Or put them together in the task's `collate(samples)`, which "
    "sees the samples of a micro-batch: pad them there"
)
_MEMORY = (
    "raise `gradient_accumulation`, or `micro_batches` of `hybrid`, which cut a worker's part of "
    "the batch, or lower `global_batch_size`; `activation_checkpointing` and `precision: bf16` "
    "take less memory, too"
)
_BATCH_NORM = (
    "a batch norm got one sample: `data.drop_last: true` leaves out a short last batch; or "
    "take a larger `global_batch_size`, fewer workers, or less `gradient_accumulation`"
)
_LOADER_ENDED = (
    "a loader process ended: sys.exit() in the data set, or the system killed it when memory "
    "ran out; `data.num_workers: 0` loads in the worker itself"
)
_OF_OWN_LOOP = {
    _COLLATE: "samples of a batch are put together by torch's default_collate: they must have one "
    "shape and hold tensors, arrays or numbers. Or give the DataLoader a `collate_fn`, which sees "
    "the samples of a batch: pad them there",
    _MEMORY: "a smaller `batch_size` of the DataLoader takes less; `distplat.no_sync()` around all "
    "but the last backward makes up for it with several batches per step; "
    "`torch.utils.checkpoint` and `torch.autocast` with bfloat16 take less memory, too",
    _BATCH_NORM: "a batch norm got one sample: `DataLoader(drop_last=True)` leaves out a short "
    "last batch; or take a larger `batch_size`",
    _LOADER_ENDED: "a loader process ended: sys.exit() in the data set, or the system killed it "
    "because memory ran out; `DataLoader(num_workers=0)` loads in the worker itself",
}
"""Remedies for train functions, whose jobs lack the fields that the keys mention."""
_GROUP = (
    "torch.distributed has no group in a worker, and needs none; a train function that wants one "
    "calls `torch.distributed.init_process_group()`. In a train function "
    "`distplat.get_context()` has rank, world size and device, `distplat.prepare` stands for "
    "DistributedDataParallel and DistributedSampler, `distplat.gather_for_metrics` for all_reduce: "
    "docs/from/ddp.md. `distplat submit -- python train.py` runs a script as it is"
)
_SPAWN = (
    "the workers are the processes of a script already: in place of "
    "`mp.spawn(main, args=(world,), nprocs=world)` it calls `main(rank, world)`, with "
    "get_world_rank() and get_world_size() of distplat.get_context(): docs/from/ddp.md"
)
_SPAWNED = "terminated with the following error"
"""Message of `mp.spawn` before the traceback of the child process."""
_RANK_TRACES = "/torch/distributed/", "this is not the thread of a train function"
"""Parts of that traceback if the child process was meant to be a rank."""
_COMMAND_LINE = (
    "a worker has the command line of a script in the job, `task: train.py --lr 0.1`, or none: "
    "a train function gets the job's `task_args` as `config`, a task as arguments"
)
_LOST_PEER = (
    *("closed by peer", "remote peer", "reset by peer", "broken pipe", "connection refused"),
    *("timed out waiting", "application timeout"),
)
"""Messages of torch's collective operations if another rank is lost or does not respond."""
_REMEDIES = (
    ("Default process group has not been initialized", _GROUP),
    ("using env:// rendezvous", _GROUP),
    *((f"'{name}'", _GROUP) for name in ALONE),
    (
        "object has no attribute 'module'",
        "prepare() gives the model that it got, without a wrapper around it: for "
        "`model.module.state_dict()` write `model.state_dict()`",
    ),
    ("Expected more than 1 value per channel", _BATCH_NORM),
    ("stack expects each tensor to be equal size", _COLLATE),
    ("each element in list of batch should be of equal size", _COLLATE),
    ("default_collate: batch must contain", _COLLATE),
    ("DataLoader worker (pid", _LOADER_ENDED),
    ("out of memory", _MEMORY),
    ("not enough memory: you tried to allocate", _MEMORY),
    ("can't allocate memory: you tried to allocate", _MEMORY),
    (
        "found no suitable name to keep for saving",
        "the parameters of a prepared model lie in one vector: give this function "
        "`safe_serialization=False` where it takes it, as Accelerate's do, or save "
        "`{name: tensor.clone() for name, tensor in model.state_dict().items()}`",
    ),
    (
        "invalid device ordinal",
        "a worker that shares its GPU, or runs a Task, sees one GPU, cuda:0, whatever its "
        "LOCAL_RANK is: take the device from distplat.get_context().device",
    ),
    ("Found no NVIDIA driver", "set scaling.use_gpu: false, or run where there is a GPU"),
    ("No CUDA GPUs are available", "set scaling.use_gpu: false, or run where there is a GPU"),
)
"""Part of a torch message, and the remedy in terms of the job."""


_MAX_SUMMARY, _MAX_TRACEBACK = 2_000, 50_000
"""Maximum characters of a user's error, which is printed and written to `result.json`."""


def as_user_error(
    error: BaseException,
    rank: int | None,
    step: int | None,
    *,
    evaluating: bool = False,
    on_ranks: str = "",
    own_loop: bool = False,
) -> UserCodeError:
    """
    Wrap an exception of user code.

    Args:
        error: the exception.
        rank: rank that raised it, or None; see `UserCodeError`.
        step: see `UserCodeError`.
        evaluating: whether it was raised in the evaluation after that step.
        on_ranks: see `UserCodeError`.
        own_loop: whether the user code is a train function or a script, not a task.
    """
    try:
        summary, shown, remedy = _describe(error, own_loop=own_loop)
    except Exception:  # the exception's own __str__ or __repr__ raises
        summary = shown = f"{type(error).__name__}, which raises when it is shown"
        remedy = ""
    alone = shown.rstrip() == summary
    summary = _truncate_middle(summary, _MAX_SUMMARY)
    shown = f"{summary}\n" if alone else _truncate_middle(shown, _MAX_TRACEBACK)
    return UserCodeError(rank, step, summary, shown, remedy, evaluating, on_ranks)


def error_of_process(stderr: str) -> UserCodeError:
    """Return the error of a child process that ran user code, from its output."""
    lines = stderr.strip().splitlines() or ["its process ended"]
    summary = _truncate_middle(lines[-1], _MAX_SUMMARY)
    return UserCodeError(0, None, summary, _truncate_middle(stderr, _MAX_TRACEBACK))


def _truncate_middle(text: str, max_chars: int) -> str:
    """Cut the middle out of a long text, such as a message that contains a whole batch."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _describe(error: BaseException, *, own_loop: bool) -> tuple[str, str, str]:
    """Return an exception's summary, its traceback with the user's frames only, and the remedy."""
    exception = traceback.TracebackException.from_exception(error)
    for exc in _with_causes(exception):
        exc.stack = traceback.StackSummary.from_list(
            [
                f
                for f in exc.stack
                if not _is_internal(f.filename) and (f.filename, f.name) != _DATACLASS
            ]
        )
    text = "".join(exception.format())
    if not exception.stack:
        text = text.replace("Traceback (most recent call last):\n", "", 1)
    exception.__notes__ = []
    summary = list(exception.format_exception_only())[-1].strip()
    of_loader = _LOADER in summary
    if of_loader:
        text = _loader_traceback(summary.partition(_LOADER)[2])
    text, samples = _split_sample_notes(text)
    if of_loader:
        summary = text.strip().splitlines()[-1]
    if samples:
        text = f"{text}{samples if text.endswith(summary) else ''}\n"
    return summary + samples, text, _remedy(error, own_loop=own_loop)


def _split_sample_notes(shown: str) -> tuple[str, str]:
    """Remove the note about sample ids from a traceback; return both, the note as a suffix."""
    lines = shown.splitlines()
    notes = [line.removeprefix(_SAMPLE_NOTE) for line in lines if line.startswith(_SAMPLE_NOTE)]
    if not notes:
        return shown, ""
    text = "\n".join(line for line in lines if not line.startswith(_SAMPLE_NOTE))
    return text.rstrip(), f" ({notes[0]} of the data set)"


def _message_of(error: BaseException) -> str:
    """Return an exception's message; empty if its `__str__` raises."""
    try:
        return str(error)
    except Exception:
        return ""


def traceback_of_call(error: BaseException) -> str:
    """
    Return the traceback of an error of distplat or torch, up to the call in the user's code.

    Empty: the error was not raised in a call from the user's code.
    """
    frames = _frames_to_call(traceback.extract_tb(error.__traceback__))
    return f"{frames}{type(error).__name__}: {error}\n" if frames else ""


_gc_disabled = threading.Lock()
"""Held while garbage collection is disabled, so that one thread at a time restores its state."""


def frame_of(thread: threading.Thread) -> FrameType | None:
    """
    Return the current frame of a thread; None: the thread has ended.

    `sys._current_frames` of Python 3.11.7 allocates while it holds an interpreter lock. A garbage
    collection that starts there may switch to another thread. If that thread starts a new thread,
    it waits for the same lock with the GIL held, and the process deadlocks (python/cpython#106883).
    """
    with _gc_disabled:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames().get(thread.ident or 0)
        finally:
            if was_enabled:
                gc.enable()


def frames_of_wait(thread: threading.Thread) -> str:
    """Return the user's frames of a thread that waits in torch.distributed; empty: it does not."""
    current = frame_of(thread)
    stack = traceback.extract_stack(current) if current is not None else []
    paths = (_path_in_torch(frame.filename) or "" for frame in stack)
    return _frames_to_call(stack) if any(path.startswith("distributed/") for path in paths) else ""


def _frames_to_call(stack: Iterable[traceback.FrameSummary]) -> str:
    """Format the frames of a train function up to its call of distplat or torch; empty: none."""
    frames: list[traceback.FrameSummary] = []
    for frame in itertools.dropwhile(lambda frame: frame.name != _CALLER, stack):
        if frames and _is_distplat(frame.filename):
            break
        if not _is_internal(frame.filename):
            frames.append(frame)
    while frames and _path_in_torch(frames[-1].filename) is not None:
        frames.pop()
    lines = "".join(traceback.format_list(frames))
    return f"Traceback (most recent call last):\n{lines}" if frames else ""


def killed_loader(error: BaseException, *, own_loop: bool = False) -> InfrastructureError | None:
    """
    Return the error for a loader process that was killed by SIGKILL; else None.

    SIGKILL is an error of the infrastructure: user code does not send it to its own process.
    """
    if not _ended_by(signal.SIGKILL, error):
        return None
    fewer = "`num_workers` of the DataLoader" if own_loop else "`data.num_workers`"
    text = "a loader process was killed, most likely because memory ran out: "
    return InfrastructureError(f"{text}fewer {fewer} take less")


def lost_peer(error: BaseException) -> PeerLost | None:
    """Return the error for a torch.distributed failure caused by a lost rank; else None."""
    message = _message_of(error)
    of_torch = isinstance(error, RuntimeError) and ("gloo" in message or "NCCL" in message)
    if not of_torch or not any(part in message.lower() for part in _LOST_PEER):
        return None
    text = "torch.distributed, called by the function, lost another rank: "
    return PeerLost(text + message.splitlines()[0])


def _ended_by(number: signal.Signals, error: BaseException) -> bool:
    """
    Return whether an error reports that a signal ended a loader process.

    torch reports the signal only in the main thread, and workers on Ray train in another thread.
    """
    text = _message_of(error)
    if not text.startswith("DataLoader worker (pid"):
        return False
    if f"is killed by signal: {signal.strsignal(number)}" in text:
        return True
    from distplat.strategies.torch_compat import loader_exit_codes  # torch is imported by now

    return -number in loader_exit_codes(error)


def _with_causes(exception: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    current: traceback.TracebackException | None = exception
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _is_internal(filename: str) -> bool:
    """Whether a frame of this file is not the user's."""
    if filename.startswith("<frozen") or "/importlib/" in filename or _is_distplat(filename):
        return True
    inner = _path_in_torch(filename)
    return inner is not None and inner.startswith(_FORWARDING)


def _is_distplat(filename: str) -> bool:
    path = Path(filename).resolve()
    return any(path.is_relative_to(folder) for folder in _DISTPLAT_DIRS)


def _path_in_torch(filename: str) -> str | None:
    """Return the path relative to the torch package; None: the file is not part of torch."""
    torch = sys.modules.get("torch")
    if torch is None or torch.__file__ is None:
        return None
    path, folder = Path(filename).resolve(), Path(torch.__file__).resolve().parent
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else None


def _loader_traceback(text: str) -> str:
    """Remove the frames that are not the user's from the text of a traceback."""
    lines, keep = [], True
    for line in text.splitlines():
        if line.startswith('  File "'):
            keep = not _is_internal(line.split('"')[1])
        elif not line.startswith("    "):
            keep = True
        if keep:
            lines.append(line)
    head = (
        _LOADER.removeprefix("Original ")
        if any(line.startswith('  File "') for line in lines)
        else ""
    )
    return head + "\n".join(lines) + "\n"


def _remedy(error: BaseException, *, own_loop: bool) -> str:
    if isinstance(error, SystemExit):
        if any(frame.name == "parse_args" for frame in traceback.extract_tb(error.__traceback__)):
            return _COMMAND_LINE
        return "sys.exit() was called: task code must return, or raise an error"
    text = _message_of(error)
    if any(part in text for part in _SHARED_MEMORY) or _ended_by(signal.SIGBUS, error):
        return _more_shared_memory(own_loop=own_loop)
    remedy = next((remedy for part, remedy in _REMEDIES if part in text), "")
    if own_loop and _SPAWNED in text:
        is_rank = remedy == _GROUP or any(part in text for part in _RANK_TRACES)
        remedy = _SPAWN if is_rank else remedy
    return _OF_OWN_LOOP.get(remedy, remedy) if own_loop else remedy


def _more_shared_memory(*, own_loop: bool) -> str:
    stats = os.statvfs("/dev/shm")
    size = stats.f_frsize * stats.f_blocks // 2**20
    setting = "DataLoader(num_workers=0)" if own_loop else "data.num_workers: 0"
    return (
        f"loader processes hand batches over in /dev/shm, which has {size} MiB here and is full: "
        "give a container more (docker: `--shm-size 8g`, Kubernetes: an emptyDir of medium Memory "
        f"at /dev/shm), load smaller batches, or in the worker itself with `{setting}`"
    )
