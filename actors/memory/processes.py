"""Whether another process of this node has ended."""

import select


def has_ended(descriptor: int) -> bool:
    """
    Say whether a process has ended, whoever its parent is.

    Args:
        descriptor: as `os.pidfd_open` gives it; `select` would refuse one above 1023.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
