"""The fixture `caplog` of this directory."""

import logging
import threading

import pytest


def test_excludes_records_of_threads_of_earlier_tests(request: pytest.FixtureRequest) -> None:
    log, go = logging.getLogger(__name__), threading.Event()

    def log_after_go() -> None:
        go.wait(60)
        log.warning("earlier")

    earlier = threading.Thread(target=log_after_go)
    earlier.start()
    caplog: pytest.LogCaptureFixture = request.getfixturevalue("caplog")
    go.set()
    earlier.join(60)
    own = threading.Thread(target=log.warning, args=("own",))
    own.start()
    own.join(60)
    log.warning("here")
    assert caplog.messages == ["own", "here"]
