"""Which of many numbered things are done, when they are done about in order: little memory."""

from dataclasses import dataclass, field


@dataclass
class IntervalSet:
    """
    Numbers from some first one on that are done.

        low = 5   above = {7, 8}        5 is the lowest that is missing; 6 is missing, too
    """

    low: int = 0
    """Everything below is done, and this one is not."""
    above: set[int] = field(default_factory=set)
    """What is done above it."""

    def add(self, number: int) -> bool:
        """Note one as done; False: it was done before."""
        if number in self:
            return False
        self.above.add(number)
        while self.low in self.above:
            self.above.remove(self.low)
            self.low += 1
        return True

    def __contains__(self, number: int) -> bool:
        return number < self.low or number in self.above
