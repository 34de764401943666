"""What `ps-sync` and `ps-async` have to say of the option `overlap` before a run."""

from distplat.platform.errors import Problem


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
