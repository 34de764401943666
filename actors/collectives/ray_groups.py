"""
Groups of ours as groups of `ray.util.collective`.

A group is formed first and registered with Ray afterwards, so it is Ray's group as any other. Its
operations are called on the group itself: Ray's own functions look it up under a lock, and write
their options into a class that all threads share. (docs/decisions/collective_groups.md)
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import ray.util.collective as rayc
import torch
from ray.util.collective import types
from ray.util.collective.backend_registry import register_collective_backend
from ray.util.collective.collective_group.base_collective_group import BaseGroup
from torch import Tensor

from distplat.actors.collectives.group import CollectiveGroup
from distplat.actors.collectives.rendezvous import (
    GroupMember,
    GroupSettings,
    delete_locations,
    exchange_locations,
)
from distplat.actors.collectives.shm.segment import shared_memory_works
from distplat.platform.topology import RankLocation, choose_backend, validate_backend
from distplat.strategies import torch_compat
from distplat.strategies.collective import ReduceOp

logger = logging.getLogger(__name__)

_KINDS = {
    "gloo": ("distplat.actors.collectives.torch_group", "TorchGroup"),
    "shm": ("distplat.actors.collectives.shm.shm_group", "ShmGroup"),
    "hierarchical": ("distplat.actors.collectives.hierarchical", "HierarchicalGroup"),
    "nccl": ("distplat.actors.collectives.torch_group", "NcclGroup"),
}
"""Module and class by name: only what is used is imported."""

_OPS = {
    types.ReduceOp.SUM: ReduceOp.SUM,
    types.ReduceOp.PRODUCT: ReduceOp.PRODUCT,
    types.ReduceOp.MIN: ReduceOp.MIN,
    types.ReduceOp.MAX: ReduceOp.MAX,
}

_formed: dict[str, CollectiveGroup] = {}
_settings: dict[str, GroupSettings] = {}


def create_group(
    name: str,
    backend: str,
    rank: int,
    world: int,
    settings: GroupSettings,
    locations: tuple[RankLocation, ...] | None = None,
) -> CollectiveGroup:
    """
    Form a group with the other ranks, which call this too.

    Args:
        name: unique on the cluster.
        backend: `auto`, `gloo`, `shm`, `hierarchical` or `nccl`.
        rank: in the group.
        world: ranks in the group.
        settings: deadlines, and how the group is given up.
        locations: where the ranks are; None: they tell each other.

    Raises:
        SpecError: the backend does not work where the ranks are.
        DeadlineExceeded: somebody did not come in `settings.rendezvous_s`; names the workers.
        CollectiveError: the group broke while it formed, or `settings.abandoned` was set.
    """
    asks = locations is None and backend != "gloo"  # gloo works anywhere
    if asks:
        locations = exchange_locations(GroupMember(name, rank, world, settings))
    if backend == "auto" and locations is not None:
        choice = choose_backend(locations)
    else:
        choice = validate_backend(backend, locations or ())
    if rank == 0:
        logger.info("collective %s: %s (%s)", name, choice.backend, choice.why)
    group: CollectiveGroup = _kind(choice.backend)(
        GroupMember(name, rank, world, settings, locations)
    )
    group.choice = choice
    group.make_subgroup = partial(_subgroup, group, backend, locations)
    _register_with_ray(group)
    if asks and rank == 0:
        delete_locations(name)
    return group


def register(backend: str) -> str:
    """
    Make a backend known to Ray in this process; a second time does nothing.

    Returns:
        The name under which `ray.util.collective` knows it.
    """
    name = f"DISTPLAT_{backend.upper()}"
    with suppress(ValueError):  # registered before: Ray has no public way to ask
        kind = type(f"{backend.capitalize()}RayGroup", (RayGroup,), {"kind": backend})
        register_collective_backend(name, kind)
    return name


def prepare(group_name: str, settings: GroupSettings) -> None:
    """Set the deadlines of a group that a function of Ray's is about to make in this process."""
    _settings[group_name] = settings


