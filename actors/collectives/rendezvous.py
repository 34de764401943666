"""
Rendezvous of a group's ranks through entries of Ray's internal key-value store.

    rank r                    Ray's key-value store            rank 0
    puts "location/r"  ---->  location/0 .. N-1     ------->   reads all, writes the table,
    waits for the table  <--  locations             <-------   deletes the single locations

Rank 0 deletes the table once the group has formed: all ranks have read it by then. The end of a run
deletes all remaining entries of the run.
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
_MIN_POLL_S, _MAX_POLL_S = 0.001, 0.01


@dataclass(frozen=True)
class GroupSettings:
    """Settings of a run's groups; sub-groups share those of their parent group."""

    operation_s: float = 60.0
    """Deadline of one operation."""
    rendezvous_s: float = 60.0
    """Deadline for the last rank to join: it may still be reading its data."""
    debug: bool = False
    """Compare every operation between the ranks, not only the first ones."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Once set, all waits in these groups, and for groups to form, fail."""
    setting: str = ""
    """Field of the job that sets `operation_s`."""

    @property
    def deadline(self) -> str:
        """The deadline of an operation, as text for errors."""
        changed = f" (`{self.setting}` changes it)" if self.setting else ""
        return f"deadline {self.operation_s:g} s{changed}"


@dataclass(frozen=True)
class GroupMember:
    """A rank's parameters for the rendezvous of a group."""

    name: str
    """Name of the group: unique on the cluster."""
    rank: int
    world: int
    """Ranks in the group."""
    settings: GroupSettings = field(default_factory=GroupSettings)
    locations: tuple[RankLocation, ...] | None = None
    """Locations of the ranks; None: the ranks exchange them if the backend needs them."""


def publish_address(group_name: str, value: bytes) -> None:
    """Publish rank 0's address to the other ranks of a group."""
    ray_compat.put(rendezvous_key(group_name), value)


def withdraw_address(group_name: str) -> None:
    """Delete the published address, once all ranks have read it."""
    ray_compat.delete(rendezvous_key(group_name))


def find_address(group_name: str, settings: GroupSettings) -> bytes:
    """
    Wait for the address published by rank 0.

    Raises:
        DeadlineExceeded: rank 0 did not publish it within `rendezvous_s`.
        CollectiveError: `settings.abandoned` was set.
    """
    return wait_for(
        lambda: ray_compat.get(rendezvous_key(group_name)), group_name, lambda: (0,), settings
    )


def wait_for(
    poll: Callable[[], bytes | None],
    group_name: str,
    missing: Callable[[], Sequence[int]],
    settings: GroupSettings,
) -> bytes:
    """
    Call `poll` until it returns a value, and return the value.

    Raises:
        DeadlineExceeded: no value within `rendezvous_s`; names the missing workers.
        CollectiveError: `settings.abandoned` was set.
    """
    clock = AwakeClock()
    while (waited := clock.now()) < settings.rendezvous_s:
        value = poll()
        if value is not None:
            return value
        # A wait usually takes milliseconds; many long waits must not overload Ray's store.
        if settings.abandoned.wait(min(max(waited / 20, _MIN_POLL_S), _MAX_POLL_S)):
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
    """Wait until no rank is absent; raises as `wait_for`."""
    wait_for(lambda: None if absent() else b"", group_name, absent, settings)


def exchange_locations(member: GroupMember) -> tuple[RankLocation, ...]:
    """
    Publish this rank's location, and return the locations of all ranks.

    Raises:
        DeadlineExceeded: a rank did not join within `rendezvous_s`; names the workers.
        CollectiveError: `settings.abandoned` was set.
    """
    if member.world == 1:
        return (location_of_this_process(),)
    key = _location_key(member.name, member.rank)
    ray_compat.put(key, json.dumps(asdict(location_of_this_process())).encode())
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
    return tuple(RankLocation(**{**row, "gpus": tuple(row["gpus"])}) for row in json.loads(table))


def delete_locations(group_name: str) -> None:
    """Delete the table of locations; called by rank 0 once all ranks have read it."""
    ray_compat.delete(_table_key(group_name))


def location_of_this_process() -> RankLocation:
    """Return this process's node, its GPUs, and whether NCCL and shared memory work."""
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
        values = [ray_compat.get(key) for key in keys]
        locations = [value for value in values if value is not None]
        return b"[%s]" % b",".join(locations) if len(locations) == len(keys) else None

    complete = wait_for(table, member.name, lambda: _absent_ranks(member), member.settings)
    ray_compat.put(_table_key(member.name), complete)
    for key in keys:
        ray_compat.delete(key)


def _absent_ranks(member: GroupMember) -> tuple[int, ...]:
    """Return the ranks that have not published their location."""
    keys = set(ray_compat.keys(rendezvous_key(f"{member.name}#location/")))
    return tuple(
        rank for rank in range(member.world) if _location_key(member.name, rank) not in keys
    )


def _location_key(group_name: str, rank: int) -> bytes:
    return rendezvous_key(f"{group_name}#location/{rank}")


def _table_key(group_name: str) -> bytes:
    return rendezvous_key(f"{group_name}#locations")
