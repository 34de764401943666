"""A `ring` that writes to a file: `<pid> in <step>` during an exchange, else `<pid> out`."""

import os
from pathlib import Path

from distplat.strategies.catalog import strategies
from distplat.strategies.loop.control import StepControl
from distplat.strategies.ring import Ring, RingOptions
from distplat.strategies.ring_worker import RingWorker
from distplat.strategies.worker_strategy import Context


class MarkedOptions(RingOptions):
    """Options of `ring`, and the folder of the files."""

    folder: str
    """Each rank writes to the file named by its number."""


class MarkedWorker(RingWorker):
    """Records the start and end of each exchange."""

    def setup(self, context: Context) -> int:
        assert isinstance(self.options, MarkedOptions)
        self._file = os.open(Path(self.options.folder, str(context.rank)), os.O_CREAT | os.O_RDWR)
        return super().setup(context)

    def exchange(self, step: int, local: StepControl) -> StepControl:
        self._mark(f"{os.getpid()} in {step}")
        total = super().exchange(step, local)
        self._mark(f"{os.getpid()} out")
        return total

    def _mark(self, text: str) -> None:
        os.pwrite(self._file, text.ljust(40).encode(), 0)


@strategies.register("marked-ring")
class MarkedRing(Ring):
    """`ring` with `MarkedWorker`."""

    summary = "ring with marks"
    options_type = MarkedOptions
    worker = MarkedWorker
