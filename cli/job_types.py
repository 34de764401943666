"""What the job API gives, for modules that import no Ray."""

from typing import Any

Info = dict[str, Any]
"""A job as the API gives it: the fields of Ray's `JobDetails`."""


class NoSuchJob(Exception):
    """The cluster knows no job of that id."""
