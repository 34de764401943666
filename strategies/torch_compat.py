"""
Every private API of torch that distplat uses, each behind one function, with the reason.

A new release of torch may change these APIs; tests/unit/test_compat.py then fails, with one test
per name. A module's registries (`_parameters`, `_buffers`, `_modules`, its hooks) and a tensor's
`_version` are used directly elsewhere; the same test checks that they exist.

Collective groups need further private APIs. The public functions of torch.distributed work on
process groups of torch's own registry, the first of which becomes the default group. A group with
its own store and lifetime needs the underlying classes. The calls are correct for torch 2.11 to
2.13 (tests/unit/test_collectives_compat.py).
"""

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeGuard, TypeVar
from urllib.parse import parse_qs, urlsplit

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.rendezvous import _rendezvous_handlers
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils import worker as loader_worker
from torch.utils.data._utils.collate import collate, default_collate_fn_map
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from typing_extensions import override

from distplat.strategies.collective import ReduceOp

FunctionT = TypeVar("FunctionT", bound=Any)
COLLATE_RULES: dict[Any, Callable[..., Any]] = default_collate_fn_map
"""torch's collate functions by type. Only the function that applies all of them is public."""


def collate_with_rules(rules: dict[Any, Callable[..., Any]], samples: list[Any]) -> Any:
    """Collate samples with the given rules, which `default_collate` does not accept."""
    return collate(samples, collate_fn_map=rules)


@contextmanager
def without_worker_info() -> Iterator[None]:
    """Make `get_worker_info` return None: many streams use it to read only a loader's part."""
    before = loader_worker._worker_info
    loader_worker._worker_info = None
    try:
        yield
    finally:
        loader_worker._worker_info = before


def has_running_statistics(module: nn.Module) -> TypeGuard[_NormBase]:
    """Return whether a module is a norm with running statistics (their base is private)."""
    return isinstance(module, _NormBase)


def check_input(layer: nn.SyncBatchNorm, x: Tensor) -> None:
    """Check an input's dimensions, as the layer's own forward would, which is replaced."""
    layer._check_input_dim(x)


def has_global_hooks() -> bool:
    """Return whether any global module hook is registered; torch has no public way to list them."""
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def compiled_module(module: nn.Module) -> nn.Module | None:
    """
    Return the module that `torch.compile` wrapped.

    The wrapper is recognized by name, because importing its class from dynamo takes seconds.
    """
    if type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
        return module._modules["_orig_mod"]
    return None


def is_compiled(value: object) -> bool:
    """Return whether a value is the result of `torch.compile`."""
    if issubclass(type(value), nn.Module):  # isinstance() may fail on a proxy object
        module: Any = value
        inside = compiled_module(module) is not None
        return inside or getattr(module, "_compiled_call_impl", None) is not None
    try:
        return "_torchdynamo_orig_callable" in object.__getattribute__(value, "__dict__")
    except Exception:  # no `__dict__`, or a proxy object forwards the look-up
        return False


def call_compiled(module: nn.Module, context: Callable[..., Any]) -> None:
    """Compile a module's calls in place, as `module.compile()` does, with the given compiler."""
    call: Callable[..., object] = module._call_impl

    def frame(*args: Any, **named: Any) -> Any:
        return call(*args, **named)  # a wrapper, because dynamo skips frames of torch's own modules

    # Dynamo compiles a code object at most eight times; each module gets a code object of its own.
    frame.__code__ = frame.__code__.replace()
    module._compiled_call_impl = context(frame)


def fall_back_to_eager() -> None:
    """
    Run functions that `torch.compile` cannot compile in eager mode, with torch's own warning.

    Applies to all threads, while an ordinary assignment to torch's setting applies to one thread
    only.
    """
    import torch._dynamo  # takes a second, so only jobs that compile import it

    settings: Any = torch._dynamo.config
    settings._config["suppress_errors"].default = True


def frames_compiled() -> int:
    """Return the number of frames compiled in this process so far."""
    dynamo_utils = sys.modules.get("torch._dynamo.utils")  # imported if anything was compiled
    return 0 if dynamo_utils is None else int(dynamo_utils.curr_frame)


