"""
Seeding of the global random number generators of Python, numpy and torch.

    before the task's module, its class, `model()`,     the job's seed, on every rank
    `train_data()`, `eval_data()`
    before each step's first forward                    (seed, step, rank)
    before each training sample                         (seed, epoch, position in the epoch's order)
    before each evaluation sample                       (seed, its number)

See docs/random_numbers.md.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distplat.strategies.algorithms.seeds import derive_seed, evaluation_seed, step_seed

_BITS_32 = (1 << 32) - 1


def seed_all(seed: int) -> None:
    """
    Seed the global generators of python, numpy and torch, those of all CUDA devices too.

    A seed below 2^32 is used for each generator unchanged, as in most training scripts.
    """
    if torch.accelerator.current_accelerator() is None:
        # In a CPU build, torch.manual_seed would format a stack trace for absent devices.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
    _seed_others(seed)


_OURS = 1 << 62
"""torch's CPU generator uses the lower 32 bits of its seed, but reports all of them."""

_ASIDE = 0x5EED_F00D
"""The other generators do not report their seed. Loops often use small seeds, as the job may."""

_BLOCK = 624 << 10
_SEARCHED = 40 * _BLOCK
"""Maximum count of numbers drawn since seeding that `_is_reached` finds: 25 M, about 80 ms."""


def seed_function(seed: int) -> None:
    """Seed like `seed_all`, so that later seeding by the user's loop can be detected."""
    seed_all(seed)
    torch.default_generator.manual_seed(seed ^ _OURS)
    _seed_others(seed ^ _ASIDE)


def user_seeded(seed: int) -> bool:
    """Return whether user code has seeded torch after `seed_function`."""
    return torch.default_generator.initial_seed() != seed ^ _OURS


def seed_again(seed: int) -> None:
    """Seed again the generators that user code has not seeded since `seed_function`."""
    _seed_unseeded(seed, seed ^ _OURS, seed ^ _ASIDE)


def seed_rank(seed: int, step: int, rank: int) -> None:
    """
    Seed each rank differently, except for generators that user code has seeded.

    Args:
        seed: argument of `seed_function`.
        step: next step.
        rank: this rank.
    """
    rank_seed = step_seed(seed, step, rank)
    _seed_unseeded(seed, rank_seed, rank_seed)


def _seed_unseeded(before: int, seed: int, others: int) -> None:
    """
    Seed torch's generator unless user code has; then those of numpy and Python likewise.

    If user code has seeded torch, all three generators stay as they are, equal on all ranks.
    """
    if user_seeded(before):
        return
    numpy_untouched, python_untouched = _untouched(before ^ _ASIDE)
    _seed_torch(seed)
    if numpy_untouched:
        np.random.seed(_folded(others))
    if python_untouched:
        random.seed(others)


def _untouched(seed: int) -> tuple[bool, bool]:
    """Return whether numpy's and Python's generators were only drawn from since `_seed_others`."""
    first: Any = np.random.RandomState(_folded(seed)).get_state(legacy=False)
    now: Any = np.random.get_state(legacy=False)
    numpy_untouched = now["bit_generator"] == "MT19937"
    numpy_untouched = numpy_untouched and _is_reached(first["state"]["key"], now["state"]["key"])
    keys = (generator.getstate()[1][:-1] for generator in (random.Random(seed), random))
    return numpy_untouched, _is_reached(*(np.array(key, np.uint32) for key in keys))


def _is_reached(key: NDArray[np.uint32], later: NDArray[np.uint32]) -> bool:
    """Return whether a Mersenne Twister gets from one state to another in `_SEARCHED` draws."""
    if np.array_equal(key, later):
        return True
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": len(key)}}
    # The words of a state are the numbers that it draws, before tempering.
    expected = [_mixed_bits(int(word)) for word in later[:2]]
    for _ in range(_SEARCHED // _BLOCK):
        drawn = twister.random_raw(_BLOCK).reshape(-1, len(key))
        if (drawn[:, :2] == expected).all(1).any():
            return True
    return False


def _mixed_bits(word: int) -> int:
    """Temper a word of a Mersenne Twister's state into the number that it draws."""
    word ^= word >> 11
    word ^= word << 7 & 0x9D2C5680
    word ^= word << 15 & 0xEFC60000
    return word ^ word >> 18


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the random numbers of a step's forward and backward, such as dropout."""
    seed_quickly(step_seed(seed, step, rank))


def seed_evaluation(seed: int, rank: int) -> None:
    """Seed the random numbers of the model in an evaluation."""
    seed_quickly(evaluation_seed(seed, rank))


def seed_sample(base: int, position: int) -> None:
    """
    Seed the random numbers of the data set for one sample; takes about 7 us.

    Args:
        base: seed of the epoch, or of all evaluations.
        position: position of the sample in the epoch's order.
    """
    seed_quickly(derive_seed(base, position))


def seed_quickly(seed: int) -> None:
    """Seed like `seed_all`, but only CPU and CUDA: 20 times faster."""
    _seed_torch(seed)
    _seed_others(seed)


def _seed_torch(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if _cuda_in_use() else []


def _seed_others(seed: int) -> None:
    np.random.seed(_folded(seed))
    random.seed(seed)


def _folded(seed: int) -> int:
    """
    Return 32 bits of a seed, for numpy.

    The lower bits alone would start numpy in the state of torch's generator, which is a Mersenne
    Twister, too.
    """
    return (seed ^ (seed >> 32)) & _BITS_32


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the states of the global generators after the block; takes about 60 us."""
    python_state, numpy_state = random.getstate(), np.random.get_state(legacy=False)
    torch_state = torch.default_generator.get_state()
    cuda_states = _cuda_states()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
        torch.cuda.set_rng_state_all(cuda_states)


def rng_states() -> tuple[object, ...]:
    """Return the states of the global generators in comparable form; takes about 60 us."""
    numpy_state = np.random.get_state(legacy=False)
    state = numpy_state["state"]
    return (
        random.getstate(),
        (state["key"].tobytes(), state["pos"], numpy_state["has_gauss"]),
        torch.default_generator.get_state().numpy().tobytes(),
        [cuda_state.numpy().tobytes() for cuda_state in _cuda_states()],
    )


def sample_rng() -> np.random.Generator:
    """
    Return a generator for the sample that is being read; for use in `__getitem__`.

    The generator is seeded by a draw from numpy's global generator, which distplat seeds for each
    sample. So its numbers depend only on the job's seed, the epoch and the sample's position;
    outside of a run, `np.random.seed` makes them repeatable. Several calls for one sample return
    different generators. Call this function for each sample: a generator stored in the data set
    would continue from sample to sample.
    """
    return np.random.Generator(np.random.PCG64(np.random.randint(0, 1 << 63)))
