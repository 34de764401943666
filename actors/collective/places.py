"""
Before a group is made: every rank says where it is, and all learn of all.

    rank r                    Ray's key-value store            rank 0
    word "place/r"  ------->  place/0 .. place/N-1  ------->   has all: writes the table,
    waits for the table  <--  places                <-------   takes the words back

Rank 0 deletes the table once the group has formed: then everybody has read it.
"""

import importlib.util
import json
from dataclasses import asdict

import ray
import torch
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from distplat.actors.collective.group import Settings, wait_for
from distplat.actors.messages import rendezvous_key
from distplat.actors.shm.group import ShmGroup
from distplat.platform.errors import DistplatError
from distplat.platform.topology import Place


def meet(group_name: str, rank: int, world: int, settings: Settings) -> tuple[Place, ...]:
    """
    Tell the others where this rank is; give every rank's place.

    Raises:
        DeadlineExceeded: somebody did not come in `rendezvous_s`; names the workers.
        CollectiveError: this rank was told to give up.
    """
    if world == 1:
        return (here(),)
    word = _word(group_name, rank)
    _internal_kv_put(word, json.dumps(asdict(here())).encode(), overwrite=True)
    try:
        if rank == 0:
            _publish(group_name, world, settings)
        table = wait_for(
            lambda: _get(_table(group_name)),
            group_name,
            lambda: _absent(group_name, world) or (0,),
            settings,
        )
    except DistplatError:
        _internal_kv_del(word)
        raise
    return tuple(Place(**place) for place in json.loads(table))


def forget(group_name: str) -> None:
    """Take the table back; for rank 0, once all have it."""
    _internal_kv_del(_table(group_name))


def here() -> Place:
    """Say where this process is, and what works there."""
    context = ray.get_runtime_context()
    whole_gpu = context.get_assigned_resources().get("GPU", 0) >= 1
    nccl = whole_gpu and torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
    return Place(context.get_node_id(), nccl, ShmGroup.check_backend_availability())


def _publish(group_name: str, world: int, settings: Settings) -> None:
    """Wait for all words, then write them as one table."""

    def complete() -> bytes | None:
        return None if _absent(group_name, world) else b"complete"

    wait_for(complete, group_name, lambda: _absent(group_name, world), settings)
    words = [_get(_word(group_name, rank)) or b"" for rank in range(world)]
    _internal_kv_put(_table(group_name), b"[%s]" % b",".join(words), overwrite=True)
    for rank in range(world):
        _internal_kv_del(_word(group_name, rank))


def _absent(group_name: str, world: int) -> tuple[int, ...]:
    """Give the ranks that have not said where they are."""
    come = set(_internal_kv_list(rendezvous_key(f"{group_name}#place/")))
    return tuple(rank for rank in range(world) if _word(group_name, rank) not in come)


def _get(key: bytes) -> bytes | None:
    found: bytes | None = _internal_kv_get(key)
    return found


def _word(group_name: str, rank: int) -> bytes:
    return rendezvous_key(f"{group_name}#place/{rank}")


def _table(group_name: str) -> bytes:
    return rendezvous_key(f"{group_name}#places")
