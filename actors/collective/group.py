"""
What our backends for `ray.util.collective` have in common: settings, accounts, rendezvous, abort.

Ray makes a backend's group from (world size, rank, name) alone, so whatever else a group must know
is left here under its name before. Words that ranks leave for each other lie in Ray's key-value
store; who ends a run takes all of them back.
"""

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.util.collective.backend_registry import register_collective_backend
from ray.util.collective.collective_group.base_collective_group import BaseGroup
from ray.util.collective.types import ReduceOp, SendOptions
from torch import Tensor

from distplat.actors.messages import rendezvous_key
from distplat.platform.errors import CollectiveError, DeadlineExceeded
from distplat.platform.topology import Place
from distplat.strategies.collective import Handle, Traffic

_SHORTEST_LOOK_S, _LONGEST_LOOK_S = 0.001, 0.01


@dataclass(frozen=True)
class Settings:
    """How the groups of one run behave; sub-groups have those of the group they are cut from."""

    operation_s: float = 60.0
    """Deadline of one operation."""
    rendezvous_s: float = 60.0
    """For the last rank to come: it may still be reading its data."""
    debug: bool = False
    """Compare every operation between the ranks, not only the first ones."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Once set, whoever waits in one of the groups, or for one to form, gives up."""


@dataclass(frozen=True)
class _Prepared:
    settings: Settings = field(default_factory=Settings)
    places: tuple[Place, ...] | None = None


_prepared: dict[str, _Prepared] = {}


def register(backend: str, kind: type["Group"]) -> None:
    """Make a backend known to Ray in this process; a second time does nothing."""
    with suppress(ValueError):  # registered before: Ray has no public way to ask
        register_collective_backend(backend, kind)


def prepare(group_name: str, settings: Settings, places: tuple[Place, ...] | None = None) -> None:
    """
    Leave what a group that is about to be made in this process must know.

    Args:
        group_name: as the group will be called.
        settings: how it behaves.
        places: where its ranks are; None: nobody has asked them yet.
    """
    _prepared[group_name] = _Prepared(settings, places)


class _Done:
    """A handle whose operation is over."""

    def wait(self) -> None:
        """Return at once."""


class Group(BaseGroup):  # type: ignore[misc]  # Ray is not typed
    """One rank's end of a group of ours (see Ray's `BaseGroup` for the blocking calls)."""

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        prepared = _prepared.pop(group_name, _Prepared())
        self.settings, self.places = prepared.settings, prepared.places
        self.traffic = Traffic()

    @abstractmethod
    def start_allreduce(self, tensor: Tensor, op: ReduceOp) -> Handle:
        """Begin to reduce in place, and go on; any number may be under way."""

    def start_send(self, tensor: Tensor, to: int) -> Handle:
        """Begin to send; here it is done when this returns, for `send` does not wait."""
        options = SendOptions()
        options.dst_rank, options.n_elements = to, tensor.numel()
        self.send([tensor], options)
        return _Done()

    def share(self, like: Tensor) -> Tensor:
        """Give zeros like `like`; see `Collective.share`."""
        return torch.zeros_like(like)

    @abstractmethod
    def abort(self) -> None:
        """Make whoever waits in this rank's operations fail soon; may be called by any thread."""


def leave_word(group_name: str, value: bytes) -> None:
    """Leave what the other ranks need to find this group."""
    _internal_kv_put(rendezvous_key(group_name), value, overwrite=True)


def find_word(group_name: str, from_rank: int, settings: Settings) -> bytes:
    """
    Wait for a word of rank `from_rank`.

    Raises:
        DeadlineExceeded: it did not come in `rendezvous_s`.
        CollectiveError: this rank was told to give up.
    """

    def look() -> bytes | None:
        found: bytes | None = _internal_kv_get(rendezvous_key(group_name))
        return found

    return wait_for(look, group_name, lambda: (from_rank,), settings)


def wait_for(
    look: Callable[[], bytes | None],
    group_name: str,
    missing: Callable[[], Sequence[int]],
    settings: Settings,
) -> bytes:
    """
    Look until there is something, and give it.

    Raises:
        DeadlineExceeded: nothing came in `rendezvous_s`; names the workers that are missing.
        CollectiveError: this rank was told to give up.
    """
    began = time.monotonic()
    while (waited := time.monotonic() - began) < settings.rendezvous_s:
        found = look()
        if found is not None:
            return found
        # Where all are there it takes milliseconds; many long waits must not keep Ray's store busy.
        if settings.abandoned.wait(min(max(waited / 20, _SHORTEST_LOOK_S), _LONGEST_LOOK_S)):
            cause = "this rank was told to give up"
            raise CollectiveError(group_name, "rendezvous", 0, tuple(missing()), cause)
    raise DeadlineExceeded(
        f"rendezvous of group {group_name!r}",
        tuple(f"worker-{rank}" for rank in missing()),
        settings.rendezvous_s,
        "failure.start_timeout_s",
    )
