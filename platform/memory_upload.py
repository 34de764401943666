"""Uploads a file from memory to a run's URL, when the local disk cannot store it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait
from io import BytesIO
from itertools import count

from distplat.platform.disk import SETTING, run_in_thread
from distplat.platform.errors import StorageError
from distplat.platform.remote_storage import NoAnswer, RemoteStorage

_MAX_ATTEMPTS = 4
"""Failed attempts before giving up, if the storage responds."""


def upload_bytes(url: str, name: str, data: bytes, limit_s: float) -> None:
    """
    Upload a file from memory to a run's URL.

    It is retried while the storage accepts data, and for `limit_s` afterwards.

    Args:
        url: of the run's copy.
        name: of the file.
        data: its content.
        limit_s: `failure.storage_timeout_s`.

    Raises:
        StorageError: the upload failed.
    """
    storage, given_up, start = RemoteStorage(url, limit_s), threading.Event(), time.monotonic()

    def put() -> None:
        for failures in count(1):
            try:
                return storage.put(name, BytesIO(data), len(data))
            except StorageError:
                is_exhausted = failures >= _MAX_ATTEMPTS and time.monotonic() - start > limit_s
                if is_exhausted or given_up.wait(min(0.25 * 2 ** min(failures, 10), limit_s / 8)):
                    raise

    upload = run_in_thread("upload of one file", put)
    try:
        while not wait([upload], 0.05).done:
            if time.monotonic() - storage.answered_at > limit_s:
                raise NoAnswer(f"{url}/{name}: the storage does not answer (`{SETTING}`)")
    finally:
        given_up.set()
    upload.result()
