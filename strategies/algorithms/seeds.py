"""Seeds from several numbers, so that what is drawn depends on all of them and on nothing else."""

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_STEP, _TRAINING_DATA, _EVALUATION_DATA, _EVALUATION, _COLLATE, _ORDER, _UPDATE = range(1, 8)
"""What a seed is for: equal numbers for another purpose give another seed."""


def derive_seed(*numbers: int) -> int:
    """
    Give a seed of 63 bits; any number that differs gives another one.

    Each number goes through the finaliser of SplitMix64 (Steele et al., OOPSLA 2014).
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + number * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed dropout and its like by step and rank: a repeated step draws the same numbers."""
    return derive_seed(_STEP, seed, step, rank)


def update_seed(seed: int, step: int) -> int:
    """Seed what an optimizer draws in a step: every rank draws the same."""
    return derive_seed(_UPDATE, seed, step)


def evaluation_seed(seed: int, rank: int) -> int:
    """Seed what a model draws in an evaluation: the same numbers in each."""
    return derive_seed(_EVALUATION, seed, rank)


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed the training samples of an epoch; a sample's own is mixed from it and its position."""
    return derive_seed(_TRAINING_DATA, seed, epoch)


def order_seed(seed: int, epoch: int) -> int:
    """Seed what a task draws while it says which samples an epoch has, and in which order."""
    return derive_seed(_ORDER, seed, epoch)


def evaluation_data_seed(seed: int) -> int:
    """Seed the evaluation samples: each draws the same numbers in every evaluation."""
    return derive_seed(_EVALUATION_DATA, seed)


def collate_seed(base: int, first: int) -> int:
    """Seed what is drawn while a micro-batch is put together: by epoch, and its first sample."""
    return derive_seed(_COLLATE, base, first)


GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: multiples of it are far from each other."""


def mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter numbers over all 64-bit numbers, different ones to different numbers; any shape."""
    x = numbers ^ (numbers >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