def not_compiled(function: FunctionT) -> FunctionT:
    """
    Decorator: run a hook, and the functions that it calls, in eager mode within a compiled
    function.

    A loop may compile its whole step, including `backward()` and `optimizer.step()`. Dynamo would
    trace our hooks for minutes and then fail. `torch.compiler.disable` has the same effect, but
    takes seconds to import. If torch changes this private API, dynamo traces the hooks again.
    """
    set_strategy = getattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy", None)
    if set_strategy is not None:
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP  # for this frame, and for all frames below it
        set_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    function._torchdynamo_disable = True  # prevents inlining into a compiled function
    return function


def avoid_compiler_import() -> None:
    """
    Prevent torch from importing its compiler, which would add a second to every process's start.

    torch wraps the methods of its optimizers so that `torch.compile` skips them, and imports the
    compiler on their first call. Our update is never compiled, so this makes the wrapper call the
    plain method, and `step` is called without its wrapper. If torch changes this private API, the
    only effect is the slower start.
    """
    plain = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    plain.__dict__.setdefault("__dynamo_disable", plain)


def after_backward(call: Callable[[], None]) -> None:
    """
    Call a function at the end of the current backward, before it returns; for use in a backward
    hook.

    DistributedDataParallel finishes its reduction in the same way. An exception of the function
    propagates out of `backward()`.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)


class RandomOpWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """
    Call a function before each operation of this thread that draws random numbers.

    torch tags these operations. Comparing a generator's state instead would include other threads.

    Args:
        callback: the callback; its exceptions propagate out of the operation.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._callback = callback

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._callback()
        return func(*args, **(kwargs or {}))


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to all leaves of nested containers."""
    return _pytree.tree_map(function, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """Return the leaves of nested containers, in order."""
    return _pytree.tree_leaves(tree)


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return the leaves of nested containers, in order, and their structure."""
    return _pytree.tree_flatten(tree)


def tree_paths(tree: Any) -> list[str]:
    """Return the paths of the leaves, in order: `[1]['mask']`."""
    return [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(tree)[0]]


def tree_unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """Rebuild nested containers from their leaves and their structure."""
    return _pytree.tree_unflatten(leaves, structure)


def structure_text(structure: Any) -> str:
    """
    Serialize the structure of nested containers to JSON.

    Raises:
        Exception: Of several types. A container's type has no name for serialization.
    """
    return _pytree.treespec_dumps(structure)


def structure_from_text(text: str) -> Any:
    """Parse the result of `structure_text`."""
    return _pytree.treespec_loads(text)


dist: Any = torch.distributed  # torch's type stubs lack most process group classes

_OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
}

_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""Unless this is 0, torch ends the process when an NCCL operation times out."""


def gloo_available() -> bool:
    """Return whether this torch was built with gloo."""
    return bool(dist.is_gloo_available())


def nccl_available() -> bool:
    """Return whether this torch was built with NCCL and a GPU is available."""
    return bool(dist.is_nccl_available() and torch.cuda.is_available())


def prefix_store(store: Any, purpose: str) -> Any:
    """Return a view of a store with a key prefix of its own."""
    return dist.PrefixStore(purpose, store)


def single_rank_store() -> Any:
    """Return a store for a group with one rank."""
    return dist.HashStore()


@contextmanager
def env_rendezvous(make_store: Callable[[], Any], rank: int, world: int) -> Iterator[None]:
    """
    Make `init_process_group()` without an address use our store.

    The public API can only add a scheme, and user scripts do not name one.

    Args:
        make_store: returns the store of the group that is being created.
        rank: this process's rank; a call with another rank raises `ValueError`.
        world: ranks in the group; a call with another number raises `ValueError`.
    """

    def handler(url: str, **more: Any) -> Iterator[tuple[Any, int, int]]:
        query = parse_qs(urlsplit(url).query)
        for name, expected in (("rank", rank), ("world_size", world)):
            if (value := query.get(name, [str(expected)])[0]) != str(expected):
                raise ValueError(
                    f"init_process_group() got {name}={value}, and this worker has "
                    f"{name}={expected}: "
                    f"leave it out, or take it from {name.upper()} of the environment"
                )
        yield make_store(), rank, world

    before = _rendezvous_handlers["env"]
    _rendezvous_handlers["env"] = handler
    try:
        yield
    finally:
        _rendezvous_handlers["env"] = before


def has_default_group() -> bool:
    """Return whether `init_process_group()` was called."""
    return bool(dist.is_available() and dist.is_initialized())


def destroy_default_group() -> None:
    """Destroy torch's default group, and all groups created from it, if it exists."""
    if has_default_group():
        dist.destroy_process_group()


