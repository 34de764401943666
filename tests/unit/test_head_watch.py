"""A head that is gone is noticed before Ray ends the process for it, one that comes back is not."""

import socket

import pytest

from distplat.actors.head_watch import HeadWatch, listens
from distplat.platform.errors import ActorLost


class Head:
    """A head and a clock, both set by hand."""

    def __init__(self) -> None:
        self.there, self.now = True, 0.0

    def watch(self) -> HeadWatch:
        return HeadWatch("h:6379", lambda address: self.there, lambda: self.now)


def test_a_head_that_is_silent_for_too_long_ends_the_run() -> None:
    head = Head()
    watch = head.watch()
    head.there = False
    for head.now in (10, 20, 39):
        watch.probe()
        watch.check()
    head.now = 41
    watch.probe()
    assert watch.lost
    told = r"head .* at h:6379 for 40 s.*RAY_gcs_rpc_server_reconnect_timeout_s.*last checkpoint"
    with pytest.raises(ActorLost, match=told) as caught:
        watch.check()
    assert caught.value.exit_code == 4


def test_a_head_that_comes_back_is_welcome() -> None:
    head = Head()
    watch = head.watch()
    for head.now, head.there in ((30, False), (35, True), (70, False)):
        watch.probe()
    watch.check()


def test_nothing_is_ended_through_a_head_that_has_just_gone() -> None:
    head = Head()
    watch = head.watch()
    assert watch.answers()
    head.there = False
    assert not watch.answers() and not watch.lost
    watch.check()
    with pytest.raises(ActorLost, match="nothing listens at h:6379"):
        watch.require()


def test_it_is_sooner_than_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "30")
    head = Head()
    watch = head.watch()
    head.now = 21
    with pytest.raises(ActorLost, match="for 20 s"):
        watch.check()


@pytest.mark.parametrize("host", ["127.0.0.1", "[127.0.0.1]"])
def test_a_connection_shows_who_is_there(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{host}:{server.getsockname()[1]}"
        assert listens(address)
    assert not listens(address)
    assert not listens("no address")
