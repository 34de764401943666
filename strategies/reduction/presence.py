"""Which parameters have a gradient on any rank of a group."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from distplat.strategies.base import Collective
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.segments import typed


def sum_tail(flat: FlatModel, group: Collective) -> None:
    """Sum the gradients of parameters that were frozen at first, once one of them takes part."""
    if flat.active.any() and group.world > 1:
        for segment in flat.layout.segments:
            if segment.start >= flat.layout.tail:
                group.all_reduce(typed(flat.grads, segment.start, segment.stop, segment.dtype))


def agree_on_presence(flat: FlatModel, group: Collective, step: int) -> NDArray[np.bool_]:
    """
    Say which parameters have a gradient on any rank, and have them take part that are new.

    Args:
        flat: the model; the gradients of all but its tail are summed already.
        group: all ranks; each calls this.
        step: for messages.

    Returns:
        By slot, whether it has a gradient.
    """
    present = union_of(flat.present, group, flat)
    flat.activate_tail(present, step)
    sum_tail(flat, group)
    return present


def union_of(flags: NDArray[np.bool_], group: Collective, flat: FlatModel) -> NDArray[np.bool_]:
    """Say which of some flags are set on any rank."""
    if group.world == 1:
        return flags.copy()
    counts = torch.from_numpy(flags.astype(np.float32)).to(flat.params.device)
    group.all_reduce(counts)
    found: NDArray[np.bool_] = (counts > 0).cpu().numpy()
    return found
