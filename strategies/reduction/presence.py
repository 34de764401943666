"""Which parameters have a gradient on any rank of a group."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from distplat.strategies.base import Collective


def union_of(
    present: NDArray[np.bool_], group: Collective, device: torch.device
) -> NDArray[np.bool_]:
    """
    Say which parameters have a gradient on any rank.

    Args:
        present: by parameter, on this rank; every rank has as many.
        group: all ranks; each calls this.
        device: on which the group works.
    """
    if group.world == 1:
        return present.copy()
    counts = torch.from_numpy(present.astype(np.float32)).to(device)
    group.all_reduce(counts)
    return (counts > 0).cpu().numpy()
