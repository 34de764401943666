"""
Random numbers between a split and the point where it ends.

Outside, all ranks of a tensor group hold the same values and must drop the same ones: their
generators are in one state, which the step loop seeds. Inside, each rank holds other features, and
perhaps another number of them: it draws from a generator of its own, and afterwards goes on where
the ranks were together (Shoeybi et al. 2019, section 3).

    Linear (colwise)    ReLU    Dropout    Linear (rowwise)    Dropout
                      | own numbers                         | the same on all ranks
"""

import torch

from distplat.strategies.base import Collective

_RANGE = 1 << 48


class OwnNumbers:
    """
    Switches one process's generators there and back; one object for all split modules of a model.

    Args:
        group: the tensor group.
    """

    def __init__(self, group: Collective) -> None:
        self.group = group
        self._outside: torch.Tensor | None = None
        self._generator: torch.Generator | None = None

    def begin(self, device: torch.device) -> None:
        """
        Draw own numbers from here on.

        Two splits beside each other (the gate and the way up of a gated MLP) begin once: the
        second call does nothing.
        """
        if self._generator is not None:
            return
        drawn = int(torch.randint(_RANGE, ()))  # on the CPU: no wait for a GPU
        generator = _generator(device)
        self._outside, self._generator = generator.get_state(), generator
        generator.manual_seed(drawn * self.group.world + self.group.rank)

    def end(self) -> None:
        """Go on with the numbers that all ranks draw alike."""
        if self._generator is not None and self._outside is not None:
            self._generator.set_state(self._outside)
        self.forget()

    def forget(self) -> None:
        """Take it that numbers are those of all ranks, as after a forward that has failed."""
        self._generator = self._outside = None


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
