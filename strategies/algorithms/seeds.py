"""Seeds derived from several numbers, such as seed, step and rank."""

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_STEP, _TRAINING_DATA, _EVALUATION_DATA, _EVALUATION, _COLLATE, _ORDER, _UPDATE = range(1, 8)
"""Purposes of seeds: equal numbers with different purposes give different seeds."""


def derive_seed(*numbers: int) -> int:
    """
    Return a seed of 63 bits that depends on all numbers and their order.

    Each number is mixed in with the finaliser of SplitMix64 (Steele et al., OOPSLA 2014).
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + number * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed for dropout by step and rank: a repeated step draws the same numbers."""
    return derive_seed(_STEP, seed, step, rank)


def update_seed(seed: int, step: int) -> int:
    """Return the seed for an optimizer's random numbers in a step, the same on every rank."""
    return derive_seed(_UPDATE, seed, step)


def evaluation_seed(seed: int, rank: int) -> int:
    """Return the seed for a model's random numbers in every evaluation."""
    return derive_seed(_EVALUATION, seed, rank)


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed for an epoch's training samples, combined with each sample's position."""
    return derive_seed(_TRAINING_DATA, seed, epoch)


def order_seed(seed: int, epoch: int) -> int:
    """Return the seed for a task's own order of samples in an epoch."""
    return derive_seed(_ORDER, seed, epoch)


def evaluation_data_seed(seed: int) -> int:
    """Return the seed for evaluation samples, the same in every evaluation."""
    return derive_seed(_EVALUATION_DATA, seed)


def collate_seed(base: int, first: int) -> int:
    """Return the seed for collate() of a micro-batch, by epoch and first sample."""
    return derive_seed(_COLLATE, base, first)


GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio, whose multiples are spread evenly."""


def mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit numbers bijectively (SplitMix64); any shape."""
    x = numbers ^ (numbers >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
