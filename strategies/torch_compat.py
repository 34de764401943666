"""
Everything private of torch that distplat uses, behind one name each, with the reason.

A release of torch may change it without a word; tests/unit/test_compat.py fails then, name by name.
The registries of a module (`_parameters`, `_buffers`, `_modules`, its hooks) and a tensor's
`_version` are used as they are: the same test holds that they are there.

Collective groups need more: torch.distributed's public functions work on process groups of its own
registry, and the first of them is the process's world. A group with a store and a lifetime of its
own needs the classes below them. They are right for torch 2.11 to 2.13
(tests/unit/test_collectives_compat.py).
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

from distplat.strategies.collective import ReduceOp

FunctionT = TypeVar("FunctionT", bound=Any)
COLLATE_RULES: dict[Any, Callable[..., Any]] = default_collate_fn_map
"""torch's rules by type; public is only the function that applies them to everything."""


def collate_with_rules(rules: dict[Any, Callable[..., Any]], samples: list[Any]) -> Any:
    """Put samples together by rules of our own: `default_collate` takes none."""
    return collate(samples, collate_fn_map=rules)


@contextmanager
def without_worker_info() -> Iterator[None]:
    """Have `get_worker_info` give None: many a stream reads a loader's part of itself by it."""
    before = loader_worker._worker_info
    loader_worker._worker_info = None
    try:
        yield
    finally:
        loader_worker._worker_info = before


def has_running_statistics(module: nn.Module) -> TypeGuard[_NormBase]:
    """Tell a norm with running statistics: it has no public class above all its kinds."""
    return isinstance(module, _NormBase)


def check_input(layer: nn.SyncBatchNorm, x: Tensor) -> None:
    """Check an input's dimensions as the layer's own forward does, which is replaced."""
    layer._check_input_dim(x)


def has_global_hooks() -> bool:
    """Whether there are hooks for every module of the process, of which nothing public tells."""
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def compiled_module(module: nn.Module) -> nn.Module | None:
    """Give what `torch.compile` wrapped; by name, for dynamo's class takes seconds to import."""
    if type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
        return module._modules["_orig_mod"]
    return None


def is_compiled(value: object) -> bool:
    """Whether something is what `torch.compile` has made of a function or a module."""
    if issubclass(type(value), nn.Module):  # what else is asked for its class may fail
        module: Any = value
        inside = compiled_module(module) is not None
        return inside or getattr(module, "_compiled_call_impl", None) is not None
    try:
        return "_torchdynamo_orig_callable" in object.__getattribute__(value, "__dict__")
    except Exception:  # it has none, or a proxy asks for what it stands for
        return False


def call_compiled(module: nn.Module, context: Callable[..., Any]) -> None:
    """Have a module's calls compiled in place, as `module.compile()` does, by a given compiler."""
    call: Callable[..., object] = module._call_impl

    def frame(*args: Any, **named: Any) -> Any:
        return call(*args, **named)  # around it: dynamo passes over frames of torch's own modules

    # Dynamo compiles a code object eight times: one module's are not to count for another one.
    frame.__code__ = frame.__code__.replace()
    module._compiled_call_impl = context(frame)


def fall_back_to_eager() -> None:
    """
    Have what `torch.compile` cannot compile run as it is, with a warning of torch's own.

    In all threads: what is assigned to torch's setting counts in the thread that does so.
    """
    import torch._dynamo  # takes a second: for jobs that compile only

    settings: Any = torch._dynamo.config
    settings._config["suppress_errors"].default = True


def frames_compiled() -> int:
    """Count what was compiled in this process so far, by whomever."""
    counting = sys.modules.get("torch._dynamo.utils")  # imported by who compiles
    return 0 if counting is None else int(counting.curr_frame)


