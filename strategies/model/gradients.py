"""
The gradients of a step as views of one vector, and which parameters got one at all.

A parameter that no backward reached has no gradient, which is not the same as a gradient of zero:
torch's optimizers let it rest, with its momentum and its weight decay. But a view of the vector is
always there. So each `.grad` is `view.data`, which shares the vector's memory and counts its own
changes: a backward has added to it if, and only if, its version has moved.

    begin        vector zero, nobody has a gradient
    forward, loss
    before       what user code did to gradients so far is undone, or refused
    backward
    take_in      who has a gradient now; whatever torch or user code put elsewhere is in the vector

Setting a large gradient to zero and adding to it costs more memory traffic than copying the new
one. Some parameters may therefore begin a step with `.grad = None`, as after torch's `zero_grad`:
autograd hands over the tensor that it has made, a hook copies it (`ready`), and the view is set to
zero only where no gradient came (`collect`, `zero_missing`).
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
    Keeps the `.grad` of some parameters in views of a vector.

    Args:
        names: of the parameters.
        parameters: in the same order.
        present: written to: by slot, whether a backward of this step has given it a gradient.
        indices: the parameters' slots; None: the first ones, in order.
        owned: whether `.grad` is never put elsewhere, see the top of the file.
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
        """Of owned gradients: which one `ready` has copied, and its version then."""
        self._names, self._parameters, self._present = names, parameters, present
        self._indices = np.arange(len(parameters)) if indices is None else np.array(indices)
        self._has = present[self._indices]
        self._looks = False
        self._finite: dict[int, int] = {}  #: versions of the views that `ready` saw to be finite

    def point(self, views: Sequence[Tensor], copied: Sequence[int], *, looks: bool) -> None:
        """
        Go on in these views, one for each parameter and of its shape.

        Args:
            views: of the vector.
            copied: which parameters begin a step without `.grad`, the n-th ones; a hook calls
                `ready` for each of them in every backward that reaches it.
            looks: whether `ready` looks for NaN and infinity in those that it copies. It is quick
                there: the copy has left the gradient in the processor's cache.
        """
        self._looks = looks
        self._views = [view.data for view in views]  # a version counter of its own
        self._first: list[Tensor | None] = [*self._views]  #: `.grad` as a step begins
        self._copied = dict.fromkeys(copied)
        for index in copied:
            self._first[index] = None
        self._stale = False  #: whether the views of `_copied` hold an earlier step's gradients
        self._versions = self._read()
        if self._owned:
            return
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def begin(self) -> None:
        """Begin a step; the views are zero, but those of parameters without `.grad`."""
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
        Make sure that the backward to come adds to this step's gradients and to nothing else.

        Raises:
            SpecError: there are gradients that no backward of the engine has made, or gradients of
                earlier micro-batches are gone; names the parameter.
        """
        self._finite.clear()
        wanted = self._first if self._stale else self._views
        if not self._in_place(wanted):
            for index, grad in enumerate(map(_GRAD, self._parameters)):
                if grad is not wanted[index]:
                    if grad is not None and _any(grad):
                        raise _own_backward(self._names[index])
                    self._parameters[index].grad = wanted[index]
        now = self._read()
        if now != self._versions:
            for index, (was, version) in enumerate(zip(self._versions, now, strict=True)):
                if was != version:
                    self._check_untouched(index)
            self._versions = now

    def collect(self) -> None:
        """
        Note which parameters the backward just over gave a gradient.

        Raises:
            SpecError: gradients of earlier micro-batches are gone; names the parameter.
        """
        self.zero_missing()
        if not self._in_place(self._views):
            for index, grad in enumerate(map(_GRAD, self._parameters)):
                if grad is not self._views[index]:
                    self._collect(index, grad)
        now = self._read()
        self._has |= np.fromiter(map(ne, now, self._versions), np.bool_, len(now))
        self._present[self._indices] = self._has
        self._versions = now

    def zero_missing(self) -> None:
        """Set views to zero that have no gradient of this step; nothing of this step is lost."""
        if not self._stale:
            return
        self._stale = False
        for index in self._copied:
            parameter, view = self._parameters[index], self._views[index]
            if parameter.grad is None:
                view.zero_()
                self._versions[index] = view._version  # no gradient, as torch's None
                parameter.grad = view

    def ready(self, index: int) -> None:
        """
        Have one parameter's gradient in the vector, the n-th's; a backward has finished it.

        Called in backward, for each parameter: `collect` notes later who has a gradient.
        """
        grad, view = self._parameters[index].grad, self._views[index]
        if grad is view:
            return
        if self._owned:
            _copy(view, grad)
            self.copied[index] = grad, -1 if grad is None else grad._version
        else:
            self._collect(index, grad)
        # On a GPU the answer would be waited for in the middle of backward.
        if self._looks and index in self._copied and grad is not None and grad.is_cpu:
            if grad.layout is torch.strided and is_finite(grad.detach()):
                self._finite[index] = view._version

    def is_copied(self, index: int) -> bool:
        """Say whether `ready` was called for an owned gradient and nobody has changed it since."""
        grad = self._parameters[index].grad
        copied, version = self.copied.get(index, (grad, None))
        return version is not None and copied is grad and (grad is None or grad._version == version)

    def view(self, index: int) -> Tensor:
        """Give the n-th parameter's view of the vector."""
        return self._views[index]

    def finite(self, index: int) -> bool:
        """Say whether `ready` has seen that the n-th's gradient is finite, and none came since."""
        return self._finite.get(index, -1) == self._views[index]._version

    def _in_place(self, grads: Sequence[Tensor | None]) -> bool:
        return all(map(is_, map(_GRAD, self._parameters), grads))

    def _read(self) -> list[int]:
        return list(map(_VERSION, self._views))

    def _check_untouched(self, index: int) -> None:
        """See whether a change of a gradient between two backwards does harm."""
        any_left, had = _any(self._views[index]), self._has[index]
        if any_left:
            raise _own_backward(self._names[index])
        if had:
            raise _lost(self._names[index])

    @torch.no_grad()
    def _collect(self, index: int, grad: Tensor | None) -> None:
        """
        Put the gradient that is elsewhere now into the view, and the view in its place.

        Where torch puts one elsewhere, under `create_graph`, it is the whole sum so far.
        """
        view, name = self._views[index], self._names[index]
        if self._has[index] and (grad is None or not grad.requires_grad):
            raise _lost(name)
        if grad is None:
            old = self._stale and self._first[index] is None
            if old or view._version != self._versions[index]:
                view.zero_()
                self._versions[index] = view._version  # as torch: it has none
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


def _any(tensor: Tensor) -> bool:
    """Say whether an element is not zero; NaN is not."""
    dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return bool(dense.detach().count_nonzero())


def _own_backward(name: str) -> SpecError:
    text = f"{name!r} had a gradient before backward: loss() or forward() ran a backward of its own"
    hint = "use torch.autograd.grad there: a gradient in `.grad` would count once on every worker"
    return SpecError(Problem(("task",), text, hint))


def _lost(name: str) -> SpecError:
    text = f"forward(), loss() or a hook took the gradient of {name!r} away between micro-batches"
    hint = "leave out the zero_grad(): each step begins with gradients of zero"
    return SpecError(Problem(("task",), text, hint))
