"""
The environment variables that torchrun sets for each process of a script.

Names and meanings: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessLocation:
    """Placement of a process."""

    node: str
    """The node's id."""
    host: str
    """Address of the node for other nodes."""
    gpus: tuple[str, ...] = ()
    """Ids of the process's own GPUs."""


@dataclass(frozen=True)
class TorchrunLaunch:
    """Settings of one attempt, shared by all processes."""

    run: str
    """Name of the run."""
    port: int
    """A free port on the node of rank 0."""
    restarts: int = 0
    """Number of earlier attempts."""
    max_restarts: int = 0


def ranks_of(locations: Sequence[ProcessLocation]) -> list[int]:
    """
    Number processes node by node, so that the ranks of one node are consecutive.

    Returns:
        The rank of each process. Nodes are ordered by first appearance.
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
    """Return the variables of each process, in the order of the locations."""
    ranks = ranks_of(locations)
    by_rank = [locations[ranks.index(rank)] for rank in range(len(ranks))]
    return [variables_of(rank, by_rank, launch) for rank in ranks]


def variables_of(
    rank: int, locations: Sequence[ProcessLocation], launch: TorchrunLaunch
) -> dict[str, str]:
    """
    Return the variables of one process.

    On a node with GPUs each process sees the GPUs of all processes, so that
    `torch.cuda.set_device(LOCAL_RANK)` works.

    Args:
        rank: of the process.
        locations: in rank order.
        launch: settings of the attempt.
    """
    nodes = list(dict.fromkeys(location.node for location in locations))
    node = locations[rank].node
    local = [other for other, location in enumerate(locations) if location.node == node]
    values = {
        "RANK": rank,
        "WORLD_SIZE": len(locations),
        "LOCAL_RANK": local.index(rank),
        "LOCAL_WORLD_SIZE": len(local),
        "GROUP_RANK": nodes.index(node),
        "GROUP_WORLD_SIZE": len(nodes),
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": len(locations),
        "ROLE_NAME": "default",
        "MASTER_ADDR": locations[0].host,
        "MASTER_PORT": launch.port,
        "TORCHELASTIC_RESTART_COUNT": launch.restarts,
        "TORCHELASTIC_MAX_RESTARTS": launch.max_restarts,
        "TORCHELASTIC_RUN_ID": launch.run,
        "TORCHELASTIC_USE_AGENT_STORE": False,  # rank 0 opens the store
    }
    gpus = sorted({gpu for other in local for gpu in locations[other].gpus}, key=_number)
    if gpus:
        values["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    """Return a port of this node that is free now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
        return port


def _number(gpu: str) -> tuple[int, str]:
    return (int(gpu), gpu) if gpu.isdigit() else (-1, gpu)


ALONE = variables_of(0, [ProcessLocation("", "127.0.0.1")], TorchrunLaunch("check", 29500))
"""Variables of a single process, for code that reads them at import."""
