"""Did-you-mean: the nearest known name to a mistyped one."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """
    Give the known name closest to `name`, or None where none is near.

    Case and `-`/`_` do not count as a difference: `Ps_Sync` is near `ps-sync`.
    """
    by_folded = {_fold(k): k for k in known}
    cutoff = 0.6 if len(name) > 2 else 0.5  # one wrong letter of two
    hits = get_close_matches(_fold(name), by_folded, n=1, cutoff=cutoff)
    return by_folded[hits[0]] if hits else None


def hint(name: str, known: Iterable[str]) -> str:
    """Give `did you mean 'ring'? allowed: ps-sync, ring`; without a near name only the list."""
    names = sorted(known)
    near = nearest(name, names)
    allowed = f"allowed: {', '.join(names)}" if names else "none is allowed here"
    return f"did you mean {near!r}? {allowed}" if near else allowed


def _fold(name: str) -> str:
    return name.casefold().replace("_", "-")