def not_compiled(function: FunctionT) -> FunctionT:
    """
    Have a hook of ours, and what it calls, run as it is where a compiled function comes upon it.

    A loop may compile its whole step, with `backward()` and `optimizer.step()`. Dynamo would go on
    into our hooks, for minutes, and fail there. `torch.compiler.disable` says the same, and takes
    seconds to import. Where torch has changed this, dynamo goes into the hooks again.
    """
    found = getattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy", None)
    if found is not None:
        frames: Any = torch._C._dynamo.eval_frame
        skip = frames._FrameAction.SKIP  # of this frame, and of all within
        found(function.__code__, frames._FrameExecStrategy(skip, skip))
    function._torchdynamo_disable = True  # nor is it put into what is compiled
    return function


def avoid_compiler_import() -> None:
    """
    Keep torch from importing its compiler, which takes a second of every process's start.

    torch wraps the methods of its optimizers so that `torch.compile` leaves them alone, and imports
    the compiler when one is first called. Nobody compiles our update, so the wrapper is told that
    the plain method is what it looks for, and `step` is called without its wrapper. Should torch
    change this, the second is lost again and nothing else.
    """
    plain = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    plain.__dict__.setdefault("__dynamo_disable", plain)


def after_backward(call: Callable[[], None]) -> None:
    """
    Have the backward under way call this at its end, before it returns; from one of its hooks.

    DistributedDataParallel ends its reduction so. What it raises comes out of `backward()`.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)


class RandomOpWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """
    Has a function called before each operation of this thread that draws random numbers.

    torch tags these operations; the state of a generator would also tell of other threads.

    Args:
        drawn: is called; what it raises comes out of the operation.
    """

    def __init__(self, drawn: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._drawn = drawn

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._drawn()
        return func(*args, **(kwargs or {}))


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to all leaves of nested containers: torch has it for its own use only."""
    return _pytree.tree_map(function, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """Give the leaves of nested containers, in order."""
    return _pytree.tree_leaves(tree)


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """Take nested containers apart: give their leaves, in order, and the structure."""
    return _pytree.tree_flatten(tree)


def tree_paths(tree: Any) -> list[str]:
    """Give where the leaves are, in order: `[1]['mask']`."""
    return [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(tree)[0]]


def tree_unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """Put nested containers together from their leaves."""
    return _pytree.tree_unflatten(leaves, structure)


def structure_text(structure: Any) -> str:
    """
    Write the structure of nested containers as JSON.

    Raises:
        Exception: of several types; a container is of a type that has no name for this.
    """
    return _pytree.treespec_dumps(structure)


def structure_from_text(text: str) -> Any:
    """Read what `structure_text` has written."""
    return _pytree.treespec_loads(text)


dist: Any = torch.distributed  # torch's stubs leave out most of the process groups

_OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
}

_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""Unless it is 0, torch ends the process when an operation of NCCL is late."""


def gloo_available() -> bool:
    """Whether this torch was built with gloo."""
    return bool(dist.is_gloo_available())


def nccl_available() -> bool:
    """Whether this torch was built with NCCL, and there is a GPU."""
    return bool(dist.is_nccl_available() and torch.cuda.is_available())


def prefix_store(store: Any, purpose: str) -> Any:
    """Give a part of a store that no other purpose shares."""
    return dist.PrefixStore(purpose, store)


def single_rank_store() -> Any:
    """Give a store for a group of one rank."""
    return dist.HashStore()


@contextmanager
def env_rendezvous(give: Callable[[], Any], rank: int, world: int) -> Iterator[None]:
    """
    Have `init_process_group()` without an address take a store of ours.

    Public is only to add a scheme, and scripts name none.

    Args:
        give: the store of the group that is being made.
        rank: this process's; a call that says another raises `ValueError`.
        world: ranks in the group; the same.
    """

    def handler(url: str, **more: Any) -> Iterator[tuple[Any, int, int]]:
        said = parse_qs(urlsplit(url).query)
        for name, ours in (("rank", rank), ("world_size", world)):
            if (given := said.get(name, [str(ours)])[0]) != str(ours):
                raise ValueError(
                    f"init_process_group() got {name}={given}, and this worker has {name}={ours}: "
                    f"leave it out, or take it from {name.upper()} of the environment"
                )
        yield give(), rank, world

    before = _rendezvous_handlers["env"]
    _rendezvous_handlers["env"] = handler
    try:
        yield
    finally:
        _rendezvous_handlers["env"] = before


def has_default_group() -> bool:
    """Say whether `init_process_group()` was called."""
    return bool(dist.is_available() and dist.is_initialized())


def destroy_default_group() -> None:
    """Destroy torch's default group and all that were made beside it, if there is one."""
    if has_default_group():
        dist.destroy_process_group()


