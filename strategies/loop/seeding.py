"""
The three global generators of random numbers: python's `random`, numpy's and torch's, seeded alike.

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

    A seed below 2^32 is given to each of them as it is, as most training scripts do.
    """
    if torch.accelerator.current_accelerator() is None:
        # A build for CPUs alone: torch.manual_seed would format a stack for devices it has not.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
    _seed_others(seed)


_OURS = 1 << 62
"""torch's generator of the CPU draws by the lower 32 bits of its seed, and remembers all of it."""

_ASIDE = 0x5EED_F00D
"""The others remember none: loops often seed them by a small number, which may be the job's."""

_BLOCK = 624 << 10
_SEARCHED = 40 * _BLOCK
"""Numbers that numpy or python may have drawn since they were seeded: 25 M, about 80 ms."""


def seed_function(seed: int) -> None:
    """Do as `seed_all`, so that it can be told later what a loop has seeded itself."""
    seed_all(seed)
    torch.default_generator.manual_seed(seed ^ _OURS)
    _seed_others(seed ^ _ASIDE)


def seeded_itself(seed: int) -> bool:
    """Say whether somebody has seeded torch after `seed_function`."""
    return torch.default_generator.initial_seed() != seed ^ _OURS


def seed_again(seed: int) -> None:
    """Seed again those generators that nobody has seeded since `seed_function`."""
    _seed_unseeded(seed, seed ^ _OURS, seed ^ _ASIDE)


def seed_rank(seed: int, step: int, rank: int) -> None:
    """
    Have each rank draw other numbers from now on, as far as nobody has seeded.

    Args:
        seed: as `seed_function` got it.
        step: that comes next.
        rank: this one.
    """
    own = step_seed(seed, step, rank)
    _seed_unseeded(seed, own, own)


def _seed_unseeded(before: int, seed: int, others: int) -> None:
    """
    Seed torch's generator, unless a loop has done so; then those of the others that it has not.

    Who has seeded torch alone keeps all three as they are: ranks that draw alike, as they began.
    """
    if seeded_itself(before):
        return
    of_numpy, of_python = _untouched(before ^ _ASIDE)
    _seed_torch(seed)
    if of_numpy:
        np.random.seed(_folded(others))
    if of_python:
        random.seed(others)


def _untouched(seed: int) -> tuple[bool, bool]:
    """Say whether numpy's and python's generators only went on since `_seed_others`."""
    first: Any = np.random.RandomState(_folded(seed)).get_state(legacy=False)
    now: Any = np.random.get_state(legacy=False)
    of_numpy = now["bit_generator"] == "MT19937"
    of_numpy = of_numpy and _comes_to(first["state"]["key"], now["state"]["key"])
    keys = (one.getstate()[1][:-1] for one in (random.Random(seed), random))
    return of_numpy, _comes_to(*(np.array(key, np.uint32) for key in keys))


def _comes_to(key: NDArray[np.uint32], later: NDArray[np.uint32]) -> bool:
    """Say whether a Mersenne Twister comes from one state to another by at most `_SEARCHED`."""
    if np.array_equal(key, later):
        return True
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": len(key)}}
    # A state's words are the numbers that it draws, before their bits are mixed.
    wanted = [_mixed_bits(int(word)) for word in later[:2]]
    for _ in range(_SEARCHED // _BLOCK):
        drawn = twister.random_raw(_BLOCK).reshape(-1, len(key))
        if (drawn[:, :2] == wanted).all(1).any():
            return True
    return False


def _mixed_bits(word: int) -> int:
    """Give the number that a Mersenne Twister draws of a word of its state."""
    word ^= word >> 11
    word ^= word << 7 & 0x9D2C5680
    word ^= word << 15 & 0xEFC60000
    return word ^ word >> 18


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what forward and backward of a step draw, dropout for one."""
    seed_quickly(step_seed(seed, step, rank))


def seed_evaluation(seed: int, rank: int) -> None:
    """Seed what the model draws in an evaluation."""
    seed_quickly(evaluation_seed(seed, rank))


def seed_sample(base: int, position: int) -> None:
    """
    Seed what the data set draws for one sample; about 7 us.

    Args:
        base: of the epoch, or of all evaluations.
        position: of the sample in the epoch's order.
    """
    seed_quickly(derive_seed(base, position))


def seed_quickly(seed: int) -> None:
    """Do as `seed_all`, but look only for CUDA among the devices: a twentieth of the time."""
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
    Give the 32 bits that numpy takes.

    With the lower ones alone of a long seed it would begin in the very state of torch's generator,
    which is a Mersenne Twister too.
    """
    return (seed ^ (seed >> 32)) & _BITS_32


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Put the global generators back where they were before the block; about 60 us."""
    of_python, of_numpy = random.getstate(), np.random.get_state(legacy=False)
    of_torch = torch.default_generator.get_state()
    of_cuda = _cuda_states()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.default_generator.set_state(of_torch)
        torch.cuda.set_rng_state_all(of_cuda)


def rng_states() -> tuple[object, ...]:
    """Give what the global generators will draw next, to be compared; about 60 us."""
    of_numpy = np.random.get_state(legacy=False)
    state = of_numpy["state"]
    return (
        random.getstate(),
        (state["key"].tobytes(), state["pos"], of_numpy["has_gauss"]),
        torch.default_generator.get_state().numpy().tobytes(),
        [one.numpy().tobytes() for one in _cuda_states()],
    )


def sample_rng() -> np.random.Generator:
    """
    Give a generator for the sample that is being read; for use inside `__getitem__`.

    It is seeded by a draw from numpy's global generator, which is seeded for each sample. So in
    a run its numbers depend on the job's seed, the epoch and the sample's position alone, and
    elsewhere `np.random.seed` makes them repeat. Several calls in one sample give different ones.
    Make one for each sample: one that is kept in the data set goes on from sample to sample.
    """
    return np.random.Generator(np.random.PCG64(np.random.randint(0, 1 << 63)))
