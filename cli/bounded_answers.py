"""
HTTP requests with a total deadline and a size limit, for servers that are not trusted.

The timeouts of `requests` apply to a single read or write. A server that sends one byte at a time
meets them forever, also while it sends headers, before any of our code can run. Hence a thread
sends the request, and the caller waits for the thread with a deadline.
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

MIN_BYTES_PER_S = 100_000
"""Minimum transfer rate: the deadline grows by a second for this number of bytes."""
_CHUNK_BYTES = 2**16
_NAMED_BY = "`--address`, RAY_API_SERVER_ADDRESS or RAY_ADDRESS names it"
_CONNECT_S = 5.0


@dataclass(frozen=True)
class AnswerLimits:
    """Limits of one response."""

    answer_s: float
    """Deadline; a second is added for every `MIN_BYTES_PER_S` bytes sent or received."""
    max_bytes: int
    """Maximum size of the decompressed response."""


class _TooLarge(Exception):
    """The response exceeds its size limit."""


class _ResponseReader:
    """Hook of `requests` that reads the response body up to a size limit."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.received = 0
        self.cancelled = threading.Event()

    def __call__(self, response: requests.Response, *args: Any, **kwargs: Any) -> None:
        """Read the response; see the hook `response` of `requests`."""
        content = io.BytesIO()
        for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=True):
            self.received += len(chunk)
            if self.received > self._max_bytes:
                response.close()
                raise _TooLarge
            if self.cancelled.is_set():
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
    Send a request and read the complete response.

    Args:
        send: called with a method, a path and the keywords of `requests.request`.
        address: address of the server, for error messages.
        method: HTTP method.
        endpoint: path of the URL.
        limits: limits of the response.
        kwargs: further keywords of `send`; `data` may be bytes.

    Raises:
        ClusterUnreachable: the server sends no response, or one that is too slow or too large.
    """
    sent = len(kwargs.get("data") or b"")
    reader = _ResponseReader(limits.max_bytes)
    # `requests` applies the connect timeout to sending the whole body.
    kwargs["timeout"] = (_CONNECT_S + sent / MIN_BYTES_PER_S, limits.answer_s)
    kwargs |= {"stream": True, "hooks": {"response": reader}}
    if is_this_machine(host_and_port(address)[0]):
        kwargs["proxies"] = {"no_proxy": "*"}  # a proxy would see the token and not reach localhost
    started = time.monotonic()
    response = run_in_thread("request", lambda: send(method, endpoint, **kwargs))
    try:
        while not response.done():
            limit_s = limits.answer_s + (sent + reader.received) / MIN_BYTES_PER_S
            left_s = started + limit_s - time.monotonic()
            if left_s <= 0:
                raise _unreachable(address, f"sent no complete response within {limit_s:.0f} s")
            wait([response], left_s)
        return response.result()
    except _TooLarge:
        raise _unreachable(address, f"sends more than {limits.max_bytes // 2**20} MiB") from None
    except (requests.Timeout, urllib3.exceptions.TimeoutError):
        raise _unreachable(address, "accepted a connection but sent no response") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _unreachable(address, f"broke the connection ({type(error).__name__})") from None
    finally:
        reader.cancelled.set()


def _unreachable(address: str, what: str) -> ClusterUnreachable:
    return ClusterUnreachable(f"{address} {what}; is it a Ray dashboard? {_NAMED_BY}")
