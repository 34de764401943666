"""
The gradients of a step as views of one vector, and which parameters have a gradient.

A parameter that no backward reached has no gradient, which differs from a zero gradient: torch's
optimizers skip the parameter, including momentum and weight decay. But its view of the vector
always exists. So each `.grad` is `view.data`, which shares the vector's memory and has its own
version counter: a backward has added to the gradient if and only if the version has changed.

    begin            the vector is zero, no parameter has a gradient
    forward, loss
    before_backward  changes of gradients by user code are undone or refused
    backward
    collect          `present` is updated; gradients outside of the vector are copied into it

Zeroing a large gradient and adding to it costs more memory traffic than copying the new one. Some
parameters therefore start a step with `.grad = None`, as after torch's `zero_grad`: autograd sets
`.grad` to its own tensor, a hook copies that tensor (`ready`), and the view is zeroed only where no
gradient arrived (`collect`, `zero_missing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_, ne

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.model.parameter_layout import is_finite

_GRAD = attrgetter("grad")
_VERSION = attrgetter("_version")


class Gradients:
    """
    Keeps the `.grad` of parameters in views of a vector.

    Args:
        names: of the parameters.
        parameters: in the same order.
        present: updated: by slot, whether a backward of this step produced a gradient.
        indices: the parameters' slots; None: the first slots, in order.
        owned: whether `.grad` stays autograd's own tensor and is never replaced by a view.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[nn.Parameter],
        present: NDArray[np.bool_],
        indices: Sequence[int] | None,
        *,
        owned: bool,
    ) -> None:
        self._owned = owned
        self.copied: dict[int, tuple[Tensor | None, int]] = {}
        """By index of an owned gradient: the tensor that `ready` copied, and its version."""
        self._names, self._parameters, self._present = names, parameters, present
        self._indices = np.arange(len(parameters)) if indices is None else np.array(indices)
        self._has = present[self._indices]
        self._check_finite = False
        self._finite: dict[int, int] = {}  #: versions of the views that `ready` found finite

    def bind_views(
        self, views: Sequence[Tensor], copied: Sequence[int], *, check_finite: bool
    ) -> None:
        """
        Use these views of the vector as gradients, one for each parameter and of its shape.

        Args:
            views: of the vector.
            copied: indices of the parameters that start a step without `.grad`; a hook calls
                `ready` for each of them in every backward that reaches it.
            check_finite: whether `ready` checks copied gradients for NaN and infinity. The check is
                cheap there: the copy has left the gradient in the processor's cache.
        """
        self._check_finite = check_finite
        self._views = [view.data for view in views]  # a version counter of its own
        self._first: list[Tensor | None] = [*self._views]  #: `.grad` at the start of a step
        self._copied = dict.fromkeys(copied)
        for index in copied:
            self._first[index] = None
        self._stale = False  #: whether the views of `_copied` hold an earlier step's gradients
        self._versions = self._read_versions()
        if self._owned:
            return
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def begin(self) -> None:
        """Start a step; the caller has zeroed the views, except those of `copied` parameters."""
        self._has[:] = self._present[:] = False
        self._finite.clear()
        for index in self._copied:
            self._parameters[index].grad = None
        self._stale = bool(self._copied)
        if not self._in_place(self._first):
            for parameter, grad in zip(self._parameters, self._first, strict=True):
                parameter.grad = grad

    def before_backward(self) -> None:
        """
        Ensure that the next backward adds to this step's gradients and to nothing else.

        Raises:
            SpecError: user code ran a backward of its own, or removed gradients of earlier
                micro-batches; names the parameter.
        """
        self._finite.clear()
        expected = self._first if self._stale else self._views
        if not self._in_place(expected):
            for index, grad in enumerate(map(_GRAD, self._parameters)):
                if grad is not expected[index]:
                    if grad is not None and _has_nonzero(grad):
                        raise _nested_backward_error(self._names[index])
                    self._parameters[index].grad = expected[index]
        versions = self._read_versions()
        if versions != self._versions:
            for index, (old, new) in enumerate(zip(self._versions, versions, strict=True)):
                if old != new:
                    self._check_untouched(index)
            self._versions = versions

    def collect(self) -> None:
        """
        Record which parameters the last backward gave a gradient.

        Raises:
            SpecError: user code removed gradients of earlier micro-batches; names the parameter.
        """
        self.zero_missing()
        if not self._in_place(self._views):
            for index, grad in enumerate(map(_GRAD, self._parameters)):
                if grad is not self._views[index]:
                    self._collect(index, grad)
        versions = self._read_versions()
        self._has |= np.fromiter(map(ne, versions, self._versions), np.bool_, len(versions))
        self._present[self._indices] = self._has
        self._versions = versions

    def zero_missing(self) -> None:
        """Zero the views that hold an earlier step's gradient; keep gradients of this step."""
        if not self._stale:
            return
        self._stale = False
        for index in self._copied:
            parameter, view = self._parameters[index], self._views[index]
            if parameter.grad is None:
                view.zero_()
                self._versions[index] = view._version  # zeroing does not count as a gradient
                parameter.grad = view

    def ready(self, index: int) -> None:
        """
        Copy the n-th parameter's finished gradient into the vector.

        Hooks call this in backward; `collect` later records which parameters have a gradient.
        """
        grad, view = self._parameters[index].grad, self._views[index]
        if grad is view:
            return
        if self._owned:
            _copy(view, grad)
            self.copied[index] = grad, -1 if grad is None else grad._version
        else:
            self._collect(index, grad)
        # On a GPU, reading the result would synchronize in the middle of backward.
        if self._check_finite and index in self._copied and grad is not None and grad.is_cpu:
            if grad.layout is torch.strided and is_finite(grad.detach()):
                self._finite[index] = view._version

    def is_copied(self, index: int) -> bool:
        """Return whether `ready` copied an owned gradient and it has not changed since."""
        grad = self._parameters[index].grad
        copied, version = self.copied.get(index, (grad, None))
        return version is not None and copied is grad and (grad is None or grad._version == version)

    def view(self, index: int) -> Tensor:
        """Return the n-th parameter's view of the vector."""
        return self._views[index]

    def finite(self, index: int) -> bool:
        """Return whether `ready` found the n-th gradient finite and it has not changed since."""
        return self._finite.get(index, -1) == self._views[index]._version

    def _in_place(self, grads: Sequence[Tensor | None]) -> bool:
        return all(map(is_, map(_GRAD, self._parameters), grads))

    def _read_versions(self) -> list[int]:
        return list(map(_VERSION, self._views))

    def _check_untouched(self, index: int) -> None:
        """Raise if a change of a gradient between two backwards makes the sum wrong."""
        if _has_nonzero(self._views[index]):
            raise _nested_backward_error(self._names[index])
        if self._has[index]:
            raise _lost_gradient_error(self._names[index])

    @torch.no_grad()
    def _collect(self, index: int, grad: Tensor | None) -> None:
        """
        Copy a gradient that is outside of the vector into its view, and set `.grad` to the view.

        Under `create_graph` torch replaces `.grad` by a new tensor that holds the whole sum.
        """
        view, name = self._views[index], self._names[index]
        if self._has[index] and (grad is None or not grad.requires_grad):
            raise _lost_gradient_error(name)
        if grad is None:
            old = self._stale and self._first[index] is None
            if old or view._version != self._versions[index]:
                view.zero_()
                self._versions[index] = view._version  # zeroing does not count as a gradient
        else:
            _copy(view, grad)
        self._parameters[index].grad = view


@torch.no_grad()
def _copy(view: Tensor, grad: Tensor | None) -> None:
    """Copy a gradient to its view; a missing one is zero."""
    if grad is None:
        view.zero_()
    else:
        view.copy_(grad.to_dense() if grad.layout is not torch.strided else grad)


def _has_nonzero(tensor: Tensor) -> bool:
    """Return whether an element is nonzero; NaN counts as nonzero."""
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return bool(dense.detach().count_nonzero())


def _nested_backward_error(name: str) -> SpecError:
    text = f"{name!r} had a gradient before backward: loss() or forward() ran a backward of its own"
    hint = "use torch.autograd.grad there: a gradient in `.grad` would count once on every worker"
    return SpecError(Problem(("task",), text, hint))


def _lost_gradient_error(name: str) -> SpecError:
    text = f"forward(), loss() or a hook took the gradient of {name!r} away between micro-batches"
    hint = "leave out the zero_grad(): each step begins with gradients of zero"
    return SpecError(Problem(("task",), text, hint))
