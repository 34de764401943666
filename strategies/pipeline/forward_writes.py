"""
What a forward writes while earlier micro-batches wait for their backward.

    stage 0     F0  F1  B0  F2  B1  ..        F1 writes a weight: B0 would be with the new one

Backward needs what its forward computed with. A write that torch sees ends in an error of its own,
without a name; one through `.data` it does not see. One process goes backward before the next
forward writes.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.checkpoint.state_sync import slots_of
from distplat.strategies.model.written_tensors import TensorValues

_TORCHS = re.compile(r"Tensor \[([\d, ]*)\]\].* is at version (\d+); .*", re.DOTALL)
"""What torch says of a tensor that backward needs as it was."""


class ForwardWrites:
    """
    Watches what forwards write.

    Args:
        module: what this rank has of the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._slots = dict(enumerate(slots_of(module)))
        self._versions: dict[int, int] = {}
        self._compares = False

    def begin_step(self, *, thorough: bool) -> None:
        """Called when a step's forwards follow; `thorough`: whether values are compared."""
        self._versions, self._compares = self._now(), thorough

    @contextmanager
    def forward(self) -> Iterator[None]:
        """
        Make a forward while another micro-batch waits for its backward.

        Raises:
            SpecError: it changed a trained parameter.
        """
        trained = {
            number: slot
            for number, slot in self._slots.items()
            if self._compares and (one := slot.tensor) is not None and one.requires_grad
        }
        before = TensorValues(trained)
        yield
        changed = before.differ()
        if changed:
            raise _refused([self._slots[number].name for number in sorted(changed)])

    def explained(self, error: RuntimeError) -> Exception:
        """Give what a backward's error is told as: with names, where a write was its reason."""
        match = _TORCHS.search(str(error))
        if match is None:
            return error
        size = math.prod(int(one) for one in match[1].split(",") if one.strip())
        names = [
            slot.name
            for number, slot in self._slots.items()
            if (tensor := slot.tensor) is not None
            if tensor._version == int(match[2]) != self._versions.get(number)
            if tensor.numel() == size
        ]
        return _refused(names) if names else error

    def _now(self) -> dict[int, int]:
        tensors = ((number, slot.tensor) for number, slot in self._slots.items())
        return {number: -1 if one is None else one._version for number, one in tensors}


def _refused(names: list[str]) -> SpecError:
    text = (
        f"a forward writes {', '.join(names)} while an earlier micro-batch, which computed with "
        "the values before, waits for its backward"
    )
    hint = (
        "compute with a changed copy, such as `self.weight.clamp(-1, 1)`, and leave the tensor as "
        "it is; or set `micro_batches: 1`, or use `strategy: ring`"
    )
    return SpecError(Problem(("strategy", "micro_batches"), text, hint))
