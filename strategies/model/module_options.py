"""
What a job asks of the model's modules: activations computed again in backward, calls compiled.

Both leave names, parameters and `state_dict` as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distplat.platform.errors import Problem, SpecError, nearest
from distplat.platform.spec import Job
from distplat.strategies.compat import fall_back_to_eager, has_running_statistics


def apply_module_options(job: Job, model: nn.Module) -> None:
    """
    Change a model's modules as the job asks, in place.

    Args:
        job: `activation_checkpointing` and `compile`.
        model: the whole one.

    Raises:
        SpecError: a pattern that no module's name matches.
    """
    if job.activation_checkpointing is not None:
        patterns = [pattern.strip() for pattern in job.activation_checkpointing.split(",")]
        for module in _outermost(model, patterns):
            checkpoint_activations(module)
    if job.compile is not None:
        if not job.compile.fullgraph:
            fall_back_to_eager()
        model.compile(**job.compile.arguments())


def checkpoint_activations(module: nn.Module) -> None:
    """
    Have a module keep its inputs only, and compute its activations again in backward.

    Buffers that its forward writes, as batch norm's statistics, are written once and not twice.
    See `torch.utils.checkpoint`, and Chen et al., Training Deep Nets with Sublinear Memory Cost.
    """
    plain: Callable[..., Any] = module.forward
    norms = [one for one in module.modules() if has_running_statistics(one)]
    statistics = [buffer for one in norms for buffer in one.buffers()]  # written without a version

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        written = [*statistics]
        return _note_written([*module.buffers()], written), _put_back(written)

    module.forward = partial(checkpoint, plain, use_reentrant=False, context_fn=contexts)


@contextmanager
def _note_written(buffers: list[Tensor], written: list[Tensor]) -> Iterator[None]:
    versions = [buffer._version for buffer in buffers]
    yield
    pairs = zip(buffers, versions, strict=True)
    written += [buffer for buffer, version in pairs if buffer._version != version]


@contextmanager
def _put_back(written: list[Tensor]) -> Iterator[None]:
    before = [buffer.clone() for buffer in written]
    try:
        yield
    finally:
        for buffer, value in zip(written, before, strict=True):
            buffer.copy_(value)


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