def gloo_group(
    store: Any, purpose: str, rank: int, world: int, operation_s: float, host: str
) -> Any:
    """
    Connect ranks by gloo.

    Args:
        store: of all of them.
        purpose: tells this group from others in the store.
        rank: in the group.
        world: ranks in the group.
        operation_s: deadline of one operation.
        host: address to listen on.

    Raises:
        RuntimeError: gloo could not connect.
    """
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=operation_s)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(dist.PrefixStore(purpose, store), rank, world, options)


def nccl_group(store: Any, purpose: str, rank: int, world: int, operation_s: float) -> Any:
    """Connect ranks by NCCL; see `gloo_group`. Communicators are made by the first operations."""
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
    """Give the reason in what gloo says, without its source file and its guess at who did it."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\.(?:cc|h):\d+\] ", "", first).partition(" This is typically")[0]


def all_reduce(group: Any, tensor: Tensor, op: ReduceOp) -> Any:
    """Begin an all-reduce in place; gives torch's `Work`, as all functions below."""
    options = dist.AllreduceOptions()
    options.reduceOp = _OPS[op]
    return group.allreduce([tensor], options)


def reduce(group: Any, tensor: Tensor, op: ReduceOp, root: int) -> Any:
    """Begin a reduce into the root's tensor."""
    options = dist.ReduceOptions()
    options.reduceOp, options.rootRank = _OPS[op], root
    return group.reduce([tensor], options)


def broadcast(group: Any, tensor: Tensor, root: int) -> Any:
    """Begin a broadcast."""
    options = dist.BroadcastOptions()
    options.rootRank = root
    return group.broadcast([tensor], options)


def all_gather_even(group: Any, table: Tensor, row: Tensor) -> Any:
    """Begin to gather vectors of one size, shape [n], into a table, shape [world * n]."""
    return group._allgather_base(table, row)


def all_gather(group: Any, outputs: Sequence[Tensor], tensor: Tensor) -> Any:
    """Begin to gather vectors, with NCCL of uneven sizes."""
    return group.allgather([list(outputs)], [tensor])


def reduce_scatter(group: Any, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp) -> Any:
    """Begin to reduce everybody's r-th input into rank r's output, with NCCL of uneven sizes."""
    options = dist.ReduceScatterOptions()
    options.reduceOp = _OPS[op]
    return group.reduce_scatter([output], [list(inputs)], options)


def when_done(work: Any, callback: Any) -> None:
    """Have a function called, on torch's thread, when the operation of a `Work` is over."""
    work.get_future().add_done_callback(lambda future: callback())


def loader_exit_codes(error: BaseException) -> list[int]:
    """
    Give how the loader processes ended that an error of a `DataLoader` is about; -9: by SIGKILL.

    The text has their numbers alone: torch adds the signal in a process's main thread only.
    """
    trace = error.__traceback__
    while trace is not None:
        code, names = trace.tb_frame.f_code, trace.tb_frame.f_locals
        if code is _MultiProcessingDataLoaderIter._try_get_data.__code__:
            codes = [process.exitcode for process in names["self"]._workers]
            return [code for code in codes if code is not None]
        trace = trace.tb_next
    return []
