"""Packages that only some commands need, and that `pip install distplat` leaves out."""

from collections.abc import Iterator
from contextlib import contextmanager

from distplat.platform.errors import Problem, SpecError

_REPORT = ("jinja2", "matplotlib")


@contextmanager
def report_extra() -> Iterator[None]:
    """
    Import what draws in this context.

    Raises:
        SpecError: a package of the extra `report` is missing; the hint installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _REPORT:
            raise
        text = f"{error.name} is not installed, and draws pages and charts"
        raise SpecError(Problem((), text, "pip install 'distplat[report]'")) from error
