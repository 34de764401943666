"""Whether a train function reports what its job goes by: `checkpoint.keep_best`, `early_stop`."""

from __future__ import annotations

from collections.abc import Mapping

from distplat.platform.errors import Problem, SpecError, hint
from distplat.platform.spec import Job


class Watched:
    """
    Looks at one rank's reports.

    Args:
        job: the run.
    """

    def __init__(self, job: Job) -> None:
        self._best, self._stop = job.checkpoint.keep_best, job.early_stop
        self._names: dict[str, None] = {}  #: of all figures so far

    def reported(self, figures: Mapping[str, float], *, kept: bool) -> None:
        """
        Look at a report.

        Args:
            figures: by name.
            kept: whether it has a checkpoint.

        Raises:
            SpecError: nobody could say how good that is.
        """
        self._names.update(dict.fromkeys(figures))
        if kept and self._best is not None and self._best.metric not in figures:
            name = self._best.metric
            text = f"report() has a checkpoint, and no {name!r} to say how good it is"
            where = ("checkpoint", "keep_best", "metric")
            raise SpecError(Problem(where, text, hint(name, figures)))

    def over(self) -> None:
        """
        Be told that the function has returned.

        Raises:
            SpecError: it reported, and never what `early_stop` goes by.
        """
        if self._stop is not None and self._names and self._stop.metric not in self._names:
            text = f"no report() had a {self._stop.metric!r}"
            name = hint(self._stop.metric, self._names)
            raise SpecError(Problem(("early_stop", "metric"), text, name))
