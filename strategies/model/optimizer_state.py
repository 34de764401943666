"""What an optimizer remembers of a run of the flat vector, by name: see `FlatOptimizer.state`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from distplat.strategies.model.ema import AVERAGED

PER_PARAMETER = "parameter/"
"""Begins the names of what an optimizer remembers of each parameter as a whole: one number each,
by `Piece.slot`. All else that it remembers are vectors, laid out as the parameters are."""

USED = f"{PER_PARAMETER}used"
"""Whether the optimizer remembers anything of a parameter: not before its first gradient."""

NUMBERS = {"step", "mu_product", AVERAGED}
"""What torch's optimizers, and an average, remember of a parameter that is one number."""

UPDATES = PER_PARAMETER + AVERAGED
"""Number of updates in an average."""

WHOLE = "whole/"
"""Begins the names of what is remembered of one parameter, in a tensor of any shape: behind it
torch's name, and the parameter's slot (`whole/row_var/3`). See `TensorOptimizer.state`."""

TREE = "task"
"""Begins the names of what a task's own optimizer remembers, see `TaskUpdate.memory`."""

Presence: TypeAlias = "Sequence[bool] | NDArray[np.bool_] | None"
"""By slot, whether a parameter has a gradient on any rank; None: all that are no tail."""
