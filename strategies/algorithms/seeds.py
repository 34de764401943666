"""Seeds from several numbers, so that what is drawn depends on all of them and on nothing else."""

_MASK = (1 << 64) - 1


def mixed(*numbers: int) -> int:
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
