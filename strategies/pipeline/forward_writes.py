"""
In-place writes of a forward while earlier micro-batches wait for their backward.

    stage 0     F0  F1  B0  F2  B1  ..        F1 writes a weight: B0 would use the new value

Backward needs the values that its forward computed with. If autograd sees the write, it raises an
error that does not name the tensor; a write through `.data` it does not see. A single process does
not have this problem: it runs each backward before the next forward.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.checkpoint.state_sync import slots_of
from distplat.strategies.model.written_tensors import TensorValues

_TORCH_ERROR = re.compile(r"Tensor \[([\d, ]*)\]\].* is at version (\d+); .*", re.DOTALL)
"""torch's error for a tensor that was modified in place before its backward."""


class ForwardWrites:
    """
    Detects in-place writes of forwards to parameters and buffers.

    Args:
        module: this rank's part of the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._slots = dict(enumerate(slots_of(module)))
        self._versions: dict[int, int] = {}
        self._compares = False

    def begin_step(self, *, thorough: bool) -> None:
        """Start a step; `thorough`: compare values, not only version counters."""
        self._versions, self._compares = self._current_versions(), thorough

    @contextmanager
    def forward(self) -> Iterator[None]:
        """
        Return a context for a forward while another micro-batch waits for its backward.

        Raises:
            SpecError: the forward changed a trained parameter.
        """
        trained = {
            number: slot
            for number, slot in self._slots.items()
            if self._compares and (tensor := slot.tensor) is not None and tensor.requires_grad
        }
        before = TensorValues(trained)
        yield
        changed = before.differ()
        if changed:
            raise _write_error([self._slots[number].name for number in sorted(changed)])

    def explained(self, error: RuntimeError) -> Exception:
        """Return an error that names the written tensors, or `error` if no write caused it."""
        match = _TORCH_ERROR.search(str(error))
        if match is None:
            return error
        size = math.prod(int(extent) for extent in match[1].split(",") if extent.strip())
        names = [
            slot.name
            for number, slot in self._slots.items()
            if (tensor := slot.tensor) is not None
            if tensor._version == int(match[2]) != self._versions.get(number)
            if tensor.numel() == size
        ]
        return _write_error(names) if names else error

    def _current_versions(self) -> dict[int, int]:
        tensors = ((number, slot.tensor) for number, slot in self._slots.items())
        return {number: -1 if tensor is None else tensor._version for number, tensor in tensors}


def _write_error(names: list[str]) -> SpecError:
    text = (
        f"a forward writes {', '.join(names)} in place while an earlier micro-batch, which used "
        "the old values, waits for its backward"
    )
    hint = (
        "compute with a changed copy, such as `self.weight.clamp(-1, 1)`, instead of writing the "
        "tensor; or set `micro_batches: 1`, or use `strategy: ring`"
    )
    return SpecError(Problem(("strategy", "micro_batches"), text, hint))
