"""
Which GPUs a train function sees: those of all workers of its node, as a script under torchrun.

    worker                       0      1           both then see 3,5
    Ray gives it                 3      5           LOCAL_RANK     0       1
    CUDA_VISIBLE_DEVICES         3      5           its own GPU   cuda:0  cuda:1

So `torch.device(f"cuda:{LOCAL_RANK}")` is right, and so is the device of its context. CUDA reads
the variable once in a process, at its first use. No machine with several GPUs was at hand: this
was tested by the variable alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch

from distplat.platform.topology import RankLocation, gpus_of_node

logger = logging.getLogger(__name__)

_VISIBLE = "CUDA_VISIBLE_DEVICES"

_own: list[int] = []
"""The number of this process's GPU among those that it sees; empty: it sees its own alone."""


def ask_without_cuda() -> None:
    """Have torch ask the driver's library whether there is a GPU: CUDA itself stays unused."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def show_gpus(locations: Sequence[RankLocation], rank: int) -> None:
    """
    Have this process see the GPUs of its node; in later attempts it sees what it saw.

    Args:
        locations: of all ranks, in their order.
        rank: this one.
    """
    gpus = gpus_of_node(locations, rank)
    if not gpus:
        return
    number = gpus.index(locations[rank].gpus[0])
    if not _own and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        os.environ[_VISIBLE] = ",".join(gpus)
        _own.append(number)
    if _own != [number]:
        logger.warning(
            "LOCAL_RANK %d is not the number of this worker's GPU any more, as workers are "
            "elsewhere now: take the device from distplat.get_context().device",
            number,
        )


def own_device() -> torch.device:
    """Give the device of this worker, and make it the current one of this thread."""
    if not _own:
        return torch.device("cuda")
    visible = len(os.environ[_VISIBLE].split(","))
    if torch.cuda.device_count() != visible:
        logger.warning("CUDA was in use before: this worker sees its own GPU alone, cuda:0")
        return torch.device("cuda")
    device = torch.device("cuda", _own[0])
    torch.cuda.set_device(device)
    return device
