"""The exponential moving average of a run of the flat vector, after each update, as in torch."""

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
"""Name of the average beside what an optimizer remembers: a vector, laid out as the parameters."""

AVERAGED = "ema_updates"
"""Name of the number of updates in it, kept for each parameter, and the same for all."""


class AveragedVector:
    """
    Average of a vector over its updates: `torch.optim.swa_utils.AveragedModel` with `get_ema_*`.

    The first update is copied, each later one moves the average. Frozen parameters behind the
    others stay as they are in it until one of them is trained.

    Args:
        spec: the job's.
        vector: shape [n]; what is averaged.
        layout: what lies where.
    """

    def __init__(self, spec: EMA, vector: Tensor, layout: Layout) -> None:
        self._spec, self._vector, self._layout = spec, vector, layout
        self._average: Tensor | None = None
        self._updates = 0

    @property
    def values(self) -> Tensor:
        """The average, shape [n]; before the first update the parameters."""
        return self._vector if self._average is None else self._average

    @property
    def state_bytes(self) -> int:
        """Memory that it takes."""
        return 0 if self._average is None else self._average.nbytes

    def update(self, *, tail: bool) -> None:
        """
        Take an update of the vector in.

        Args:
            tail: whether the update moved a parameter that was frozen at first.
        """
        if self._average is None:
            self._average = self._vector.clone()
        else:
            weight = 1.0 - self._spec.decay_after(self._updates)
            for one in self._layout.segments:
                if tail or one.start < self._layout.tail:
                    run = one.start, one.stop, one.dtype
                    typed(self._average, *run).lerp_(typed(self._vector, *run), weight)
        self._updates += 1

    def state(self) -> dict[str, Tensor]:
        """Give what a checkpoint needs by name, see `AVERAGE`; no copy. Nothing: no update yet."""
        if self._average is None:
            return {}
        counts = torch.full((self._layout.parameters,), self._updates, dtype=torch.int64)
        return {AVERAGE: self._average, AVERAGED: counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` of an equal one gave; copied. Nothing: begin with the next."""
        average = state.get(AVERAGE)
        self._average = None if average is None else torch.empty_like(self._vector).copy_(average)
        self._updates = 0 if average is None else int(state[AVERAGED].max())


def with_average(flat: FlatModel, average: Tensor) -> dict[str, Tensor]:
    """
    Give a model's state, and after `EMA_PREFIX` what it is with the average of the parameters.

    Args:
        flat: the model.
        average: shape [n].
    """
    now = flat.state_dict()
    with flat.with_params(average):
        averaged = flat.state_dict()
    return now | {EMA_PREFIX + name: value for name, value in averaged.items()}
