"""Log lines of an actor: to its stderr, where Ray puts the actor's name in front of them."""

import logging
import sys


def log_to_stderr() -> None:
    """Show distplat's own records from INFO up in this process; other packages' are left alone."""
    ours = logging.getLogger("distplat")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname).1s %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False
