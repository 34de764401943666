"""Sums of parameters that were frozen at first, once some rank trains them."""

from distplat.strategies.collective import Collective
from distplat.strategies.training.control import StepControl
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.segments import typed


def sum_tail(flat: FlatModel, group: Collective, total: StepControl, step: int) -> None:
    """
    Train from this step on what some rank has thawed in it, and sum the tail's gradients.

    Args:
        flat: the model.
        group: all ranks; each calls this.
        total: their control records, summed.
        step: for messages.

    Raises:
        SpecError: this rank has computed something in the step, and with a parameter frozen that
            others have thawed.
    """
    flat.activate_tail(total.present, step)
    if flat.active.any() and group.world > 1:
        for segment in flat.layout.segments:
            if segment.start >= flat.layout.tail:
                group.all_reduce(typed(flat.grads, segment.start, segment.stop, segment.dtype))
