"""Tensors as the processor sees them: flat, and, if they live on a GPU, as a copy."""

import torch
from torch import Tensor

from distplat.actors.shm.header import supported


def on_host(tensor: Tensor) -> Tensor:
    """
    Give a contiguous tensor as a vector on the CPU: the same memory, or for CUDA a pinned copy.

    Raises:
        TypeError: tensors of this dtype cannot be exchanged.
        ValueError: the tensor is not contiguous.
    """
    if not supported(tensor.dtype):
        raise TypeError(f"shared memory takes no {tensor.dtype} tensors")
    if not tensor.is_contiguous():
        raise ValueError("a collective operation needs a contiguous tensor")
    flat = tensor.detach().view(-1)
    if tensor.is_cuda:
        copy = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        return copy.copy_(flat)
    return flat


def give_back(flat: Tensor, tensor: Tensor) -> None:
    """Bring a result that was made on the host to where the tensor lives."""
    if tensor.is_cuda:
        tensor.copy_(flat.view(tensor.shape))
