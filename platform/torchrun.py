"""
The environment that torchrun gives to each process of a script.

Names and meanings: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessLocation:
    """Where a process is to run."""

    node: str
    """The node's id."""
    host: str
    """Address at which other nodes reach it."""
    gpus: tuple[str, ...] = ()
    """Ids of the GPUs that are the process's own."""


@dataclass(frozen=True)
class TorchrunLaunch:
    """What all processes of one attempt share."""

    run: str
    """Name of the run."""
    port: int
    """Free on the node of rank 0."""
    restarts: int = 0
    """Attempts before this one."""
    max_restarts: int = 0


def ranks_of(locations: Sequence[ProcessLocation]) -> list[int]:
    """
    Number processes node by node, so that those of one node are neighbours.

    Returns:
        The rank of each process. Nodes come in the order in which they first appear.
    """
    nodes = list(dict.fromkeys(location.node for location in locations))
    order = sorted(range(len(locations)), key=lambda index: nodes.index(locations[index].node))
    ranks = [0] * len(locations)
    for rank, index in enumerate(order):
        ranks[index] = rank
    return ranks


def environments(
    locations: Sequence[ProcessLocation], launch: TorchrunLaunch
) -> list[dict[str, str]]:
    """
    Give the variables of each process, in the order of the locations.

    On a node with GPUs each process sees those of all of them, so that
    `torch.cuda.set_device(LOCAL_RANK)` is right.
    """
    ranks = ranks_of(locations)
    nodes = list(dict.fromkeys(location.node for location in locations))
    master = locations[ranks.index(0)].host
    variables = []
    for location, rank in zip(locations, ranks, strict=True):
        local = [index for index, other in enumerate(locations) if other.node == location.node]
        values = {
            "RANK": rank,
            "WORLD_SIZE": len(locations),
            "LOCAL_RANK": rank - min(ranks[index] for index in local),
            "LOCAL_WORLD_SIZE": len(local),
            "GROUP_RANK": nodes.index(location.node),
            "GROUP_WORLD_SIZE": len(nodes),
            "ROLE_RANK": rank,
            "ROLE_WORLD_SIZE": len(locations),
            "ROLE_NAME": "default",
            "MASTER_ADDR": master,
            "MASTER_PORT": launch.port,
            "TORCHELASTIC_RESTART_COUNT": launch.restarts,
            "TORCHELASTIC_MAX_RESTARTS": launch.max_restarts,
            "TORCHELASTIC_RUN_ID": launch.run,
            "TORCHELASTIC_USE_AGENT_STORE": False,  # rank 0 opens the store
        }
        gpus = sorted({gpu for index in local for gpu in locations[index].gpus}, key=_number)
        if gpus:
            values["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        variables.append({name: str(value) for name, value in values.items()})
    return variables


def _number(gpu: str) -> tuple[int, str]:
    return (int(gpu), gpu) if gpu.isdigit() else (-1, gpu)
