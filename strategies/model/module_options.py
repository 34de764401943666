"""
What a job asks of the model's modules: activations computed again in backward, calls compiled.

Both leave names, parameters and `state_dict` as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distplat.platform.errors import Problem, SpecError, nearest
from distplat.platform.spec import Job
from distplat.strategies.model.trials import ReadAgain, beside
from distplat.strategies.torch_compat import (
    call_compiled,
    fall_back_to_eager,
    has_running_statistics,
)

_LEARNING = 3
"""Forwards with gradients in which all buffers are copied."""


def apply_module_options(job: Job, model: nn.Module) -> None:
    """
    Change a model's modules as the job asks, in place.

    Args:
        job: `activation_checkpointing` and `compile`.
        model: the whole one.

    Raises:
        SpecError: a pattern that no module's name matches.
    """
    for module in checkpointed_modules(job, model):
        checkpoint_activations(module)
    compile_calls(job, model)


def compile_calls(job: Job, model: nn.Module) -> None:
    """Have a model's calls compiled, in place, if the job says so."""
    if job.compile is not None:
        if not job.compile.fullgraph:
            fall_back_to_eager()
        call_compiled(model, partial(torch.compile, **job.compile.arguments()))


def checkpointed_modules(job: Job, model: nn.Module) -> list[nn.Module]:
    """
    Give the modules that `activation_checkpointing` names; none where the job does not have it.

    Raises:
        SpecError: a pattern that no module's name matches.
    """
    if job.activation_checkpointing is None:
        return []
    return _outermost(model, [one.strip() for one in job.activation_checkpointing.split(",")])


def checkpoint_activations(module: nn.Module) -> None:
    """
    Have a module keep its inputs only, and compute its activations again in backward.

    Buffers and attributes that its forward writes are written once and not twice, and the second
    forward reads what the first one read: a power iteration, or a counter, would give other
    activations.
    See `torch.utils.checkpoint`, and Chen et al., Training Deep Nets with Sublinear Memory Cost.
    """
    buffers = WrittenBuffers(module)
    module.forward = partial(
        checkpoint, module.forward, use_reentrant=False, context_fn=buffers.contexts
    )


_BufferKey = tuple[dict[str, Any], str]
"""Of a buffer, or a tensor in an attribute: the module's dictionary that has it, and its name."""

_Read = list[tuple[_BufferKey, Tensor | None]]
"""Buffers, and copies of them."""


class WrittenBuffers:
    """
    The buffers of a module that its forward writes, or puts others in the place of, and attributes.

    Which they are is seen in the first forwards, for which all are copied.

    Args:
        module: computed again in backward.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers: list[_BufferKey] = []
        #: written without a version, and not read in the mode that writes them
        self._statistics: list[_BufferKey] = []
        for one in module.modules():
            keys = [(one._buffers, key) for key in one._buffers]
            (self._statistics if has_running_statistics(one) else self._buffers).extend(keys)
            own = (
                (vars(one), key) for key, value in vars(one).items() if isinstance(value, Tensor)
            )
            self._buffers.extend(own)
        self._module = module
        self._written: set[int] = set()  #: indices of `_buffers`
        self._seen = 0  #: forwards that were looked at

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Give what is around a forward, and around the same one in backward."""
        read: _Read = []
        return self._around_first(read), self.around_second(read)

    def around_second(self, read: _Read) -> AbstractContextManager[None]:
        """
        Give what is around forwards in backward: they read and write copies.

        Args:
            read: what the first one has read of the buffers that it writes; filled until then.
        """
        return _ReentrantContext(partial(self._with_copies, read, ReadAgain(self._module)))

    @contextmanager
    def _around_first(self, read: _Read) -> Iterator[None]:
        copied = range(len(self._buffers)) if self._seen < _LEARNING else self._written
        values = {number: _clone(_tensor_at(self._buffers[number])) for number in copied}
        before = [_identity_and_version(buffer) for buffer in self._buffers]
        yield
        self._seen += torch.is_grad_enabled()
        for number, buffer in enumerate(self._buffers):
            if _identity_and_version(buffer) != before[number]:
                if number not in values:
                    raise _late_write(buffer[1])
                self._written.add(number)
                read.append((buffer, values[number]))

    @contextmanager
    def _with_copies(self, read: _Read, attributes: ReadAgain) -> Iterator[None]:
        copies = [(buffer, _clone(value)) for buffer, value in read]
        copies += [(buffer, _clone(_tensor_at(buffer))) for buffer in self._statistics]
        after = [_tensor_at(buffer) for buffer, _ in copies]
        with attributes:
            for (where, key), value in copies:
                where[key] = value
            try:
                yield
            finally:
                for ((where, key), _), tensor in zip(copies, after, strict=True):
                    where[key] = tensor


