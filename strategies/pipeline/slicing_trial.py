"""
Check before the first step that sliced layers compute the same as whole layers.

    whole      evaluation, training without dropout     outputs, gradients of unsliced parameters
    sliced     the same, all slices together            compared

This detects an unsliced parameter between split layers, which gets only a part of its gradient on
each slice, and layers that need all columns in training only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distplat.platform.errors import DistplatError, Problem, SpecError
from distplat.strategies.model.trials import WithoutDropout, disable_dropout, preserve_state
from distplat.strategies.pipeline.layer_check import (
    NamedGradients,
    all_close,
    different_gradients,
    gradients_of,
)
from distplat.strategies.pipeline.values import clone_tensors
from distplat.strategies.tensor.parallel_layers import lone_columns
from distplat.strategies.torch_compat import tree_map


class SlicingTrial:
    """
    Outputs of a rank's chunks before slicing, and the gradients of parameters that stay whole.

    Args:
        module: a rank's part of the model.
        chunks: of the part, by virtual stage; each a `rank_model.Chunk`.
        inputs: by virtual stage, the same on all slices.
        planned: names of the modules to slice.
    """

    def __init__(
        self,
        module: nn.Module,
        chunks: Mapping[int, Any],
        inputs: Mapping[int, Any],
        planned: Iterable[str],
    ) -> None:
        self._module, self._chunks, self._inputs = module, chunks, inputs
        sliced = tuple(f"{name}." for name in planned)
        self._whole = [n for n, _ in module.named_parameters() if not n.startswith(sliced)]
        self._expected: dict[tuple[int, bool], tuple[Any, NamedGradients]] = {}
        for virtual_stage, training in itertools.product(inputs, (False, True)):
            try:
                expected, again = (
                    self._run(virtual_stage, seed, training=training) for seed in (0, 1)
                )
            except Exception:  # the chunk rejects these inputs; training will report it
                continue
            if all_close(expected[0], again[0]):
                self._expected[virtual_stage, training] = expected

    def compare(self) -> None:
        """
        Run the sliced chunks and compare; called by all slices.

        Raises:
            SpecError: results differ, or the sliced chunks fail.
            CollectiveError: a rank is missing.
        """
        for (virtual_stage, training), (outputs, gradients) in self._expected.items():
            try:
                sliced_outputs, sliced_gradients = self._run(virtual_stage, 0, training=training)
            except DistplatError:
                raise
            except Exception as error:
                raise self._error(f"fail, and do not if whole: {error}") from error
            if not all_close(sliced_outputs, outputs):
                raise self._error("do not compute what whole ones do" + " in training" * training)
            differ = different_gradients(sliced_gradients, gradients)
            if differ:
                raise self._error(f"give {', '.join(differ)} a different gradient than whole ones")

    def _error(self, message: str) -> SpecError:
        text = f"sliced as `tensor_plan` says, layers {message}"
        lone = [f"{whole} as {split} is" for split, whole in lone_columns(self._module)]
        hint = f"split {', '.join(lone)}: they have the same inputs and sizes" if lone else ""
        default = (
            "between `colwise` and `rowwise` only element-wise operations without trained "
            "parameters are possible"
        )
        return SpecError(Problem(("strategy", "tensor_plan"), text, hint or default))

    @torch.enable_grad()
    def _run(self, virtual_stage: int, seed: int, *, training: bool) -> tuple[Any, NamedGradients]:
        """Return a chunk's outputs, and gradients of the parameters that stay whole."""
        chunk = self._chunks[virtual_stage]
        with preserve_state(chunk), WithoutDropout():
            chunk.set_mode(training=training)
            disable_dropout(chunk)
            outputs = chunk.run(clone_tensors(self._inputs[virtual_stage]), seed)
            named = dict(self._module.named_parameters())
            trained = {name: named[name] for name in self._whole if named[name].requires_grad}
            gradients = gradients_of(outputs, trained)
        return tree_map(_detached, outputs), gradients


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
