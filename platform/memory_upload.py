"""A file that goes to a run's URL from memory, for the local disk has not taken it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait
from io import BytesIO
from itertools import count

from distplat.platform.disk import SETTING, run_in_thread
from distplat.platform.errors import StorageError
from distplat.platform.remote_storage import NoAnswer, RemoteStorage

_MOST_FAILED = 4
"""Failed attempts after which it is given up, where the storage answers."""


def upload_bytes(url: str, name: str, data: bytes, limit_s: float) -> None:
    """
    Write a file that the local disk has not taken to a run's copy, from memory.

    It is tried again while the storage takes something, and `limit_s` longer.

    Args:
        url: of the copy.
        name: of the file.
        data: all of it.
        limit_s: `failure.storage_timeout_s`.

    Raises:
        StorageError: the storage has not taken it.
    """
    storage, given_up, began = RemoteStorage(url, limit_s), threading.Event(), time.monotonic()

    def put() -> None:
        for failures in count(1):
            try:
                return storage.put(name, BytesIO(data), len(data))
            except StorageError:
                hopeless = failures >= _MOST_FAILED and time.monotonic() - began > limit_s
                if hopeless or given_up.wait(min(0.25 * 2 ** min(failures, 10), limit_s / 8)):
                    raise

    upload = run_in_thread("upload of one file", put)
    try:
        while not wait([upload], 0.05).done:
            if time.monotonic() - storage.answered_at > limit_s:
                raise NoAnswer(f"{url}/{name}: the storage does not answer (`{SETTING}`)")
    finally:
        given_up.set()
    upload.result()
