"""
Client of Ray's job API. Importing this module imports Ray.

The client wraps Ray's `JobSubmissionClient`, which packs and uploads folders, with deadlines and
with errors that name a remedy.
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
"""Maximum size of a response. A list of jobs contains each job's environment, up to 50 kB."""
_MOST_LOG_BYTES = 2**30
"""Maximum size of a job's log; Ray's job API returns only the whole log."""
_SERVER_ERROR = re.compile(r"status code 5\d\d\b")
"""Message of Ray's client for an error of the cluster; errors of the user have status 400."""
_STOPPED_EXIT_CODE = 143
"""Exit code of a driver after SIGTERM; Ray reports STOPPED only for jobs that it stopped itself."""
_NEEDS_TOKEN = "set RAY_AUTH_TOKEN, or RAY_AUTH_MODE=token with the token in ~/.ray/auth_token"
_NOT_SENT = (
    "requires a token, and none was sent ({}): set RAY_AUTH_MODE=token if RAY_AUTH_TOKEN or "
    "~/.ray/auth_token is that cluster's"
)


def _request(
    client: Any, send: Callable[..., requests.Response], method: str, endpoint: str, **kwargs: Any
) -> requests.Response:
    """
    Send one request of a client, with limits and distplat's errors.

    Raises:
        ClusterUnreachable: no response, a response that is too large, or a rejected token.
    """
    address = client.get_address()
    max_bytes = _MOST_LOG_BYTES if endpoint.endswith("/logs") else _MOST_BYTES
    limits = AnswerLimits(client.answer_s, max_bytes)
    try:
        return bounded_answers.request(send, address, method, endpoint, limits, **kwargs)
    except ray.exceptions.AuthenticationError as error:
        if "Authentication failed" in str(error):
            message = f"{address} does not accept our token; {_NEEDS_TOKEN}"
            raise ClusterUnreachable(message) from None
        raise _TokenRequired(f"{address} requires a token: {_NEEDS_TOKEN}") from None


_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""Exceptions of Ray's client for JSON with an unexpected structure."""
_Client = ray_compat.with_requests(JobSubmissionClient, _request)
_Client.answer_s = _FIRST_ANSWER_S


class _TokenRequired(ClusterUnreachable):
    """The cluster requires a token and none was sent."""


class Jobs:
    """
    The job API of one cluster.

    Args:
        address: URL of the job API.

    Raises:
        ClusterUnreachable: the server cannot be reached, is not Ray, or rejects the token.
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
        Return the versions of Ray and Python on the cluster.

        Raises:
            ClusterUnreachable: the response has no Ray version.
        """
        try:
            cluster_ray = str(self._client.ask("/api/version").json()["ray_version"])
        except _UNREADABLE as error:
            raise _not_a_dashboard(self.address, error) from error
        with suppress(*_UNREADABLE):  # a proxy may forward only the requests of the job API
            metadata = self._client.ask("/api/v0/cluster_metadata").json()["data"]
            return Versions(cluster_ray, str(metadata["pythonVersion"]))
        return Versions(cluster_ray, "")

    def submit(self, **kwargs: Any) -> str:
        """
        Submit a job and return its id.

        Args:
            kwargs: arguments of Ray's `submit_job`.

        Raises:
            SpecError: Ray rejected the job, for example because the id is taken.
            ClusterUnreachable: the cluster failed.
        """
        try:
            return str(self._client.submit_job(**kwargs))
        except (RuntimeError, ValueError, TypeError) as error:
            if _SERVER_ERROR.search(str(error)):
                raise ClusterUnreachable(f"the cluster failed: {one_line(error)}") from error
            raise SpecError(f"the cluster refused the job: {one_line(error)}") from error

    def info(self, job_id: str) -> Info:
        """
        Return the details of one job.

        Raises:
            NoSuchJob: the cluster has no such job.
        """
        with _errors_of(self.address):
            return _plain(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """
        Return the complete log of a job.

        Raises:
            NoSuchJob: the cluster has no such job.
        """
        with _errors_of(self.address):
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> None:
        """
        Request a job to stop, without waiting.

        Raises:
            NoSuchJob: the cluster has no such job.
        """
        with _errors_of(self.address):
            self._client.stop_job(job_id)

    def list(self) -> list[Info]:
        """Return all jobs that were submitted through the job API, newest first."""
        with _errors_of(self.address):
            jobs = [_plain(job) for job in self._client.list_jobs()]
        submitted = [job for job in jobs if job["submission_id"]]
        return sorted(submitted, key=lambda job: job["start_time"] or 0, reverse=True)


def _connect(address: str, headers: dict[str, str]) -> Any:
    """
    Create a client and check that its cluster responds.

    Raises:
        ClusterUnreachable: the server is not Ray.
    """
    for name in ray_compat.LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    with unset("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray prefers them to `address`
        try:
            return _Client(address, headers=headers)
        except (requests.RequestException, RuntimeError, *_UNREADABLE) as error:
            raise _not_a_dashboard(address, error) from error


@contextmanager
def _errors_of(address: str) -> Iterator[None]:
    """
    Convert the errors of Ray's client.

    Raises:
        NoSuchJob: the response has status 404.
        ClusterUnreachable: another error, or a response that Ray's client cannot parse.
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
    return ClusterUnreachable(f"the server at {address} is not a Ray dashboard ({one_line(error)})")


def _plain(details: Any) -> Info:
    fields: Info = details.model_dump() if hasattr(details, "model_dump") else details.dict()
    status = str(getattr(fields["status"], "value", fields["status"]))
    metadata = fields["metadata"] or {}
    is_stopped = fields["driver_exit_code"] == _STOPPED_EXIT_CODE
    if VERSION_KEY in metadata and status == "FAILED" and is_stopped:
        status = "STOPPED"
    return {**fields, "status": status, "metadata": metadata}
