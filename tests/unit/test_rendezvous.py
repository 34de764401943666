"""Ranks of a group tell each other where they are, by words in Ray's key-value store."""

from collections.abc import Iterator

import pytest

from distplat.actors import ray_compat
from distplat.actors.collectives import rendezvous
from distplat.actors.collectives.rendezvous import GroupMember, GroupSettings
from distplat.platform.errors import DeadlineExceeded


class Store(dict[bytes, bytes]):
    """The key-value store; a rank takes its word back right after everybody was seen."""

    fickle: bytes | None = None
    looks = 0

    def keys_of(self, prefix: bytes) -> list[bytes]:
        found = [key for key in self if key.startswith(prefix)]
        self.looks += 1
        if self.fickle is not None and self.looks == 1:
            del self[self.fickle]
        return found


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store()
    monkeypatch.setattr(ray_compat, "keys", store.keys_of)
    monkeypatch.setattr(ray_compat, "get", store.get)
    monkeypatch.setattr(ray_compat, "put", store.__setitem__)
    monkeypatch.setattr(ray_compat, "delete", lambda key: store.pop(key, None))
    yield store


def test_a_table_has_the_words_of_all(store: Store) -> None:
    for rank in range(3):
        store[rendezvous._location_key("g", rank)] = b'"%d"' % rank
    rendezvous._publish_table(GroupMember("g", 0, 3, GroupSettings(rendezvous_s=5.0)))
    assert store == {rendezvous._table_key("g"): b'["0","1","2"]'}


def test_a_word_that_is_taken_back_meanwhile_is_waited_for(store: Store) -> None:
    """Else the table would have a hole, and reading it would fail on all ranks."""
    for rank in range(3):
        store[rendezvous._location_key("g", rank)] = b'"%d"' % rank
    store.fickle = rendezvous._location_key("g", 2)
    with pytest.raises(DeadlineExceeded, match="missing: worker-2"):
        rendezvous._publish_table(GroupMember("g", 0, 3, GroupSettings(rendezvous_s=0.2)))
    assert rendezvous._table_key("g") not in store
