"""
Ray's job API, for the commands that need it: importing this imports Ray.

Ray's `JobSubmissionClient` is kept for what it does well, packing and uploading; around it stand
deadlines, which it has not, and errors that say what to do.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import requests
from ray import __version__ as ray_version
from ray.job_submission import JobSubmissionClient

from distplat.actors import ray_compat
from distplat.actors.ray_token import check_token
from distplat.cli import bounded_answers
from distplat.cli.address import (
    VERSION_KEY,
    Info,
    NoSuchJob,
    check_listening,
    foreign_listener,
    one_line,
    token_at_hand,
    unset,
)
from distplat.cli.bounded_answers import AnswerLimits
from distplat.cli.versions import Versions
from distplat.platform.errors import ClusterUnreachable, SpecError

OURS = Versions(ray_version, ".".join(map(str, sys.version_info[:3])))
_ANSWER_S = 30.0
_FIRST_ANSWER_S = 4.0
_MOST_BYTES = 64 * 2**20
"""The most bytes of an answer. A list of jobs has what each was given: up to 50 kB of ours."""
_MOST_LOG_BYTES = 2**30
"""The most bytes of a job's log, of which Ray's job API gives all or nothing."""
_FAILED = re.compile(r"status code 5\d\d\b")
"""Ray's client's words for a fault of the cluster; what the user has to mend it answers by 400."""
_STOPPED_EXIT_CODE = 143
"""A driver of ours exits so when it is asked to end; Ray calls only that STOPPED which it ends."""
_NEEDS_TOKEN = "set RAY_AUTH_TOKEN, or RAY_AUTH_MODE=token with the token in ~/.ray/auth_token"
_NOT_SENT = (
    "requires a token, and none was sent ({}): set RAY_AUTH_MODE=token if RAY_AUTH_TOKEN or "
    "~/.ray/auth_token is that cluster's"
)


def _request(
    client: Any, send: Callable[..., requests.Response], method: str, endpoint: str, **kwargs: Any
) -> requests.Response:
    """
    Send one request of a client, with limits and our errors.

    Raises:
        ClusterUnreachable: no answer, too much of it, or it does not take our token.
    """
    address = client.get_address()
    most = _MOST_LOG_BYTES if endpoint.endswith("/logs") else _MOST_BYTES
    limits = AnswerLimits(client.answer_s, most)
    try:
        return bounded_answers.request(send, address, method, endpoint, limits, **kwargs)
    except ray.exceptions.AuthenticationError as error:
        if "Authentication failed" in str(error):
            message = f"{address} does not accept our token; {_NEEDS_TOKEN}"
            raise ClusterUnreachable(message) from None
        raise _TokenRequired(f"{address} requires a token: {_NEEDS_TOKEN}") from None


_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What Ray's client raises at JSON of another shape than it expects."""
_Client = ray_compat.with_requests(JobSubmissionClient, _request)
_Client.answer_s = _FIRST_ANSWER_S


class _TokenRequired(ClusterUnreachable):
    """The cluster asked for a token and we sent none."""


class Jobs:
    """
    The job API of one cluster.

    Args:
        address: its URL.

    Raises:
        ClusterUnreachable: it cannot be reached, is no Ray, or refuses our token.
        SpecError: the user's token cannot be sent.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        check_listening(address)
        check_token(Path.home(), os.environ)
        try:
            self._client = _connect(address, {})
        except _TokenRequired:
            token = token_at_hand(address, os.environ)
            if token is None:
                foreign = foreign_listener(address)
                if foreign and "RAY_AUTH_MODE" not in os.environ:
                    raise ClusterUnreachable(f"{address} {_NOT_SENT.format(foreign)}") from None
                raise
            self._client = _connect(address, {"Authorization": f"Bearer {token}"})
        self._client.answer_s = _ANSWER_S

    def versions(self) -> Versions:
        """
        Tell which Ray and Python the cluster has.

        Raises:
            ClusterUnreachable: it does not say which Ray.
        """
        try:
            ray_version_there = str(self._client.ask("/api/version").json()["ray_version"])
        except _UNREADABLE as error:
            raise _not_a_dashboard(self.address, error) from error
        with suppress(*_UNREADABLE):  # a proxy may let job requests through only
            metadata = self._client.ask("/api/v0/cluster_metadata").json()["data"]
            return Versions(ray_version_there, str(metadata["pythonVersion"]))
        return Versions(ray_version_there, "")

    def submit(self, **what: Any) -> str:
        """
        Hand a job in; what Ray does not accept is the user's to mend.

        Raises:
            SpecError: Ray refused the job, for example because the id is taken.
            ClusterUnreachable: it could not take any.
        """
        try:
            return str(self._client.submit_job(**what))
        except (RuntimeError, ValueError, TypeError) as error:
            if _FAILED.search(str(error)):
                raise ClusterUnreachable(f"the cluster failed: {one_line(error)}") from error
            raise SpecError(f"the cluster refused the job: {one_line(error)}") from error

    def info(self, job_id: str) -> Info:
        """
        Look one job up.

        Raises:
            NoSuchJob: the cluster does not know it.
        """
        with _errors_of(self.address):
            return _plain(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """
        Give all that a job has printed so far.

        Raises:
            NoSuchJob: the cluster does not know it.
        """
        with _errors_of(self.address):
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> None:
        """
        Ask a job to end; returns at once.

        Raises:
            NoSuchJob: the cluster does not know it.
        """
        with _errors_of(self.address):
            self._client.stop_job(job_id)

    def list(self) -> list[Info]:
        """Give all jobs that were handed in through the API, newest first."""
        with _errors_of(self.address):
            jobs = [_plain(job) for job in self._client.list_jobs()]
        submitted = [job for job in jobs if job["submission_id"]]
        return sorted(submitted, key=lambda job: job["start_time"] or 0, reverse=True)


def _connect(address: str, headers: dict[str, str]) -> Any:
    """
    Make a client that has heard from its cluster.

    Raises:
        ClusterUnreachable: what answers is no Ray.
    """
    for name in ray_compat.LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    with unset("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # they would win over `address`
        try:
            return _Client(address, headers=headers)
        except (requests.RequestException, RuntimeError, *_UNREADABLE) as error:
            raise _not_a_dashboard(address, error) from error


@contextmanager
def _errors_of(address: str) -> Iterator[None]:
    """
    Tell a job that is not there, and what no Ray answers, from other refusals.

    Raises:
        NoSuchJob: the cluster said 404.
        ClusterUnreachable: it said something else, or nothing that Ray's client can read.
    """
    try:
        yield
    except RecursionError as error:
        raise _not_a_dashboard(address, error) from None
    except RuntimeError as error:
        if "status code 404" in str(error):
            raise NoSuchJob from None
        raise ClusterUnreachable(f"the cluster failed: {one_line(error)}") from error
    except _UNREADABLE as error:
        raise _not_a_dashboard(address, error) from error


def _not_a_dashboard(address: str, error: Exception) -> ClusterUnreachable:
    return ClusterUnreachable(
        f"what answers at {address} is not a Ray dashboard ({one_line(error)})"
    )


def _plain(details: Any) -> Info:
    fields: Info = details.model_dump() if hasattr(details, "model_dump") else details.dict()
    status = str(getattr(fields["status"], "value", fields["status"]))
    metadata = fields["metadata"] or {}
    asked_to_end = fields["driver_exit_code"] == _STOPPED_EXIT_CODE
    if VERSION_KEY in metadata and status == "FAILED" and asked_to_end:
        status = "STOPPED"
    return {**fields, "status": status, "metadata": metadata}
