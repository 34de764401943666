"""Gradients that travel as halves: cast before an operation, cast back after it."""

import time

import torch
from torch import Tensor

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.algorithms.ring import traffic_elements
from distplat.strategies.collective import Collective
from distplat.strategies.reduction.figures import time_all_reduce

MEASURE_EVERY = 16
"""Steps from one measured rounding error to the next: it costs a pass over the gradients."""


class Wire:
    """
    A copy of the gradient vector in a smaller type, which is what the group reduces.

    Nothing is scaled. What float16 cannot hold becomes infinite (above 65504) or loses digits
    (below 6e-5) or all of itself (below 3e-8), as in any use of float16; bfloat16 has the range of
    float32, and eight bits. The ranks' terms are weighted by their share of the batch, so their sum
    is no larger than a gradient of the whole batch.

    Args:
        gradients: shape [n]; set to zero: an all-reduce of them is timed here, as a baseline.
        dtype: name of the type that travels, `float16` or `bfloat16`.
        collective: the group; every rank makes its wire.

    Raises:
        SpecError: the gradients are as small already.
    """

    def __init__(self, gradients: Tensor, dtype: str, collective: Collective) -> None:
        kind: torch.dtype = getattr(torch, dtype)
        if kind.itemsize >= gradients.itemsize:
            name = str(gradients.dtype).removeprefix("torch.")
            text = f"{dtype} is no smaller than the gradients, which are {name}"
            raise SpecError(Problem(("strategy", "compression"), text, "remove it"))
        self._gradients = gradients
        self._vector = collective.share(torch.empty_like(gradients, dtype=kind))
        sent, _ = traffic_elements(gradients.numel(), collective.rank, collective.world)
        self._saved_bytes = float(sent * (gradients.itemsize - kind.itemsize))
        self._baseline_s = time_all_reduce(gradients, collective)
        self._steps = -1
        self.seconds = 0.0  #: spent in casting, in this step
        self.overflows = kind is torch.float16  #: whether a finite gradient may become infinite

    def begin(self) -> None:
        """Another step comes."""
        self.seconds = 0.0
        self._error = self._whole = 0.0
        self._steps += 1
        self._measures = self._steps % MEASURE_EVERY == 0

    def pack(self, start: int, stop: int) -> Tensor:
        """Give a part of the gradients as it travels; the group may write into it."""
        began = time.perf_counter()
        mine, packed = self._gradients[start:stop], self._vector[start:stop]
        packed.copy_(mine)
        self.seconds += time.perf_counter() - began
        if self._measures:
            self._error += float(torch.linalg.vector_norm(packed.to(mine.dtype) - mine)) ** 2
            self._whole += float(torch.linalg.vector_norm(mine)) ** 2
        return packed

    def unpack(self, start: int, stop: int) -> None:
        """Write a part that came back into the gradients."""
        began = time.perf_counter()
        self._gradients[start:stop].copy_(self._vector[start:stop])
        self.seconds += time.perf_counter() - began

    def figures(self, working_s: float) -> dict[str, float]:
        """
        Give the figures of this step; the error only in steps in which it was measured.

        Args:
            working_s: of the step's operations, waiting left out.
        """
        figures = {
            "saved_bytes": self._saved_bytes,
            "compress_s": self.seconds,
            "baseline_s": self._baseline_s,
            "saved_s": self._baseline_s - (working_s + self.seconds),
        }
        if self._measures:
            figures["error_norm"] = (self._error / self._whole) ** 0.5 if self._whole else 0.0
        return figures
