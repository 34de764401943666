"""What strategies have to say of the option `overlap` before a run."""

from distplat.platform.errors import Problem
from distplat.platform.spec import Job

NO_EARLY_PUSH = "was removed: gradients go to the servers when backward is over"
"""What servers' strategies say of it: a step with early pushes took as long as one without."""


def rows_come_first(job: Job) -> bool:
    """
    Say whether gradients of a synchronous strategy must not leave before the step's rows are in.

    Asynchronous tables take no step back. So when the others' step is made, all rows of it must be
    on the servers; rows of a step that is not made are known there when they come once more.
    """
    return job.embeddings is not None and job.embeddings.asynchronous


def rows_first_problems(given: set[str], overlap: bool, job: Job) -> list[Problem]:
    """
    Refuse an `overlap` that is asked for where rows come first.

    Args:
        given: options that the job file names.
        overlap: the option.
        job: the job.
    """
    if "overlap" in given and overlap and rows_come_first(job):
        text = "has no effect with `embeddings.asynchronous: true`: rows go before gradients"
        return [Problem(("strategy", "overlap"), text, "remove it")]
    return []
