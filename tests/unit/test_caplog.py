"""What a test is shown of the log: not what threads say that an earlier test has left."""

import logging
import threading

import pytest


def test_threads_of_earlier_tests_are_not_heard(request: pytest.FixtureRequest) -> None:
    log, go = logging.getLogger(__name__), threading.Event()

    def speak_when_told() -> None:
        go.wait(60)
        log.warning("left")

    left = threading.Thread(target=speak_when_told)
    left.start()
    caplog: pytest.LogCaptureFixture = request.getfixturevalue("caplog")
    go.set()
    left.join(60)
    own = threading.Thread(target=log.warning, args=("own",))
    own.start()
    own.join(60)
    log.warning("here")
    assert caplog.messages == ["own", "here"]
