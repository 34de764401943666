"""Comparison of trained models."""

from collections.abc import Mapping

import torch
from local_run import LocalRun
from torch import Tensor


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the relative distance of two models, in the 2-norm over all parameters."""
    assert found.keys() == expected.keys()
    a = torch.cat([found[name].flatten() for name in expected]).double()
    b = torch.cat([expected[name].flatten() for name in expected]).double()
    return float((a - b).norm() / b.norm())


def same_bits(first: LocalRun, second: LocalRun) -> bool:
    a, b = first.parameters(), second.parameters()
    return all(torch.equal(a[name], b[name]) for name in a)