class RayGroup(BaseGroup):  # type: ignore[misc]  # Ray is not typed
    """Turns the functions of `ray.util.collective` into operations of a group of ours."""

    kind: ClassVar[str]

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        formed = _formed.pop(group_name, None)
        if formed is None:  # Ray's own function makes the group
            settings = _settings.pop(group_name, GroupSettings())
            formed = _kind(self.kind)(GroupMember(group_name, rank, world_size, settings))
        self.group: CollectiveGroup = formed

    @classmethod
    def backend(cls) -> str:
        """Name under which Ray knows this backend."""
        return f"DISTPLAT_{cls.kind.upper()}"

    @classmethod
    def check_backend_availability(cls) -> bool:
        """Whether the backend works on this machine."""
        gloo, memory = torch_compat.gloo_available, shared_memory_works
        needs = {"gloo": [gloo], "shm": [memory], "hierarchical": [gloo, memory]}
        return all(works() for works in needs.get(cls.kind, [torch_compat.nccl_available]))

    def destroy_group(self) -> None:
        """Leave; peers in an operation fail at once."""
        self.group.close()

    def allreduce(self, tensors: list[Tensor], allreduce_options: Any) -> None:
        """Reduce in place."""
        self.group.all_reduce(_tensor(tensors[0]), _OPS[allreduce_options.reduceOp])

    def reduce(self, tensors: list[Tensor], reduce_options: Any) -> None:
        """Reduce into the root's tensor."""
        op, root = _OPS[reduce_options.reduceOp], reduce_options.root_rank
        self.group.reduce(_tensor(tensors[0]), op, root)

    def broadcast(self, tensors: list[Tensor], broadcast_options: Any) -> None:
        """Copy the root's tensor to all."""
        self.group.broadcast(_tensor(tensors[0]), broadcast_options.root_rank)

    def allgather(
        self, tensor_lists: list[list[Tensor]], tensors: list[Tensor], allgather_options: Any = None
    ) -> None:
        """Copy every rank's tensor to all."""
        self.group.all_gather([_tensor(t) for t in tensor_lists[0]], _tensor(tensors[0]))

    def reducescatter(
        self, tensors: list[Tensor], tensor_lists: list[list[Tensor]], reducescatter_options: Any
    ) -> None:
        """Reduce the n-th tensors of all ranks into rank n's."""
        inputs = [_tensor(t) for t in tensor_lists[0]]
        op = _OPS[reducescatter_options.reduceOp]
        self.group.reduce_scatter(_tensor(tensors[0]), inputs, op)

    def send(self, tensors: list[Tensor], send_options: Any) -> None:
        """Send to one rank."""
        self.group.send(_tensor(tensors[0]), send_options.dst_rank)

    def recv(self, tensors: list[Tensor], recv_options: Any) -> None:
        """Receive from one rank."""
        self.group.recv(_tensor(tensors[0]), recv_options.src_rank)

    def barrier(self, barrier_options: Any = None) -> None:
        """Wait for all."""
        self.group.barrier()


def _kind(backend: str) -> Any:
    """Give the class of a backend's groups; called with a `GroupMember`."""
    module, kind = _KINDS[backend]
    return getattr(import_module(module), kind)


def _subgroup(
    group: CollectiveGroup,
    backend: str,
    locations: tuple[RankLocation, ...] | None,
    name: str,
    ranks: Sequence[int],
) -> CollectiveGroup:
    sub_rank = list(ranks).index(group.rank)
    sub_locations = None if locations is None else tuple(locations[rank] for rank in ranks)
    full_name = f"{group.name}/{name}"
    return create_group(full_name, backend, sub_rank, len(ranks), group.settings, sub_locations)


def _register_with_ray(group: CollectiveGroup) -> None:
    """Put a group that has formed into Ray's register, from which closing takes it out."""
    _formed[group.name] = group
    try:
        ray_name = register(group.choice.backend)
        rayc.init_collective_group(group.world, group.rank, ray_name, group.name)
    except BaseException:
        _formed.pop(group.name, None)
        group.close()
        raise
    group.on_close = partial(rayc.destroy_collective_group, group.name)


def _tensor(array: Any) -> Tensor:
    """Ray's users may bring numpy arrays; a tensor shares their memory."""
    return array if isinstance(array, Tensor) else torch.from_numpy(array)
