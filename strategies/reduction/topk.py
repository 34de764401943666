"""
Send only the largest entries of the gradient, keep the others for later (`compression: topk`).

Aji & Heafield 2017; Stich et al. 2018, "Sparsified SGD with Memory"; Lin et al. 2018, "Deep
Gradient Compression", whose warm-up and momentum correction are not done here.

    rank 0   meant  [ .1  -9  .2   3 ]   k = 2 ->  (1: -9) (3: 3)  --.
    rank 1   meant  [  7  .3  -2  .1 ]         ->  (0:  7) (2: -2)  --+- all-gather, add in order
                                                                      v
    everywhere      [  7  -9  -2   3 ]          residual of rank 0: [ .1  0  .2  0 ]

Places differ between the ranks, so this is an all-gather and not an all-reduce: a rank sends its k
entries to each of the N - 1 others.
"""

import torch
from torch import Tensor

from distplat.strategies.algorithms.reduce import squared_norm
from distplat.strategies.algorithms.sparse import add_sparse, entries_sent, largest
from distplat.strategies.collective import Collective
from distplat.strategies.reduction.compressed import CompressedReducer
from distplat.strategies.training.flat import FlatModel

_MOST_ELEMENTS = torch.iinfo(torch.int32).max


class TopKReducer(CompressedReducer):
    """
    Sums the `density * n` largest entries of each rank's gradient of n entries.

    Args:
        flat: see `CompressedReducer`.
        collective: the group.
        density: part of the entries that is sent, above 0 and up to 1; at least one entry is.
        look: see `CompressedReducer`.

    Raises:
        ValueError: the model has more parameters than an int32 can number.
    """

    def __init__(
        self, flat: FlatModel, collective: Collective, density: float, *, look: bool = True
    ) -> None:
        if flat.layout.tail > _MOST_ELEMENTS:
            raise ValueError(f"topk sends places as int32: at most {_MOST_ELEMENTS} parameters")
        super().__init__(flat, collective, look=look)
        self._count = entries_sent(density, flat.layout.tail)
        # One message per rank, [values | places], in words of 4 bytes whatever the values' dtype.
        words = _words(self._count, flat.grads.dtype) + self._count
        self._wires = [
            torch.zeros(words, dtype=torch.int32, device=flat.grads.device)
            for _ in range(collective.world)
        ]

    def _send(self, meant: Tensor) -> float:
        """See `CompressedReducer`."""
        chosen = largest(meant, self._count)
        mine = self._wires[self._collective.rank]
        self._values(mine).copy_(meant[chosen])
        self._places(mine).copy_(chosen)
        sent = squared_norm(self._values(mine))
        self._all_gather(self._wires, mine)
        grads = self._grads.zero_()
        places = [self._places(wire) for wire in self._wires]
        add_sparse(grads, places, [self._values(wire) for wire in self._wires])
        meant.index_fill_(0, chosen, 0.0)
        return sent

    def _values(self, wire: Tensor) -> Tensor:
        dtype = self._grads.dtype
        return wire[: _words(self._count, dtype)].view(dtype)[: self._count]

    def _places(self, wire: Tensor) -> Tensor:
        return wire[-self._count :]


def _words(count: int, dtype: torch.dtype) -> int:
    """Give the int32 words that so many values fill."""
    return -(-count * dtype.itemsize // 4)