def gloo_group(
    store: Any, purpose: str, rank: int, world: int, operation_s: float, host: str
) -> Any:
    """
    Create a gloo process group.

    Args:
        store: shared by all ranks.
        purpose: key prefix of this group in the store.
        rank: rank in the group.
        world: ranks in the group.
        operation_s: timeout of one operation.
        host: address to listen on.

    Raises:
        RuntimeError: gloo could not connect.
    """
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=operation_s)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(dist.PrefixStore(purpose, store), rank, world, options)


def nccl_group(store: Any, purpose: str, rank: int, world: int, operation_s: float) -> Any:
    """Create an NCCL process group; its first operations create the communicators."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=operation_s)
    before = os.environ.get(_ERROR_HANDLING)
    os.environ[_ERROR_HANDLING] = "0"  # read by the constructor
    try:
        return dist.ProcessGroupNCCL(dist.PrefixStore(purpose, store), rank, world, options)
    finally:
        del os.environ[_ERROR_HANDLING]
        if before is not None:
            os.environ[_ERROR_HANDLING] = before


def error_reason(error: BaseException) -> str:
    """Return the reason in a gloo error, without its source location and its guess at the cause."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\.(?:cc|h):\d+\] ", "", first).partition(" This is typically")[0]


def all_reduce(group: Any, tensor: Tensor, op: ReduceOp) -> Any:
    """Start an all-reduce in place; like all functions below, returns torch's `Work`."""
    options = dist.AllreduceOptions()
    options.reduceOp = _OPS[op]
    return group.allreduce([tensor], options)


def reduce(group: Any, tensor: Tensor, op: ReduceOp, root: int) -> Any:
    """Start a reduce into the root's tensor."""
    options = dist.ReduceOptions()
    options.reduceOp, options.rootRank = _OPS[op], root
    return group.reduce([tensor], options)


def broadcast(group: Any, tensor: Tensor, root: int) -> Any:
    """Start a broadcast."""
    options = dist.BroadcastOptions()
    options.rootRank = root
    return group.broadcast([tensor], options)


def all_gather_even(group: Any, table: Tensor, row: Tensor) -> Any:
    """Start an all-gather of vectors of one size, shape [n], into a table, shape [world * n]."""
    return group._allgather_base(table, row)


def all_gather(group: Any, outputs: Sequence[Tensor], tensor: Tensor) -> Any:
    """Start an all-gather of vectors; with NCCL their sizes may differ."""
    return group.allgather([list(outputs)], [tensor])


def reduce_scatter(group: Any, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp) -> Any:
    """Start reducing every rank's input r into rank r's output; with NCCL sizes may differ."""
    options = dist.ReduceScatterOptions()
    options.reduceOp = _OPS[op]
    return group.reduce_scatter([output], [list(inputs)], options)


def when_done(work: Any, callback: Any) -> None:
    """Call a function on torch's thread when the operation of a `Work` is complete."""
    work.get_future().add_done_callback(lambda future: callback())


def loader_exit_codes(error: BaseException) -> list[int]:
    """
    Return the exit codes of the loader processes in an error of a `DataLoader`; -9 means SIGKILL.

    The error's text contains only the process ids: torch adds the signal only in the main thread.
    """
    trace = error.__traceback__
    while trace is not None:
        code, names = trace.tb_frame.f_code, trace.tb_frame.f_locals
        if code is _MultiProcessingDataLoaderIter._try_get_data.__code__:
            codes = [process.exitcode for process in names["self"]._workers]
            return [code for code in codes if code is not None]
        trace = trace.tb_next
    return []