def recomputed(stage: nn.Module, inputs: Any) -> Any:
    """
    Run a stage so that its activations are computed again in backward.

    Raises:
        SpecError: forward writes into tensors that are not trained, and would do so twice.
    """
    if not torch.is_grad_enabled():
        return stage(inputs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), written.around_second([])

    written = WrittenBuffers(stage)
    before, kept = _state(stage), [*_kept_in_attributes(stage)]
    outputs = checkpoint(
        stage, inputs, use_reentrant=False, preserve_rng_state=True, context_fn=contexts
    )
    names = [name for name, known in _state(stage).items() if before.get(name) != known]
    names += [name for name, tensor, version in kept if tensor._version != version]
    if names:
        text = f"forward writes into {', '.join(names)}, and `recompute` runs it twice"
        hint = "leave out `recompute`, or the job's `activation_checkpointing`"
        raise SpecError(Problem(("strategy", "recompute"), text, hint))
    return outputs


def _state(stage: nn.Module) -> dict[str, tuple[int, int]]:
    """Give by name what tells that a tensor that is not trained was written, or replaced."""
    versions = {}
    for path, module in stage.named_modules():
        own = dict(module._parameters)
        if not has_running_statistics(module):  # of norms, the second forward has copies
            own |= module._buffers
        for name, tensor in own.items():
            if tensor is not None and not tensor.requires_grad:
                versions[_name_in_model(path, name)] = id(tensor), tensor._version
    return versions


def _kept_in_attributes(stage: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Give tensors in attributes, with their names and versions: `ReadAgain` puts them back."""
    holders = [*stage.named_modules(), *(("task", one) for one in beside(stage))]
    for path, holder in holders:
        for name, value in vars(holder).items():
            if isinstance(value, Tensor) and not value.requires_grad:
                yield _name_in_model(path, name), value, value._version


def _name_in_model(path: str, name: str) -> str:
    return f"{path}.{name}".removeprefix("chunk.").removeprefix("model.").removeprefix(".")


class _ReentrantContext:
    """
    A context that is made anew whenever it is entered.

    Activations are computed again for each backward that needs them: for a gradient of a gradient
    twice.
    """

    def __init__(self, made: Callable[[], AbstractContextManager[None]]) -> None:
        self._made = made
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        one = self._made()
        one.__enter__()
        self._entered.append(one)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def _tensor_at(buffer: _BufferKey) -> Tensor | None:
    where, key = buffer
    value = where.get(key)
    return value if isinstance(value, Tensor) else None


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _identity_and_version(buffer: _BufferKey) -> tuple[int, int]:
    """Tell whether a buffer was written, or another one put in its place."""
    tensor = _tensor_at(buffer)
    return id(tensor), -1 if tensor is None else tensor._version


def _late_write(name: str) -> ValueError:
    return ValueError(
        f"the forward writes the buffer {name!r} now, and did not in its first calls: its "
        "activations cannot be computed again from what it has read (activation_checkpointing)"
    )


def _outermost(model: nn.Module, patterns: list[str]) -> list[nn.Module]:
    """Give the modules whose names match, but none inside of another one that does."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            text = f"{pattern!r} matches no module of the model"
            near = nearest(pattern, names)
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            hint = f"did you mean {near!r}?" if near else f"its modules: {shown}"
            raise SpecError(Problem(("activation_checkpointing",), text, hint))
    chosen: list[str] = []
    for name in names:  # outer modules come before those in them
        inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if not inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            chosen.append(name)
    return [model.get_submodule(name) for name in chosen]
