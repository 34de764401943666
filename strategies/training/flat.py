"""
A model whose trainable parameters lie in one flat vector, and whose gradients lie in another.

    model.layers[0].weight   .bias   pad  model.layers[1].weight  ...
    |------------------------|-------|--|------------------------|
    params [n]   views of it are the parameters: moving the vector moves the model
    grads  [n]   views of it are the gradients: backward adds into it, nothing is packed

So "push" hands over one vector, "all-reduce" reduces one, an optimizer updates one. Each tensor
starts on a cache line; the padding between is zero and stays zero under every optimizer we allow.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distplat.strategies.sparse.modules import dense_parameters

_ALIGN = 16
"""Elements: a multiple of a cache line for every dtype of 4 bytes and more."""


TORN = -1
"""Version of parameters that are in the middle of being replaced: good for nothing."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """First element in the flat vector."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


class FlatModel:
    """
    A model moved onto flat vectors.

    Args:
        model: on its device; its parameters are re-pointed, in place.

    Raises:
        ValueError: nothing to train, or trainable parameters of several dtypes or devices.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = [(name, p) for name, p in dense_parameters(model) if p.requires_grad]
        _check_uniform(named)
        self._parameters = [p for _, p in named]
        self.slots = _lay_out(named)
        last = self.slots[-1]
        size = last.offset + last.size
        self.params = named[0][1].new_zeros(size, requires_grad=False)
        for slot, parameter in zip(self.slots, self._parameters, strict=True):
            self._view(self.params, slot).copy_(parameter.detach())
        self.grads = torch.zeros_like(self.params)
        self.version = 0  #: updates that `params` has had; `TORN`: half replaced by another rank's
        self._point()

    @property
    def size(self) -> int:
        """Elements of the flat vectors, padding included."""
        return self.params.numel()

    def digest(self) -> str:
        """Fingerprint of names, shapes and dtype: equal on all ranks that train one model."""
        text = repr((self.slots, self.params.dtype))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def move(self, params: Tensor, grads: Tensor) -> None:
        """
        Go on in other vectors, of shape [n] and the same dtype; their content becomes the model's.

        Nothing is copied: whoever hands the vectors over has filled `params`.
        """
        self.params, self.grads = params, grads
        self._point()

    def _point(self) -> None:
        """Make parameters and gradients views of the present vectors."""
        for slot, parameter in zip(self.slots, self._parameters, strict=True):
            parameter.data = self._view(self.params, slot)
            parameter.grad = self._view(self.grads, slot)

    @staticmethod
    def _view(vector: Tensor, slot: Slot) -> Tensor:
        return vector[slot.offset : slot.offset + slot.size].view(slot.shape)


def _check_uniform(named: list[tuple[str, nn.Parameter]]) -> None:
    if not named:
        raise ValueError("the model has no trainable parameter")
    first_name, first = named[0]
    for name, p in named:
        if (p.dtype, p.device) != (first.dtype, first.device):
            raise ValueError(
                f"trainable parameters must share dtype and device: {first_name} is {first.dtype} "
                f"on {first.device}, {name} is {p.dtype} on {p.device}"
            )


def _lay_out(named: list[tuple[str, nn.Parameter]]) -> list[Slot]:
    slots, offset = [], 0
    for name, parameter in named:
        slots.append(Slot(name, tuple(parameter.shape), offset))
        offset += -(-parameter.numel() // _ALIGN) * _ALIGN
    return slots
