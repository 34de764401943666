"""
Activation checkpointing and compilation of a model's modules.

Neither changes names, parameters or the `state_dict`.
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
from distplat.strategies.model.trials import AttributeReplay, external_objects
from distplat.strategies.torch_compat import (
    call_compiled,
    fall_back_to_eager,
    has_running_statistics,
)

_OBSERVED_FORWARDS = 3
"""Number of first forwards with gradients in which all buffers are copied."""


def apply_module_options(job: Job, model: nn.Module) -> None:
    """
    Apply `activation_checkpointing` and `compile` to a model, in place.

    Args:
        job: has the two fields.
        model: the whole model.

    Raises:
        SpecError: a pattern matches no module name.
    """
    for module in checkpointed_modules(job, model):
        checkpoint_activations(module)
    compile_calls(job, model)


def compile_calls(job: Job, model: nn.Module) -> None:
    """Compile a model's calls, in place, if the job has `compile`."""
    if job.compile is not None:
        if not job.compile.fullgraph:
            fall_back_to_eager()
        call_compiled(model, partial(torch.compile, **job.compile.arguments()))


def checkpointed_modules(job: Job, model: nn.Module) -> list[nn.Module]:
    """
    Return the modules named by `activation_checkpointing`; without the field, none.

    Raises:
        SpecError: a pattern matches no module name.
    """
    if job.activation_checkpointing is None:
        return []
    patterns = job.activation_checkpointing.split(",")
    return _outermost(model, [pattern.strip() for pattern in patterns])


def checkpoint_activations(module: nn.Module) -> None:
    """
    Let a module save only its inputs, and recompute its activations in backward.

    The recomputation reads the buffers and attributes of the first forward, and its own writes are
    discarded: otherwise a power iteration, or a counter, would change the activations.
    See `torch.utils.checkpoint`, and Chen et al., Training Deep Nets with Sublinear Memory Cost.
    """
    buffers = WrittenBuffers(module)
    module.forward = partial(
        checkpoint, module.forward, use_reentrant=False, context_fn=buffers.contexts
    )


_BufferKey = tuple[dict[str, Any], str]
"""The module's dictionary that holds a buffer or a tensor attribute, and the name in it."""

_Read = list[tuple[_BufferKey, Tensor | None]]
"""Buffers, and copies of their values."""


class WrittenBuffers:
    """
    The buffers and tensor attributes of a module that its forward writes or replaces.

    They are detected in the first forwards, in which all of them are copied.

    Args:
        module: recomputed in backward.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers: list[_BufferKey] = []
        #: written without a version change, and not read in the mode that writes them
        self._statistics: list[_BufferKey] = []
        for child in module.modules():
            keys = [(child._buffers, key) for key in child._buffers]
            (self._statistics if has_running_statistics(child) else self._buffers).extend(keys)
            attributes = vars(child)
            names = [name for name, value in attributes.items() if isinstance(value, Tensor)]
            self._buffers.extend((attributes, name) for name in names)
        self._module = module
        self._written: set[int] = set()  #: indices of `_buffers`
        self._observed = 0  #: number of observed forwards

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a forward and of its recomputation."""
        read: _Read = []
        return self._around_first(read), self.around_second(read)

    def around_second(self, read: _Read) -> AbstractContextManager[None]:
        """
        Return the context of recomputations: they read and write copies.

        Args:
            read: values of the written buffers before the first forward; filled by that forward.
        """
        return _ReentrantContext(partial(self._with_copies, read, AttributeReplay(self._module)))

    @contextmanager
    def _around_first(self, read: _Read) -> Iterator[None]:
        copied = range(len(self._buffers)) if self._observed < _OBSERVED_FORWARDS else self._written
        values = {number: _clone(_tensor_at(self._buffers[number])) for number in copied}
        before = [_identity_and_version(buffer) for buffer in self._buffers]
        yield
        self._observed += torch.is_grad_enabled()
        for number, buffer in enumerate(self._buffers):
            if _identity_and_version(buffer) != before[number]:
                if number not in values:
                    raise _late_write(buffer[1])
                self._written.add(number)
                read.append((buffer, values[number]))

    @contextmanager
    def _with_copies(self, read: _Read, attributes: AttributeReplay) -> Iterator[None]:
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
    Run a stage so that its activations are recomputed in backward.

    Raises:
        SpecError: forward writes untrained tensors, and recomputation would write them twice.
    """
    if not torch.is_grad_enabled():
        return stage(inputs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), written.around_second([])

    written = WrittenBuffers(stage)
    before, attributes = _versions_by_name(stage), [*_attribute_tensors(stage)]
    outputs = checkpoint(
        stage, inputs, use_reentrant=False, preserve_rng_state=True, context_fn=contexts
    )
    after = _versions_by_name(stage)
    names = [name for name, version in after.items() if before.get(name) != version]
    names += [name for name, tensor, version in attributes if tensor._version != version]
    if names:
        text = f"forward writes into {', '.join(names)}, and `recompute` runs it twice"
        hint = "leave out `recompute`, or the job's `activation_checkpointing`"
        raise SpecError(Problem(("strategy", "recompute"), text, hint))
    return outputs


def _versions_by_name(stage: nn.Module) -> dict[str, tuple[int, int]]:
    """Return identity and version of untrained tensors by name, to detect writes."""
    versions = {}
    for path, module in stage.named_modules():
        own = dict(module._parameters)
        if not has_running_statistics(module):  # recomputation uses copies of running statistics
            own |= module._buffers
        for name, tensor in own.items():
            if tensor is not None and not tensor.requires_grad:
                versions[_name_in_model(path, name)] = id(tensor), tensor._version
    return versions


def _attribute_tensors(stage: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """Yield names and versions of tensors in attributes, which `AttributeReplay` restores."""
    holders = [*stage.named_modules(), *(("task", task) for task in external_objects(stage))]
    for path, holder in holders:
        for name, value in vars(holder).items():
            if isinstance(value, Tensor) and not value.requires_grad:
                yield _name_in_model(path, name), value, value._version


def _name_in_model(path: str, name: str) -> str:
    return f"{path}.{name}".removeprefix("chunk.").removeprefix("model.").removeprefix(".")


class _ReentrantContext:
    """
    A context manager that can be entered several times.

    Each backward recomputes the activations: a gradient of a gradient does so twice.
    """

    def __init__(self, build: Callable[[], AbstractContextManager[None]]) -> None:
        self._build = build
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._build()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def _tensor_at(buffer: _BufferKey) -> Tensor | None:
    where, key = buffer
    value = where.get(key)
    return value if isinstance(value, Tensor) else None


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _identity_and_version(buffer: _BufferKey) -> tuple[int, int]:
    """Return a buffer's identity and version, which change when it is replaced or written."""
    tensor = _tensor_at(buffer)
    return id(tensor), -1 if tensor is None else tensor._version


def _late_write(name: str) -> ValueError:
    return ValueError(
        f"the forward writes the buffer {name!r} now, and did not in its first calls: its "
        "activations cannot be computed again from what it has read (activation_checkpointing)"
    )


def _outermost(model: nn.Module, patterns: list[str]) -> list[nn.Module]:
    """Return the modules whose names match, except those inside another match."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            text = f"{pattern!r} matches no module of the model"
            near = nearest(pattern, names)
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            hint = f"did you mean {near!r}?" if near else f"its modules: {shown}"
            raise SpecError(Problem(("activation_checkpointing",), text, hint))
    chosen: list[str] = []
    for name in names:  # named_modules() yields parents before their children
        inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if not inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            chosen.append(name)
    return [model.get_submodule(name) for name in chosen]
