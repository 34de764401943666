"""
Slices of a pipeline's chunks, tried before the first step: they give what whole layers give.

    whole      evaluation, training without dropout     outputs, gradients of what stays whole
    sliced     the same, all slices together            compared

A parameter that stays whole and is used between split layers gets a part of its gradient on each
slice. So does what looks at all columns in training alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distplat.platform.errors import DistplatError, Problem, SpecError
from distplat.strategies.model.trials import WithoutDropout, stop_dropping, untouched
from distplat.strategies.pipeline.layer_check import (
    NamedGradients,
    alike,
    gradients_of,
    other_gradients,
)
from distplat.strategies.pipeline.values import copied
from distplat.strategies.tensor.parallel_layers import lone_columns
from distplat.strategies.torch_compat import tree_map


class SlicingTrial:
    """
    What chunks give while their layers are whole, and the gradients of what stays so.

    Args:
        module: what a rank has of the model.
        chunks: of it, by virtual stage; each a `rank_model.Chunk`.
        inputs: by virtual stage, the same on all slices.
        planned: names of the modules that are to be sliced.
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
            except Exception:  # such inputs are not for evaluation; in training it comes again
                continue
            if alike(expected[0], again[0]):
                self._expected[virtual_stage, training] = expected

    def compare(self) -> None:
        """
        Run the chunks again, sliced; every rank of the slices calls this.

        Raises:
            SpecError: they give something else, or fail.
            CollectiveError: a rank is missing.
        """
        for (virtual_stage, training), (outputs, gradients) in self._expected.items():
            try:
                sliced_outputs, sliced_gradients = self._run(virtual_stage, 0, training=training)
            except DistplatError:
                raise
            except Exception as error:
                raise self._sliced(f"fail where they do not whole: {error}") from error
            if not alike(sliced_outputs, outputs):
                raise self._sliced("compute otherwise than whole" + " in training" * training)
            differ = other_gradients(sliced_gradients, gradients)
            if differ:
                raise self._sliced(f"give {', '.join(differ)} another gradient than whole")

    def _sliced(self, what: str) -> SpecError:
        text = f"sliced as `tensor_plan` says, layers {what}"
        lone = [f"{whole} as {split} is" for split, whole in lone_columns(self._module)]
        hint = f"split {', '.join(lone)}: they have the same inputs and sizes" if lone else ""
        each = (
            "between `colwise` and `rowwise` each element must be computed by itself, and nothing "
            "be trained"
        )
        return SpecError(Problem(("strategy", "tensor_plan"), text, hint or each))

    @torch.enable_grad()
    def _run(self, virtual_stage: int, seed: int, *, training: bool) -> tuple[Any, NamedGradients]:
        """Give outputs, and the gradients of some sum of them, of what is whole on all slices."""
        chunk = self._chunks[virtual_stage]
        with untouched(chunk), WithoutDropout():
            chunk.set_mode(training=training)
            stop_dropping(chunk)
            outputs = chunk.run(copied(self._inputs[virtual_stage]), seed)
            named = dict(self._module.named_parameters())
            trained = {name: named[name] for name in self._whole if named[name].requires_grad}
            gradients = gradients_of(outputs, trained)
        return tree_map(_detached, outputs), gradients


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
