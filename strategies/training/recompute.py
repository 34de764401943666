"""
Activation recomputation: a stage keeps its input and runs forward again in backward (Chen et al.,
"Training Deep Nets with Sublinear Memory Cost", 2016).

    forward    input kept, activations dropped           memory: inputs of the live micro-batches
    backward   forward again, then backward                      + activations of one

The result has the same bits: dropout draws again what it drew, and running statistics of batch
norms see each micro-batch once. A schedule that splits backward goes forward again for each half,
so the two do not go well together.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.training.compat import has_running_statistics


def recomputed(stage: nn.Module, inputs: Any) -> Any:
    """
    Run a stage so that its activations are computed again in backward.

    Raises:
        SpecError: forward writes into buffers or frozen parameters, and would do so twice.
    """
    if not torch.is_grad_enabled():
        return stage(inputs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _StatisticsStay(stage)

    before = _state(stage)
    outputs = checkpoint(
        stage, inputs, use_reentrant=False, preserve_rng_state=True, context_fn=contexts
    )
    written = [name for name, known in _state(stage).items() if before.get(name) != known]
    if written:
        text = f"forward writes into {', '.join(written)}, and `recompute` runs it twice"
        raise SpecError(Problem(("strategy", "recompute"), text, "leave `recompute` out"))
    return outputs


def _state(stage: nn.Module) -> dict[str, tuple[int, int]]:
    """Give by name what tells that a tensor that is not trained was written, or replaced."""
    found = {}
    for path, module in stage.named_modules():
        own = dict(module._parameters)
        if not has_running_statistics(module):  # of norms, `_StatisticsStay` takes care
            own |= module._buffers
        for name, tensor in own.items():
            if tensor is not None and not tensor.requires_grad:
                where = f"{path}.{name}".removeprefix("chunk.").removeprefix("model.")
                found[where] = id(tensor), tensor._version
    return found


class _StatisticsStay:
    """
    Has norms update copies of their running statistics, which are then thrown away.

    Entered once per recomputation: twice where a schedule splits backward.
    """

    def __init__(self, stage: nn.Module) -> None:
        self._stage = stage
        self._kept: list[tuple[nn.Module, dict[str, Tensor | None]]] = []

    def __enter__(self) -> None:
        self._kept = [
            (module, dict(module._buffers))
            for module in self._stage.modules()
            if has_running_statistics(module) and module.training and module.track_running_stats
        ]
        for module, buffers in self._kept:
            for name, buffer in buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()

    def __exit__(self, *error: object) -> None:
        for module, buffers in self._kept:
            module._buffers.update(buffers)
