"""What strategies have to say of the option `overlap` before a run."""

from distplat.platform.errors import Problem
from distplat.platform.spec import Job


def overlap_problems(given: set[str], overlap: bool, servers: int) -> list[Problem]:
    """
    Refuse an `overlap` that is asked for where a single server leaves nothing to send early.

    Args:
        given: options that the job file names.
        overlap: the option.
        servers: how many there are.
    """
    if "overlap" in given and overlap and servers == 1:
        text = "has no effect with one server: its part is complete when backward is over"
        return [Problem(("strategy", "overlap"), text, "set num_servers, or remove it")]
    return []


def rows_come_first(job: Job) -> bool:
    """
    Say whether gradients of a synchronous strategy must not leave before the step's rows are in.

    Asynchronous tables take no step back. So when the others' step is made, all rows of it must be
    on the servers; rows of a step that is not made are known there when they come once more.
    """
    return job.embeddings is not None and job.embeddings.asynchronous


def rows_first_problems(given: set[str], overlap: bool, job: Job) -> list[Problem]:
    """Refuse an `overlap` that is asked for where rows come first; see `overlap_problems`."""
    if "overlap" in given and overlap and rows_come_first(job):
        text = "has no effect with `embeddings.asynchronous: true`: rows go before gradients"
        return [Problem(("strategy", "overlap"), text, "remove it")]
    return []
