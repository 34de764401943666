"""Output that nobody reads any more, for example behind `| head`."""

import os
from typing import TextIO


def let_go(stream: TextIO) -> None:
    """Write out what a stream holds; where nobody reads it, it goes nowhere from now on."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
