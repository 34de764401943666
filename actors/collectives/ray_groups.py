"""
distplat's collective groups as groups of `ray.util.collective`.

A group is first formed and then registered with Ray, so `ray.util.collective` can use it as any
other group. distplat calls operations on the group itself: Ray's functions look the group up under
a lock, and write their options into a class that all threads share.
(docs/decisions/collective_groups.md)
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

_CLASSES = {
    "gloo": ("distplat.actors.collectives.torch_group", "TorchGroup"),
    "shm": ("distplat.actors.collectives.shm.shm_group", "ShmGroup"),
    "hierarchical": ("distplat.actors.collectives.hierarchical", "HierarchicalGroup"),
    "nccl": ("distplat.actors.collectives.torch_group", "NcclGroup"),
}
"""Module and class by backend; a module is imported on first use."""

_OPS = {
    types.ReduceOp.SUM: ReduceOp.SUM,
    types.ReduceOp.PRODUCT: ReduceOp.PRODUCT,
    types.ReduceOp.MIN: ReduceOp.MIN,
    types.ReduceOp.MAX: ReduceOp.MAX,
}

_formed: dict[str, CollectiveGroup] = {}  #: groups that are being registered with Ray
_settings: dict[str, GroupSettings] = {}  #: of groups that a call of Ray will create


def create_group(
    name: str,
    backend: str,
    rank: int,
    world: int,
    settings: GroupSettings,
    locations: tuple[RankLocation, ...] | None = None,
) -> CollectiveGroup:
    """
    Form a group; every rank calls this.

    Args:
        name: unique on the cluster.
        backend: `auto`, `gloo`, `shm`, `hierarchical` or `nccl`.
        rank: in the group.
        world: ranks in the group.
        settings: deadlines and abort event.
        locations: of the ranks; None: the ranks exchange them.

    Raises:
        SpecError: the backend does not work at the ranks' locations.
        DeadlineExceeded: a rank did not join within `settings.rendezvous_s`; names the workers.
        CollectiveError: the group broke while it formed, or `settings.abandoned` was set.
    """
    exchanges_locations = locations is None and backend != "gloo"  # gloo works anywhere
    if exchanges_locations:
        locations = exchange_locations(GroupMember(name, rank, world, settings))
    if backend == "auto" and locations is not None:
        choice = choose_backend(locations)
    else:
        choice = validate_backend(backend, locations or ())
    if rank == 0:
        logger.info("collective %s: %s (%s)", name, choice.backend, choice.why)
    group: CollectiveGroup = _group_class(choice.backend)(
        GroupMember(name, rank, world, settings, locations)
    )
    group.choice = choice
    group.make_subgroup = partial(_subgroup, group, backend, locations)
    _register_with_ray(group)
    if exchanges_locations and rank == 0:
        delete_locations(name)
    return group


def register(backend: str) -> str:
    """
    Register a backend with `ray.util.collective` in this process; idempotent.

    Returns:
        Ray's name of the backend.
    """
    name = f"DISTPLAT_{backend.upper()}"
    with suppress(ValueError):  # already registered: Ray has no public way to check
        cls = type(f"{backend.capitalize()}RayGroup", (RayGroup,), {"backend_name": backend})
        register_collective_backend(name, cls)
    return name


def prepare(group_name: str, settings: GroupSettings) -> None:
    """Set the deadlines of a group that `ray.util.collective` will create in this process."""
    _settings[group_name] = settings


class RayGroup(BaseGroup):  # type: ignore[misc]  # Ray is not typed
    """Adapter from the group interface of `ray.util.collective` to `CollectiveGroup`."""

    backend_name: ClassVar[str]

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        group = _formed.pop(group_name, None)
        if group is None:  # a call of Ray creates the group
            settings = _settings.pop(group_name, GroupSettings())
            member = GroupMember(group_name, rank, world_size, settings)
            group = _group_class(self.backend_name)(member)
        self.group: CollectiveGroup = group

    @classmethod
    def backend(cls) -> str:
        """Return Ray's name of this backend."""
        return f"DISTPLAT_{cls.backend_name.upper()}"

    @classmethod
    def check_backend_availability(cls) -> bool:
        """Return whether the backend works on this machine."""
        gloo, memory = torch_compat.gloo_available, shared_memory_works
        checks = {"gloo": [gloo], "shm": [memory], "hierarchical": [gloo, memory]}
        nccl = [torch_compat.nccl_available]
        return all(works() for works in checks.get(cls.backend_name, nccl))

    def destroy_group(self) -> None:
        """Leave the group; operations of its peers fail soon."""
        self.group.close()

    def allreduce(self, tensors: list[Tensor], allreduce_options: Any) -> None:
        """Reduce in place."""
        self.group.all_reduce(_tensor(tensors[0]), _OPS[allreduce_options.reduceOp])

    def reduce(self, tensors: list[Tensor], reduce_options: Any) -> None:
        """Reduce into the root's tensor."""
        op, root = _OPS[reduce_options.reduceOp], reduce_options.root_rank
        self.group.reduce(_tensor(tensors[0]), op, root)

    def broadcast(self, tensors: list[Tensor], broadcast_options: Any) -> None:
        """Copy the root's tensor to all ranks."""
        self.group.broadcast(_tensor(tensors[0]), broadcast_options.root_rank)

    def allgather(
        self, tensor_lists: list[list[Tensor]], tensors: list[Tensor], allgather_options: Any = None
    ) -> None:
        """Copy every rank's tensor to all ranks."""
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
        """Wait for all ranks."""
        self.group.barrier()


def _group_class(backend: str) -> Any:
    """Return the class of a backend's groups; its constructor takes a `GroupMember`."""
    module, name = _CLASSES[backend]
    return getattr(import_module(module), name)


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
    """Register a formed group with Ray; closing the group removes it."""
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
    """Return a tensor that shares the memory of a numpy array, or a tensor unchanged."""
    return array if isinstance(array, Tensor) else torch.from_numpy(array)
