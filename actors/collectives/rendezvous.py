"""
How the ranks of a group find each other: words that they leave in Ray's key-value store.

    rank r                    Ray's key-value store            rank 0
    key "location/r" ----->  location/0 .. N-1     ------->   has all: writes the table,
    waits for the table  <--  locations             <-------   takes the words back

Rank 0 deletes the table once the group has formed: then everybody has read it. Who ends a run takes
all words of it back.
"""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import ray
import torch
import torch.distributed

from distplat.actors import ray_compat
from distplat.actors.collectives.shm.segment import shared_memory_works
from distplat.actors.messages import rendezvous_key
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.errors import CollectiveError, DeadlineExceeded, DistplatError
from distplat.platform.topology import RankLocation

GIVEN_UP = "this rank was told to give up"
_SHORTEST_LOOK_S, _LONGEST_LOOK_S = 0.001, 0.01


@dataclass(frozen=True)
class GroupSettings:
    """How the groups of one run behave; sub-groups have those of the group they are cut from."""

    operation_s: float = 60.0
    """Deadline of one operation."""
    rendezvous_s: float = 60.0
    """For the last rank to come: it may still be reading its data."""
    debug: bool = False
    """Compare every operation between the ranks, not only the first ones."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Once set, whoever waits in one of the groups, or for one to form, gives up."""
    setting: str = ""
    """Field of the job that `operation_s` is from."""

    @property
    def deadline(self) -> str:
        """Name the deadline of an operation, for errors."""
        changed = f" (`{self.setting}` changes it)" if self.setting else ""
        return f"deadline {self.operation_s:g} s{changed}"


@dataclass(frozen=True)
class GroupMember:
    """A rank of a group, as it comes to meet the others."""

    name: str
    """Name of the group: unique on the cluster."""
    rank: int
    world: int
    """Ranks in the group."""
    settings: GroupSettings = field(default_factory=GroupSettings)
    locations: tuple[RankLocation, ...] | None = None
    """Where the ranks are; None: they tell each other where that matters."""


def publish_address(group_name: str, value: bytes) -> None:
    """Leave what the other ranks need to find this group."""
    ray_compat.put(rendezvous_key(group_name), value)


def withdraw_address(group_name: str) -> None:
    """Delete what `publish_address` has left; once all have found it."""
    ray_compat.delete(rendezvous_key(group_name))


def find_address(group_name: str, settings: GroupSettings) -> bytes:
    """
    Wait for the word of rank 0.

    Raises:
        DeadlineExceeded: it did not come in `rendezvous_s`.
        CollectiveError: this rank was told to give up.
    """
    return wait_for(
        lambda: ray_compat.get(rendezvous_key(group_name)), group_name, lambda: (0,), settings
    )


def wait_for(
    look: Callable[[], bytes | None],
    group_name: str,
    missing: Callable[[], Sequence[int]],
    settings: GroupSettings,
) -> bytes:
    """
    Look until there is something, and give it.

    Raises:
        DeadlineExceeded: nothing came in `rendezvous_s`; names the workers that are missing.
        CollectiveError: this rank was told to give up.
    """
    clock = AwakeClock()
    while (waited := clock.now()) < settings.rendezvous_s:
        value = look()
        if value is not None:
            return value
        # Where all are there it takes milliseconds; many long waits must not keep Ray's store busy.
        if settings.abandoned.wait(min(max(waited / 20, _SHORTEST_LOOK_S), _LONGEST_LOOK_S)):
            raise CollectiveError(group_name, "rendezvous", 0, tuple(missing()), GIVEN_UP)
    raise DeadlineExceeded(
        f"rendezvous of group {group_name!r}",
        tuple(f"worker-{rank}" for rank in missing()),
        settings.rendezvous_s,
        "failure.start_timeout_s",
    )


def wait_for_all(
    group_name: str, absent: Callable[[], Sequence[int]], settings: GroupSettings
) -> None:
    """Wait until all ranks have come; raises as `wait_for`."""
    wait_for(lambda: None if absent() else b"", group_name, absent, settings)


def exchange_locations(member: GroupMember) -> tuple[RankLocation, ...]:
    """
    Tell the others where this rank is; give every rank's location.

    Raises:
        DeadlineExceeded: somebody did not come in `rendezvous_s`; names the workers.
        CollectiveError: this rank was told to give up.
    """
    if member.world == 1:
        return (location_of_this_process(),)
    key = _location_key(member.name, member.rank)
    own_location = json.dumps(asdict(location_of_this_process())).encode()
    ray_compat.put(key, own_location)
    try:
        if member.rank == 0:
            _publish_table(member)
        table = wait_for(
            lambda: ray_compat.get(_table_key(member.name)),
            member.name,
            lambda: _absent_ranks(member) or (0,),
            member.settings,
        )
    except DistplatError:
        ray_compat.delete(key)
        raise
    return tuple(RankLocation(**{**one, "gpus": tuple(one["gpus"])}) for one in json.loads(table))


def delete_locations(group_name: str) -> None:
    """Delete the table; for rank 0, once all have read it."""
    ray_compat.delete(_table_key(group_name))


def location_of_this_process() -> RankLocation:
    """Say where this process is, and what works there."""
    context = ray.get_runtime_context()
    whole_gpu = context.get_assigned_resources().get("GPU", 0) >= 1
    nccl = whole_gpu and torch.cuda.is_available() and torch.distributed.is_nccl_available()
    gpus = tuple(map(str, context.get_accelerator_ids().get("GPU", [])))
    return RankLocation(context.get_node_id(), nccl, shared_memory_works(), gpus)


def _publish_table(member: GroupMember) -> None:
    """Wait for the locations of all ranks, then write them as one table."""
    keys = [_location_key(member.name, rank) for rank in range(member.world)]

    def table() -> bytes | None:
        if _absent_ranks(member):
            return None
        entries = [ray_compat.get(key) for key in keys]
        present = [key for key in entries if key is not None]
        return b"[%s]" % b",".join(present) if len(present) == len(keys) else None

    complete = wait_for(table, member.name, lambda: _absent_ranks(member), member.settings)
    ray_compat.put(_table_key(member.name), complete)
    for key in keys:
        ray_compat.delete(key)


def _absent_ranks(member: GroupMember) -> tuple[int, ...]:
    """Give the ranks that have not said where they are."""
    keys = set(ray_compat.keys(rendezvous_key(f"{member.name}#location/")))
    return tuple(
        rank for rank in range(member.world) if _location_key(member.name, rank) not in keys
    )


def _location_key(group_name: str, rank: int) -> bytes:
    return rendezvous_key(f"{group_name}#location/{rank}")


def _table_key(group_name: str) -> bytes:
    return rendezvous_key(f"{group_name}#locations")
