"""
The three global generators of random numbers: python's `random`, numpy's and torch's, seeded alike.

    before the task's module, its class, `model()`,     the job's seed, on every rank
    `train_data()`, `eval_data()`
    before each step's first forward                    (seed, step, rank)
    before each training sample                         (seed, epoch, place in the epoch's order)
    before each evaluation sample                       (seed, its number)

See docs/random_numbers.md.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from distplat.strategies.algorithms.seeds import evaluation_seed, mixed, step_seed

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


def seed_function(seed: int) -> None:
    """Do as `seed_all`, so that `seeded_itself` can say later whether a loop has done so, too."""
    seed_all(seed)
    torch.default_generator.manual_seed(seed ^ _OURS)


def seeded_itself(seed: int) -> bool:
    """Say whether somebody has seeded torch after `seed_function`."""
    return torch.default_generator.initial_seed() != seed ^ _OURS


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed what forward and backward of a step draw, dropout for one."""
    seed_quickly(step_seed(seed, step, rank))


def seed_evaluation(seed: int, rank: int) -> None:
    """Seed what the model draws in an evaluation."""
    seed_quickly(evaluation_seed(seed, rank))


def seed_sample(base: int, place: int) -> None:
    """
    Seed what the data set draws for one sample; about 7 us.

    Args:
        base: of the epoch, or of all evaluations.
        place: of the sample in the epoch's order.
    """
    seed_quickly(mixed(base, place))


def seed_quickly(seed: int) -> None:
    """Do as `seed_all`, but look only for CUDA among the devices: a twentieth of the time."""
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)
    _seed_others(seed)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if _cuda_in_use() else []


def _seed_others(seed: int) -> None:
    # Folded: numpy takes 32 bits. With the lower ones alone of a long seed it would begin in the
    # very state of torch's generator, which is a Mersenne Twister too.
    np.random.seed((seed ^ (seed >> 32)) & _BITS_32)
    random.seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
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


def state_of_generators() -> tuple[object, ...]:
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
    a run its numbers depend on the job's seed, the epoch and the sample's place alone, and
    elsewhere `np.random.seed` makes them repeat. Several calls in one sample give different ones.
    Make one for each sample: one that is kept in the data set goes on from sample to sample.
    """
    return np.random.Generator(np.random.PCG64(np.random.randint(0, 1 << 63)))
