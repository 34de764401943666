"""Import torch a little faster."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """
    Keep the garbage collector out of a block of imports.

    What a large package makes while it is imported stays for ever; looking through it again and
    again for garbage is a tenth of torch's import. Afterwards it is never looked at again. Where
    torch is there already nothing is done: what is garbage by then would stay for ever as well.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
