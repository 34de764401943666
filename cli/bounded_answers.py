"""
Answers over HTTP of a server that may be nobody's friend: none takes for ever, none fills memory.

The deadlines of `requests` are of one read or write. A server that sends a byte now and then meets
them all, and so it does before the first byte of an answer's body, where nobody could look at it.
Hence a thread asks, and who waits for it looks at the clock.
"""

import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import requests
import urllib3

from distplat.cli.address import host_and_port, is_this_machine
from distplat.platform.disk import run_in_thread
from distplat.platform.errors import ClusterUnreachable

SLOWEST = 100_000
"""Bytes a second: what is sent or received faster has more time than `answer_s`."""
_CHUNK_BYTES = 2**16
_NAMED_BY = "`--address`, RAY_API_SERVER_ADDRESS or RAY_ADDRESS names it"
_CONNECT_S = 5.0


@dataclass(frozen=True)
class AnswerLimits:
    """What one answer may take."""

    answer_s: float
    """Until it is there, and a second more for every `SLOWEST` bytes on their way."""
    most_bytes: int
    """The most bytes of an answer, when it is unpacked."""


class _TooLarge(Exception):
    """There is more of an answer than was allowed."""


class _Answer:
    """Reads a response where `requests` hands it out, before anybody else does."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self.received = 0
        self.given_up = threading.Event()

    def __call__(self, response: requests.Response, *args: Any, **kwargs: Any) -> None:
        """See the hook `response` of `requests`."""
        content = io.BytesIO()
        for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=True):
            self.received += len(chunk)
            if self.received > self._most:
                response.close()
                raise _TooLarge
            if self.given_up.is_set():
                response.close()
                return
            content.write(chunk)
        response.raw.close()
        content.seek(0)
        response.raw = content


def request(
    send: Callable[..., requests.Response],
    address: str,
    method: str,
    endpoint: str,
    limits: AnswerLimits,
    **kwargs: Any,
) -> requests.Response:
    """
    Send a request and read the answer, all of it.

    Args:
        send: takes a method, a path and the keywords of `requests.request`.
        address: of the server, for errors.
        method: of HTTP.
        endpoint: path.
        limits: of the answer.
        kwargs: more for `send`; `data` may be bytes.

    Raises:
        ClusterUnreachable: there is no answer, or it is too slow or too large.
    """
    sent = len(kwargs.get("data") or b"")
    answer = _Answer(limits.most_bytes)
    # While a body is sent, `requests` has the deadline of connecting for all of it.
    kwargs["timeout"] = (_CONNECT_S + sent / SLOWEST, limits.answer_s)
    kwargs |= {"stream": True, "hooks": {"response": answer}}
    if is_this_machine(host_and_port(address)[0]):
        kwargs["proxies"] = {"no_proxy": "*"}  # it would hear the token, and not find the server
    began = time.monotonic()
    done = run_in_thread("request", lambda: send(method, endpoint, **kwargs))
    try:
        while not done.done():
            limit_s = limits.answer_s + (sent + answer.received) / SLOWEST
            left_s = began + limit_s - time.monotonic()
            if left_s <= 0:
                raise _unreachable(address, f"gave no whole answer within {limit_s:.0f} s")
            wait([done], left_s)
        return done.result()
    except _TooLarge:
        raise _unreachable(address, f"sends more than {limits.most_bytes // 2**20} MiB") from None
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise _unreachable(address, "took a connection but gave no answer") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _unreachable(address, f"broke off ({type(error).__name__})") from None
    finally:
        answer.given_up.set()


def _unreachable(address: str, what: str) -> ClusterUnreachable:
    return ClusterUnreachable(f"{address} {what}; is it a Ray dashboard? {_NAMED_BY}")
