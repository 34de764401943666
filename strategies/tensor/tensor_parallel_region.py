"""
What holds between the columns that begin a split and the rows that end it.

**One way in.** Columns beside each other read one input (a gated MLP's two, an attention's three):
its gradient is summed over the ranks once, not once for each.

    x ──f──┬── gate (colwise) ── silu ──┐
           └── up   (colwise) ──────── (*) ── down (rowwise) ──g──

**Own random numbers.** Outside, all ranks hold the same values and must drop the same ones: their
generators are in one state, which the step loop seeds. Inside, each rank holds other features, and
perhaps another number of them: it draws from a generator of its own, and afterwards goes on where
the ranks were together (Shoeybi et al. 2019, section 3).

    Linear (colwise)    ReLU    Dropout    Linear (rowwise)    Dropout
                      | own numbers                         | the same on all ranks
"""

import torch
from torch import Tensor

from distplat.strategies.collective import Collective
from distplat.strategies.tensor.exchange import copied

_RANGE = 1 << 48


class TensorParallelRegion:
    """
    Follows one process's forward; one object for all split modules of a model.

    Args:
        group: the tensor group.
    """

    def __init__(self, group: Collective) -> None:
        self.group = group
        self._outside: Tensor | None = None
        self._generator: torch.Generator | None = None
        self._way_in: tuple[Tensor, Tensor] | None = None

    def enter(self, value: Tensor) -> Tensor:
        """Give a complete value for use in this rank's part; the same one if it was just given."""
        if self._way_in is not None and self._way_in[0] is value:
            given = self._way_in[1]
            if given.requires_grad == (value.requires_grad and torch.is_grad_enabled()):
                return given
        self._way_in = (value, copied(value, self.group))
        return self._way_in[1]

    def begin(self, device: torch.device) -> None:
        """Draw own numbers from here on; inside of a split this does nothing."""
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
        """Be outside without more ado, as before a forward: the one before may have failed."""
        self._generator = self._outside = self._way_in = None


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
