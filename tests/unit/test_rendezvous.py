"""Ranks of a group exchange their addresses through Ray's key-value store."""

from collections.abc import Iterator

import pytest

from distplat.actors import ray_compat
from distplat.actors.collectives import rendezvous
from distplat.actors.collectives.rendezvous import GroupMember, GroupSettings
from distplat.platform.errors import DeadlineExceeded


class Store(dict[bytes, bytes]):
    """Key-value store; deletes the key `removed` after the first list of all keys."""

    removed: bytes | None = None
    calls = 0

    def keys_of(self, prefix: bytes) -> list[bytes]:
        found = [key for key in self if key.startswith(prefix)]
        self.calls += 1
        if self.removed is not None and self.calls == 1:
            del self[self.removed]
        return found


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store()
    monkeypatch.setattr(ray_compat, "keys", store.keys_of)
    monkeypatch.setattr(ray_compat, "get", store.get)
    monkeypatch.setattr(ray_compat, "put", store.__setitem__)
    monkeypatch.setattr(ray_compat, "delete", lambda key: store.pop(key, None))
    yield store


def test_table_has_the_addresses_of_all_ranks(store: Store) -> None:
    for rank in range(3):
        store[rendezvous._location_key("g", rank)] = b'"%d"' % rank
    rendezvous._publish_table(GroupMember("g", 0, 3, GroupSettings(rendezvous_s=5.0)))
    assert store == {rendezvous._table_key("g"): b'["0","1","2"]'}


def test_removed_address_is_waited_for(store: Store) -> None:
    """An incomplete table would be an error on all ranks."""
    for rank in range(3):
        store[rendezvous._location_key("g", rank)] = b'"%d"' % rank
    store.removed = rendezvous._location_key("g", 2)
    with pytest.raises(DeadlineExceeded, match="missing: worker-2"):
        rendezvous._publish_table(GroupMember("g", 0, 3, GroupSettings(rendezvous_s=0.2)))
    assert rendezvous._table_key("g") not in store
