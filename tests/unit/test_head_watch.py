"""Loss of the head node is detected before Ray terminates the process; a short outage is not."""

import socket

import pytest

from distplat.actors.head_watch import HeadWatch, listens
from distplat.platform.errors import ActorLost


class Head:
    """A fake head node and clock."""

    def __init__(self) -> None:
        self.is_up, self.now = True, 0.0

    def watch(self) -> HeadWatch:
        return HeadWatch("h:6379", lambda address: self.is_up, lambda: self.now)


def test_lost_head_ends_the_run() -> None:
    head = Head()
    watch = head.watch()
    head.is_up = False
    for head.now in (10, 20, 39):
        watch.probe()
        watch.check()
    head.now = 41
    watch.probe()
    assert watch.lost
    message = r"head .* at h:6379 for 40 s.*RAY_gcs_rpc_server_reconnect_timeout_s.*last checkpoint"
    with pytest.raises(ActorLost, match=message) as caught:
        watch.check()
    assert caught.value.exit_code == 4


def test_head_may_come_back() -> None:
    head = Head()
    watch = head.watch()
    for head.now, head.is_up in ((30, False), (35, True), (70, False)):
        watch.probe()
    watch.check()


def test_require_fails_at_once_without_the_head() -> None:
    head = Head()
    watch = head.watch()
    assert watch.answers()
    head.is_up = False
    assert not watch.answers() and not watch.lost
    watch.check()
    with pytest.raises(ActorLost, match="nothing listens at h:6379"):
        watch.require()


def test_timeout_is_shorter_than_that_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "30")
    head = Head()
    watch = head.watch()
    head.now = 21
    with pytest.raises(ActorLost, match="for 20 s"):
        watch.check()


@pytest.mark.parametrize("host", ["127.0.0.1", "[127.0.0.1]"])
def test_listens_detects_a_server(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{host}:{server.getsockname()[1]}"
        assert listens(address)
    assert not listens(address)
    assert not listens("no address")
