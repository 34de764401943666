"""Names of an optimizer's state entries, see `FlatOptimizer.state`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from distplat.strategies.model.ema import AVERAGED

PER_PARAMETER = "parameter/"
"""Prefix of entries with one number for each parameter, indexed by `Piece.slot`. All other entries
are vectors with the layout of the parameters."""

USED = f"{PER_PARAMETER}used"
"""Whether the optimizer has state for a parameter: not before the parameter's first gradient."""

NUMBERS = {"step", "mu_product", AVERAGED}
"""State entries of torch's optimizers, and of an average, that are one number per parameter."""

UPDATES = PER_PARAMETER + AVERAGED
"""Entry with the number of updates in an average."""

WHOLE = "whole/"
"""Prefix of entries that belong to one parameter, as tensors of any shape. Torch's name and the
parameter's slot follow (`whole/row_var/3`). See `TensorOptimizer.state`."""

TREE = "task"
"""Prefix of the state entries of a task's own optimizer, see `TaskUpdate.memory`."""

Presence: TypeAlias = "Sequence[bool] | NDArray[np.bool_] | None"
"""By slot, whether a parameter has a gradient on any rank; None: all slots before the tail."""
