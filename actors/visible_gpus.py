"""
GPUs visible to a train function: those of all workers on its node, as under torchrun.

    worker                       0      1           both then see 3,5
    assigned by Ray              3      5           LOCAL_RANK     0       1
    CUDA_VISIBLE_DEVICES         3      5           worker's GPU  cuda:0  cuda:1

So `torch.device(f"cuda:{LOCAL_RANK}")` is the worker's GPU, like the device of its context. CUDA
reads the variable once per process, at its first use. This module was tested by the value of the
variable only, not on a machine with several GPUs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch

from distplat.platform.topology import RankLocation, gpus_of_node

logger = logging.getLogger(__name__)

_VISIBLE = "CUDA_VISIBLE_DEVICES"

_own_index: list[int] = []
"""Index of this process's GPU among the visible ones; empty: only its own GPU is visible."""


def ask_without_cuda() -> None:
    """Let torch detect GPUs through NVML, which does not initialize CUDA."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def show_gpus(locations: Sequence[RankLocation], rank: int) -> None:
    """
    Make all GPUs of the node visible to this process; later attempts cannot change them.

    Args:
        locations: locations of all ranks, by rank.
        rank: rank of this process.
    """
    gpus = gpus_of_node(locations, rank)
    if not gpus:
        return
    index = gpus.index(locations[rank].gpus[0])
    if not _own_index and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        os.environ[_VISIBLE] = ",".join(gpus)
        _own_index.append(index)
    if _own_index != [index]:
        logger.warning(
            "LOCAL_RANK %d is not the number of this worker's GPU any more, as workers are "
            "elsewhere now: take the device from distplat.get_context().device",
            index,
        )


def own_device() -> torch.device:
    """Return the device of this worker, and make it the current device of this thread."""
    if not _own_index:
        return torch.device("cuda")
    visible = len(os.environ[_VISIBLE].split(","))
    if torch.cuda.device_count() != visible:
        logger.warning("CUDA was in use before: this worker sees its own GPU alone, cuda:0")
        return torch.device("cuda")
    device = torch.device("cuda", _own_index[0])
    torch.cuda.set_device(device)
    return device
