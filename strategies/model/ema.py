"""The exponential moving average of a range of the flat vector, updated in each step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distplat.platform.model_options import EMA
from distplat.platform.tensor_file import EMA_PREFIX
from distplat.platform.vector_layout import Layout
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.parameter_layout import typed

AVERAGE = "ema"
"""Name of the average in an optimizer's state: a vector with the layout of the parameters."""

AVERAGED = "ema_updates"
"""Name of the number of updates in the average: one entry per parameter, all equal."""


class AveragedVector:
    """
    Average of a vector over its updates: `torch.optim.swa_utils.AveragedModel` with `get_ema_*`.

    The first update copies the vector; later updates average it. The frozen parameters of the tail
    are not averaged until one of them is trained.

    Args:
        spec: options of the job.
        vector: vector to average, shape [n].
        layout: of the vector.
    """

    def __init__(self, spec: EMA, vector: Tensor, layout: Layout) -> None:
        self._spec, self._vector, self._layout = spec, vector, layout
        self._average: Tensor | None = None
        self._updates = 0
        self._averages_tail = False  #: whether a parameter of the tail has been trained

    @property
    def values(self) -> Tensor:
        """Average, shape [n]; before the first update, the vector itself."""
        return self._vector if self._average is None else self._average

    @property
    def state_bytes(self) -> int:
        """Size of the average in bytes."""
        return 0 if self._average is None else self._average.nbytes

    def update(self, *, tail: bool) -> None:
        """
        Update the average after an update of the vector.

        Args:
            tail: whether the update changed an initially frozen parameter.
        """
        self._averages_tail |= tail
        if self._average is None:
            self._average = self._vector.clone()
        else:
            weight = 1.0 - self._spec.decay_after(self._updates)
            for segment in self._layout.segments:
                if self._averages_tail or segment.start < self._layout.tail:
                    run = segment.start, segment.stop, segment.dtype
                    typed(self._average, *run).lerp_(typed(self._vector, *run), weight)
        self._updates += 1

    def state(self) -> dict[str, Tensor]:
        """Return the state by name, see `AVERAGE`, not copied; empty before the first update."""
        if self._average is None:
            return {}
        counts = torch.full((self._layout.parameters,), self._updates, dtype=torch.int64)
        return {AVERAGE: self._average, AVERAGED: counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load a copy of a `state`; an empty one resets the average."""
        average = state.get(AVERAGE)
        self._average = None if average is None else torch.empty_like(self._vector).copy_(average)
        self._updates = 0 if average is None else int(state[AVERAGED].max())
        tail = slice(self._layout.tail, None)
        self._averages_tail = self._average is not None and not torch.equal(
            self._average[tail], self._vector[tail]
        )


def with_average(flat: FlatModel, average: Tensor) -> dict[str, Tensor]:
    """
    Return a model's state dict, plus its entries with averaged parameters under `EMA_PREFIX`.

    Args:
        flat: the model.
        average: shape [n].
    """
    state = flat.state_dict()
    with flat.with_params(average):
        averaged = flat.state_dict()
    return state | {EMA_PREFIX + name: value for name, value in averaged.items()}
