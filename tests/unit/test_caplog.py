"""The fixture `caplog` of this directory."""

import _thread
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


def test_includes_thread_with_identifier_of_foreign_thread(
    request: pytest.FixtureRequest,
) -> None:
    """A thread that Python did not start is listed by `threading` even after its end."""
    registered = threading.Event()
    identifiers = []

    def register() -> None:
        identifiers.append(threading.current_thread().ident)
        registered.set()

    _thread.start_new_thread(register, ())
    assert registered.wait(60)
    caplog: pytest.LogCaptureFixture = request.getfixturevalue("caplog")
    for _ in range(100):
        own = threading.Thread(target=logging.getLogger(__name__).warning, args=("own",))
        own.start()
        own.join(60)
        identifiers.append(own.ident)
        if own.ident == identifiers[0]:
            break
    assert identifiers[0] in identifiers[1:], "no thread has got the identifier"
    assert len(caplog.messages) == len(identifiers) - 1
