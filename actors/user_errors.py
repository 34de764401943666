"""
The user's errors as the user should see them: his own frames, the place in the run, the remedy.

Frames of ours, and those of torch that only pass a call on, are left out, of causes too. An error
of a loader process comes as text inside another one; what is shown is the error itself.
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

_OURS = [
    (Path(distplat.__file__).parent / part).resolve()
    for part in ("platform", "strategies", "actors", "cli")
]
"""Where our code lies: behind the links of a clone, or in the package itself once installed."""
_PASSES_ON = (
    *("nn/modules/module.py", "utils/data/", "utils/_contextlib.py", "_utils.py"),
    *("storage.py", "multiprocessing/"),
)
"""What of torch stands between a caller and the user's code, below torch's own folder."""
_LOADER = "Original Traceback (most recent call last):\n"
"""Where torch puts the error of a loader process into the text of another one."""

_SAMPLES = "of the data set: "
"""See `strategies/loop/batches.py`, which imports torch."""

_CALLER = "call_train_function"
"""Which frame's callee is the user's; of `task_loading.py`, which imports torch."""

_DATACLASS = "<string>", "__init__"
"""File and name of a frame in a constructor that `dataclass` has made: nobody wrote its lines."""

_SHARED_MEMORY = (
    *("unable to allocate shared memory", "unable to write to file </torch_"),
    "unable to open shared memory object",
)
"""How torch says that a loader process found no room for a batch."""

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
    "a loader process ended: sys.exit() in the data set, or the system killed it for want of "
    "memory; `data.num_workers: 0` loads in the worker itself"
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
    "for want of memory; `DataLoader(num_workers=0)` loads in the worker itself",
}
"""What a train function does instead: its job has no such fields."""
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
"""Of `mp.spawn`, before the traceback of its process."""
_OF_A_RANK = "/torch/distributed/", "this is not the thread of a train function"
"""What that traceback has where the process was to be a rank, and not to prepare data, say."""
_COMMAND_LINE = (
    "a worker has the command line of a script in the job, `task: train.py --lr 0.1`, or none: "
    "a train function gets the job's `task_args` as `config`, a task as arguments"
)
_LOST_PEER = (
    *("closed by peer", "remote peer", "reset by peer", "broken pipe", "connection refused"),
    *("timed out waiting", "application timeout"),
)
"""How torch says, in an operation of a group, that another rank is gone or does not come."""
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
        "`{name: one.clone() for name, one in model.state_dict().items()}`",
    ),
    (
        "invalid device ordinal",
        "a worker that shares its GPU, or runs a Task, sees one GPU, cuda:0, whatever its "
        "LOCAL_RANK is: take the device from distplat.get_context().device",
    ),
    ("Found no NVIDIA driver", "set scaling.use_gpu: false, or run where there is a GPU"),
    ("No CUDA GPUs are available", "set scaling.use_gpu: false, or run where there is a GPU"),
)
"""What a message of torch means for a job."""


_LONGEST_SUMMARY, _LONGEST_TRACEBACK = 2_000, 50_000
"""Characters of a user's error that are kept: it goes to the terminal and into `result.json`."""


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
    Wrap what user code raised.

    Args:
        error: as it was caught.
        rank: whose; None: nobody's, see `UserCodeError`.
        step: see `UserCodeError`.
        evaluating: whether it was in the evaluation after that step.
        on_ranks: see `UserCodeError`.
        own_loop: whether it is a train function, or a script, and no task.
    """
    try:
        summary, shown, remedy = _describe(error, own_loop=own_loop)
    except Exception:  # its own code raises when it is looked at
        summary = shown = f"{type(error).__name__}, which raises when it is shown"
        remedy = ""
    alone = shown.rstrip() == summary
    summary = _shortened(summary, _LONGEST_SUMMARY)
    shown = f"{summary}\n" if alone else _shortened(shown, _LONGEST_TRACEBACK)
    return UserCodeError(rank, step, summary, shown, remedy, evaluating, on_ranks)


def _shortened(text: str, most: int) -> str:
    """Leave out the middle of a text that is longer, such as a message with a whole batch."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _describe(error: BaseException, *, own_loop: bool) -> tuple[str, str, str]:
    """Give an exception's summary, its traceback with the user's frames, and the remedy."""
    exception = traceback.TracebackException.from_exception(error)
    for exc in _with_causes(exception):
        exc.stack = traceback.StackSummary.from_list(
            [
                f
                for f in exc.stack
                if not _passes_on(f.filename) and (f.filename, f.name) != _DATACLASS
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
    """Take the note of samples out of a traceback's text; give it as the end of a sentence."""
    lines = shown.splitlines()
    notes = [line.removeprefix(_SAMPLES) for line in lines if line.startswith(_SAMPLES)]
    if not notes:
        return shown, ""
    text = "\n".join(line for line in lines if not line.startswith(_SAMPLES))
    return text.rstrip(), f" ({notes[0]} of the data set)"


def _text(error: BaseException) -> str:
    """Give an exception's message; empty: its class cannot say."""
    try:
        return str(error)
    except Exception:
        return ""


def traceback_of_call(error: BaseException) -> str:
    """
    Give the traceback of an error of ours, or of torch's, down to where the user's code called it.

    Empty: the user's code has not called what failed.
    """
    frames = _frames_to_call(traceback.extract_tb(error.__traceback__))
    return f"{frames}{type(error).__name__}: {error}\n" if frames else ""


_looking = threading.Lock()
"""Held while no garbage is collected: the one who came first knows whether it was before."""


def frame_of(thread: threading.Thread) -> FrameType | None:
    """
    Give what a thread is executing; None: it has ended.

    `sys._current_frames` of Python 3.11.7, for one, allocates while it holds a lock of the
    interpreter. A collection that begins there may let another thread run, and one that starts a
    thread waits for that lock with the GIL held: then nothing in the process goes on
    (python/cpython#106883).
    """
    with _looking:
        collects = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames().get(thread.ident or 0)
        finally:
            if collects:
                gc.enable()


def frames_of_wait(thread: threading.Thread) -> str:
    """Give the user's frames of a thread in an operation of torch.distributed; empty: it is not."""
    now = frame_of(thread)
    stack = traceback.extract_stack(now) if now is not None else []
    inside = (_in_torch(frame.filename) or "" for frame in stack)
    return _frames_to_call(stack) if any(path.startswith("distributed/") for path in inside) else ""


def _frames_to_call(stack: Iterable[traceback.FrameSummary]) -> str:
    """Show the frames of a train function down to where it calls ours or torch's; empty: none."""
    frames: list[traceback.FrameSummary] = []
    for frame in itertools.dropwhile(lambda one: one.name != _CALLER, stack):
        if frames and _is_ours(frame.filename):
            break
        if not _passes_on(frame.filename):
            frames.append(frame)
    while frames and _in_torch(frames[-1].filename) is not None:
        frames.pop()
    lines = "".join(traceback.format_list(frames))
    return f"Traceback (most recent call last):\n{lines}" if frames else ""


def killed_loader(error: BaseException, *, own_loop: bool = False) -> InfrastructureError | None:
    """
    Give our error where the system has killed a loader process; else None.

    SIGKILL comes from the system: no code of the user's sends it to its own process.
    """
    if not _ended_by(signal.SIGKILL, error):
        return None
    fewer = "`num_workers` of the DataLoader" if own_loop else "`data.num_workers`"
    text = "a loader process was killed, most likely for want of memory: "
    return InfrastructureError(f"{text}fewer {fewer} take less")


def lost_peer(error: BaseException) -> PeerLost | None:
    """Give our error where torch.distributed failed as another rank is gone; else None."""
    message = _text(error)
    of_torch = isinstance(error, RuntimeError) and ("gloo" in message or "NCCL" in message)
    if not of_torch or not any(how in message.lower() for how in _LOST_PEER):
        return None
    text = "torch.distributed, called by the function, lost another rank: "
    return PeerLost(text + message.splitlines()[0])


def _ended_by(number: signal.Signals, error: BaseException) -> bool:
    """
    Say whether a loader process was ended by a signal, and the error is about that.

    torch says so where it runs in a process's main thread, as workers on Ray do not.
    """
    text = _text(error)
    if not text.startswith("DataLoader worker (pid"):
        return False
    if f"is killed by signal: {signal.strsignal(number)}" in text:
        return True
    from distplat.strategies.torch_compat import loader_exit_codes  # torch: it is there by now

    return -number in loader_exit_codes(error)


def _with_causes(exception: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    current: traceback.TracebackException | None = exception
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _passes_on(filename: str) -> bool:
    """Whether a frame of this file is none of the user's."""
    if filename.startswith("<frozen") or "/importlib/" in filename or _is_ours(filename):
        return True
    inner = _in_torch(filename)
    return inner is not None and inner.startswith(_PASSES_ON)


def _is_ours(filename: str) -> bool:
    path = Path(filename).resolve()
    return any(path.is_relative_to(folder) for folder in _OURS)


def _in_torch(filename: str) -> str | None:
    """Give the path below torch's own folder; None: it is no file of torch's."""
    torch = sys.modules.get("torch")
    if torch is None or torch.__file__ is None:
        return None
    path, folder = Path(filename).resolve(), Path(torch.__file__).resolve().parent
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else None


def _loader_traceback(text: str) -> str:
    """Leave out of a traceback's text the frames that are none of the user's."""
    lines, keep = [], True
    for line in text.splitlines():
        if line.startswith('  File "'):
            keep = not _passes_on(line.split('"')[1])
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
        return "sys.exit() was called: code of a task returns, or raises what went wrong"
    text = _text(error)
    if any(part in text for part in _SHARED_MEMORY) or _ended_by(signal.SIGBUS, error):
        return _more_shared_memory(own_loop=own_loop)
    found = next((remedy for part, remedy in _REMEDIES if part in text), "")
    if own_loop and _SPAWNED in text:
        is_rank = found == _GROUP or any(part in text for part in _OF_A_RANK)
        found = _SPAWN if is_rank else found
    return _OF_OWN_LOOP.get(found, found) if own_loop else found


def _more_shared_memory(*, own_loop: bool) -> str:
    stats = os.statvfs("/dev/shm")
    size = stats.f_frsize * stats.f_blocks // 2**20
    none = "DataLoader(num_workers=0)" if own_loop else "data.num_workers: 0"
    return (
        f"loader processes hand batches over in /dev/shm, which has {size} MiB here and is full: "
        "give a container more (docker: `--shm-size 8g`, Kubernetes: an emptyDir of medium Memory "
        f"at /dev/shm), load smaller batches, or in the worker itself with `{none}`"
    )
