"""Control records of ranks that have gradients of all parameters."""

import numpy as np

from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.flat import FlatModel


def full_record(slots: int = 1, rank: int = 0) -> StepControl:
    """Return the record of a rank with one sample and gradients of `slots` parameters."""
    return StepControl(1.0, 1.0, 0, rank, present=np.ones(slots, np.bool_))


def record_of(flat: FlatModel, rank: int = 0) -> StepControl:
    """Return the record of a rank with one sample and the gradients of a model."""
    return StepControl(1.0, 1.0, 0, rank, unfrozen=flat.unfreezes, present=flat.present)
